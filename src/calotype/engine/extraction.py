"""Extract: a disk as a snapshot had it, in a new image that stands alone; the VM may run.

Nothing of the VM is changed, and nobody has to wait: no lock is taken. So what is read is compared
with what was recorded before it is read, and once more afterwards; if the snapshot was deleted or
its images were merged meanwhile, there is no copy. The copy grows under a temporary name beside its
own, and gets its own when it is whole and on the disk, unless something is there by then.
"""

import asyncio
import os
import secrets
import shlex
from pathlib import Path

from msgspec.structs import replace

from calotype.engine import finding
from calotype.engine.progress import Progress, silent
from calotype.errors import ConflictError, MismatchError, StoreError
from calotype.model.snapshot import Manifest
from calotype.model.vm import VmRecord
from calotype.plan.contents import Extraction
from calotype.plan.preflight import as_error, part_mismatches
from calotype.qemu import image_copy
from calotype.store import files, images
from calotype.store.store import Store


async def extract(
    store: Store,
    record: VmRecord,
    manifest: Manifest,
    plan: Extraction,
    *,
    accept_touched: bool = False,
    progress: Progress = silent,
) -> int:
    """Copy one disk out of a snapshot.

    Args:
        store: Where it is kept.
        record: The VM.
        manifest: The snapshot.
        plan: Which disk, and where to.
        accept_touched: Go on although a file's mode, owner or name was changed, if nothing else.
        progress: Told how far it is.

    Returns:
        How many bytes the new image takes.

    Raises:
        MismatchError: What the content is read from is not what was recorded.
        ConflictError: The snapshot was deleted, or its images merged, while they were read.
        HostError: Something is at the path already, the disk is full, or qemu-img failed. Whatever
            fails, nothing is left.
    """
    output = Path(plan.output)
    files.require_free(output)
    if error := _refusal(store, record, manifest, plan, accept_touched=accept_touched):
        raise error
    temporary = output.with_name(f"{files.TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    os.close(files.create_private(temporary))
    try:
        await _fill(plan, temporary, progress)
        if _is_changed(store, record, manifest, plan, accept_touched=accept_touched):
            raise ConflictError(
                f"the snapshot {manifest.id} was deleted, or its images merged, while it was read",
                f"see `calotype list {shlex.quote(record.name)}`; nothing was extracted",
            )
        files.publish(temporary, output)
    finally:
        with files.host_errors(temporary):
            temporary.unlink(missing_ok=True)
    return images.allocated_bytes(output)


async def _fill(plan: Extraction, target: Path, progress: Progress) -> None:
    """Write the content, durably."""

    def told(share: float) -> None:
        progress("extracting", int(share * plan.size_bytes), plan.size_bytes)

    told(0.0)
    await image_copy.copy_content(plan.source, plan.internal_name, target, plan.format, told)
    await image_copy.cut_to(target, plan.format, plan.size_bytes)
    await asyncio.to_thread(images.sync_data, target)


def _is_changed(
    store: Store, record: VmRecord, manifest: Manifest, plan: Extraction, *, accept_touched: bool
) -> bool:
    """Whether the snapshot is not what it was when it began to be read."""
    try:
        is_same = store.manifest(record.id, manifest.id) == manifest
    except StoreError:
        return True
    return not is_same or bool(
        _refusal(store, record, manifest, plan, accept_touched=accept_touched)
    )


def _refusal(
    store: Store, record: VmRecord, manifest: Manifest, plan: Extraction, *, accept_touched: bool
) -> MismatchError | None:
    """Why the content is not what was recorded, if it is not."""
    alone = replace(manifest, storage=(plan.part,), read_only=(), machine_state=None)
    found = finding.find(store, record, alone, manifest.definition)
    mismatches = [
        mismatch
        for mismatch in part_mismatches(plan.part, manifest, found)
        if not (accept_touched and mismatch.kind == "touched")
    ]
    if not mismatches:
        return None
    return as_error(f"nothing of {manifest.id} is extracted", mismatches)

"""What a snapshot consists of on disk, and how the content of one of its disks is read.

A manifest says of each part in which image it is, and what that stands on. From that follow the
paths that a person is told, and the plan of an extraction: what must be unchanged, what is read,
and how. Nothing is looked up here.
"""

from msgspec import Struct

from calotype.errors import NotFoundError, RequestError
from calotype.model.identity import Format
from calotype.model.snapshot import Manifest, StorageKind, StoragePart
from calotype.model.vm import Image


class DiskPlace(Struct, frozen=True):
    """Where the content of one disk is."""

    disk: str
    kind: StorageKind
    chain: tuple[Image, ...]
    """Top first: the image that holds the content, and what it stands on; none if skipped."""
    internal_id: str = ""
    internal_name: str = ""


class Places(Struct, frozen=True):
    """Where each part of a snapshot is."""

    disks: tuple[DiskPlace, ...]
    machine_state: str | None
    """The file that holds RAM and devices."""
    machine_state_type: str = ""


def places(manifest: Manifest, folder: str) -> Places:
    """Say where each part of a snapshot is.

    Args:
        manifest: The snapshot.
        folder: Where its own files are.
    """
    state = manifest.machine_state
    return Places(
        disks=tuple(_place(part) for part in manifest.storage),
        machine_state=f"{folder}/{state.file}" if state else None,
        machine_state_type=state.type if state else "",
    )


def _place(part: StoragePart) -> DiskPlace:
    if part.kind == "skip" or part.image is None:
        return DiskPlace(part.disk, "skip", ())
    below = tuple(Image(layer.path, layer.format) for layer in part.layers)
    top = (part.image,) if part.kind == "internal" else ()
    return DiskPlace(
        disk=part.disk,
        kind=part.kind,
        chain=top + below,
        internal_id=part.internal_id,
        internal_name=part.internal_name,
    )


class Extraction(Struct, frozen=True):
    """How the content of one disk is copied out."""

    part: StoragePart
    source: Image
    internal_name: str
    """The snapshot inside *source* that is meant; "" for all of it."""
    output: str
    format: Format

    @property
    def size_bytes(self) -> int:
        """The size of the disk, which the copy will have."""
        return self.part.virtual_size_bytes


def plan_extraction(
    manifest: Manifest,
    disk: str,
    output: str,
    format: Format,  # noqa: A002 - QEMU's own word
) -> Extraction:
    """Plan to copy one disk out of a snapshot.

    Args:
        manifest: The snapshot.
        disk: The disk's name, or the path of its device.
        output: The path of the new image.
        format: The format of the new image.

    Raises:
        RequestError: Two disks are called so.
        NotFoundError: No disk is called so, or the snapshot holds nothing of it.
    """
    part = _named(manifest, disk)
    if part.kind == "skip" or part.image is None:
        raise NotFoundError(
            f"the snapshot {manifest.id} holds nothing of disk {part.disk!r}: it was skipped",
            f"it holds: {_listed(manifest)}",
        )
    return Extraction(part, part.image, part.internal_name, output, format)


def _named(manifest: Manifest, disk: str) -> StoragePart:
    found = [part for part in manifest.storage if disk in {part.disk, part.qdev} - {""}]
    if not found:
        raise NotFoundError(
            f"the snapshot {manifest.id} has no disk {disk!r}", f"it holds: {_listed(manifest)}"
        )
    if len(found) > 1:
        raise RequestError(
            f"the snapshot {manifest.id} has {len(found)} disks called {disk!r}",
            f"name one by its device: {', '.join(part.qdev for part in found)}",
        )
    return found[0]


def _listed(manifest: Manifest) -> str:
    held = (part.disk or part.qdev for part in manifest.storage if part.kind != "skip")
    return ", ".join(held) or "no disk at all"

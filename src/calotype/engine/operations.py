"""The operations, each from beginning to end: READ THIS FIRST.

`take` is the pattern of all of them: observe what is there, let a pure function plan, refuse what
has blockers, and have `execute` run the plan's steps, which undoes what it began if any fails.

    observe -> plan -> prepare -> instant -> finish -> commit

What a step does stands in `take_effects.py` and `restore_effects.py`; what the steps are and in
which order, in `calotype.plan`.
"""

import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, cast

from msgspec.structs import replace

from calotype.engine import launch
from calotype.engine.execute import execute
from calotype.engine.progress import Progress, silent
from calotype.engine.restore_effects import RESTORE_EFFECTS, Restoring
from calotype.engine.take_effects import TAKE_EFFECTS, Taking
from calotype.errors import (
    BlockedError,
    ConflictError,
    HostError,
    MismatchError,
    QemuError,
    RequestError,
)
from calotype.formats import argv as command_line
from calotype.formats.argv import CommandLine, DiskArgument
from calotype.model import names
from calotype.model.identity import Format, Identity
from calotype.model.snapshot import Manifest
from calotype.model.vm import DiskRecord, Facts, Image, Process, VmRecord
from calotype.plan.restore import Definition, Found, RestorePlan, RestoreRequest, plan_restore
from calotype.plan.take import TakePlan, TakeRequest, plan_take
from calotype.qemu import observe, process
from calotype.qemu.monitor import Monitor
from calotype.store import images
from calotype.store.store import Store

# --- take ----------------------------------------------------------------------------------------


async def plan_only(store: Store, name: str, request: TakeRequest) -> TakePlan:
    """Say what `take` would do; nothing is changed."""
    record = store.find(name)
    qemu = _must_run(store, record)
    async with launch.looking(store, record) as monitor:
        _, plan = await _observe_and_plan(store, record, qemu, monitor, request)
    return plan


async def take(
    store: Store,
    name: str,
    request: TakeRequest,
    *,
    tag: str = "",
    description: str = "",
    progress: Progress = silent,
) -> Manifest:
    """Take a system snapshot of a running VM.

    Args:
        store: Where it is kept.
        name: The VM.
        request: What is to be part of it, and how.
        tag: The user's name for it; need not be unique.
        description: Free text.
        progress: Told how far it is.

    Returns:
        The manifest of the snapshot, which is durable by then.

    Raises:
        NotFoundError: There is no such VM.
        ConflictError: The VM does not run, or somebody else is changing it.
        BlockedError: The plan has blockers; nothing was changed.
        PauseLimitError: The pause grew too long; all was undone.
        QemuError: QEMU refused or failed; all was undone.
        HostError: A file could not be made or read; all was undone.
    """
    record = store.find(name)
    with store.locked(record):
        record = store.record(record.id)
        qemu = _must_run(store, record)
        async with launch.controlling(store, record) as monitor:
            facts, plan = await _observe_and_plan(store, record, qemu, monitor, request)
            if plan.blockers:
                raise _blocked(name, plan)
            definition = _definition(record)
            taking = Taking(
                store, record, monitor, qemu, facts, plan, definition, tag, description, progress
            )
            await execute(plan.steps, TAKE_EFFECTS, taking)
    assert taking.manifest is not None
    return taking.manifest


async def _observe_and_plan(
    store: Store, record: VmRecord, qemu: Process, monitor: Monitor, request: TakeRequest
) -> tuple[Facts, TakePlan]:
    facts = await observe.observe(monitor, record, qemu, store.root)
    return facts, plan_take(facts, record, request, secrets.token_hex(names.ID_LENGTH // 2))


def _blocked(name: str, plan: TakePlan) -> BlockedError:
    first, more = plan.blockers[0], len(plan.blockers) - 1
    also = f" (and {more} more: see --plan)" if more else ""
    return BlockedError(
        f"no snapshot of {name!r} can be taken: {first.problem}{also}",
        first.remedy,
        blockers=[[blocker.problem, blocker.remedy] for blocker in plan.blockers],
    )


def _must_run(store: Store, record: VmRecord) -> Process:
    qemu = launch.is_running(store, record)
    if qemu is None:
        raise ConflictError(
            f"the VM {record.name!r} does not run", f"`calotype start {record.name}`"
        )
    return qemu


# --- restore -------------------------------------------------------------------------------------


class Restored(NamedTuple):
    """What a restore did."""

    manifest: Manifest
    plan: RestorePlan
    restore_ms: float


async def restore(
    store: Store,
    name: str,
    snapshot: str,
    request: RestoreRequest,
    *,
    progress: Progress = silent,
) -> Restored:
    """Put a VM that does not run back to a snapshot, and let it run if it did then.

    Args:
        store: Where it is kept.
        name: The VM.
        snapshot: The snapshot's whole id.
        request: The run state wanted, and whether the present disks are kept.
        progress: Told how far it is.

    Raises:
        NotFoundError: There is no such VM.
        ConflictError: The VM runs, or somebody else is changing it.
        MismatchError: What is there is not what was recorded; nothing was changed.
        QemuError: QEMU did not start or could not load the state; all was undone.
    """
    record = store.find(name)
    with store.locked(record):
        record = store.record(record.id)
        _must_not_run(store, record)
        manifest = store.manifest(record.id, snapshot)
        definition = _definition(record)
        found = _look_around(store, record, manifest, definition)
        left_behind = secrets.token_hex(names.ID_LENGTH // 2)
        plan = plan_restore(manifest, record, found, request, left_behind)
        if plan.mismatches:
            raise _mismatched(manifest, plan)
        restoring = Restoring(store, record, manifest, plan, definition, progress)
        await execute(plan.steps, RESTORE_EFFECTS, restoring)
    return Restored(manifest, plan, sum(restoring.phases_ms.values()))


def _look_around(
    store: Store, record: VmRecord, manifest: Manifest, definition: Definition
) -> Found:
    """Read what a preflight compares: identities and tables, no contents."""
    parts = [part for part in manifest.storage if part.image is not None]
    layers = [layer for part in parts for layer in part.layers]
    identities: dict[str, Identity] = {}
    for layer in layers:
        if Path(layer.path).exists():
            identities[layer.path] = images.identify(Path(layer.path), layer.format)
    internal = {
        (part.image.path, entry.name): entry.digest
        for part in parts
        if part.kind == "internal" and part.image and Path(part.image.path).exists()
        for entry in images.read_metadata(Path(part.image.path)).snapshots
    }
    state = manifest.machine_state
    state_path = store.snapshot_folder(record.id, manifest.id) / (state.file if state else "")
    active = [disk.active.path for disk in record.disks]
    return Found(
        definition=definition,
        identities=identities,
        internal=internal,
        state=images.identify(state_path, "raw") if state and state_path.exists() else None,
        modes={path: images.mode(Path(path)) for path in active if Path(path).exists()},
        kept_paths=frozenset(
            path
            for other in store.manifests(record.id)
            for part in other.storage
            for path in (*(layer.path for layer in part.layers), part.image and part.image.path)
            if path
        ),
    )


def _mismatched(manifest: Manifest, plan: RestorePlan) -> MismatchError:
    is_touched = all(mismatch.kind == "touched" for mismatch in plan.mismatches)
    return MismatchError(
        f"{manifest.vm_name!r} cannot be restored to {manifest.id}: "
        + "; ".join(mismatch.text for mismatch in plan.mismatches),
        "if that was you, and you wrote nothing to it, give --accept-touched"
        if is_touched
        else "put back what is named here; nothing was changed",
        mismatches=[
            {"kind": mismatch.kind, "subject": mismatch.subject, "text": mismatch.text}
            for mismatch in plan.mismatches
        ],
    )


def _must_not_run(store: Store, record: VmRecord) -> None:
    if launch.is_running(store, record):
        raise ConflictError(f"the VM {record.name!r} runs", f"`calotype stop {record.name}` first")


# --- run, start, stop, forget --------------------------------------------------------------------


async def run(store: Store, name: str, argv: tuple[str, ...], cwd: str) -> VmRecord:
    """Define a VM by QEMU's command line, and start it.

    A VM of that name that does not run is defined anew; a disk that it had keeps its newest
    content, whatever image the command line names for it.

    Raises:
        CommandLineError: The command line holds something that cannot be stood for.
        ConflictError: A VM of that name runs, or an image belongs to another VM.
        HostError: An image is missing.
        QemuError: QEMU did not start.
    """
    _check_name(name)
    command = CommandLine.parse(argv)
    before = store.find(name) if store.index.vm_named(name) else None
    if before is not None:
        _must_not_run(store, before)
    record = VmRecord(
        id=before.id if before else secrets.token_hex(names.ID_LENGTH // 2),
        name=name,
        argv=argv,
        cwd=cwd,
        disks=tuple(_define_disks(store, before, command, cwd)),
        created=before.created if before else datetime.now(UTC).isoformat(),
        parent=before.parent if before else None,
    )
    store.make_vm_folder(record.id)
    try:
        with store.locked(record):
            return await _start(store, record)
    except BaseException:
        if before is None:
            store.drop(record)
        raise


def _check_name(name: str) -> None:
    if not name or not name.isprintable() or name.startswith("-"):
        raise RequestError(f"{name!r} cannot name a VM", "use printable characters, no '-' first")


def _define_disks(
    store: Store, before: VmRecord | None, command: CommandLine, cwd: str
) -> list[DiskRecord]:
    """The writable disks of a command line, on the images with their newest content."""
    known = {disk.origin.path: disk for disk in before.disks} if before else {}
    taken = _images_of_others(store, before)
    disks = []
    for disk in command_line.disks(command, cwd):
        if disk.read_only:
            continue
        path = str(Path(disk.path).resolve())
        if path in taken:
            raise ConflictError(
                f"{path} belongs to {taken[path]}", "give each VM images of its own", path=path
            )
        origin = Image(path, _format(disk, path, known))
        active = known[path].active if path in known else origin
        disks.append(DiskRecord(disk.index, disk.name, origin, active))
    return disks


def _format(disk: DiskArgument, path: str, known: dict[str, DiskRecord]) -> Format:
    """The format that the user gave; else the one found when the disk was first seen."""
    if disk.format:
        return cast("Format", disk.format)
    return known[path].origin.format if path in known else images.probe_format(Path(path))


def _images_of_others(store: Store, before: VmRecord | None) -> dict[str, str]:
    """Each image that another VM stands on, with words that say which."""
    own_id = before.id if before else ""
    others = [(record, "the VM") for record in store.records() if record.id != own_id]
    others += [(record, "the forgotten VM") for record in store.forgotten()]
    return {
        path: f"{word} {record.name!r}, whose newest content is in {disk.active.path}"
        for record, word in others
        for disk in record.disks
        for path in (disk.origin.path, disk.active.path)
        if disk.active != disk.origin or word == "the VM"
    }


async def start(store: Store, name: str) -> VmRecord:
    """Start a VM that does not run, from the images with its newest content.

    Raises:
        ConflictError: It runs already.
        QemuError: QEMU did not start.
    """
    record = store.find(name)
    with store.locked(record):
        record = store.record(record.id)
        _must_not_run(store, record)
        return await _start(store, record)


async def _start(store: Store, record: VmRecord) -> VmRecord:
    active = {disk.index: disk.active for disk in record.disks}
    for image in active.values():
        if not Path(image.path).exists():
            raise HostError(f"{image.path} is missing", "put the image back", path=image.path)
    qemu = await launch.start(store, record, active)
    try:
        async with launch.controlling(store, record) as monitor:
            named = await observe.name_disks(monitor, record.disks)
            topology = await observe.observe_topology(monitor)
            record = replace(record, disks=named, topology=topology)
            store.save(record)
            if not CommandLine.parse(record.argv).has("S"):
                await monitor.execute("cont")
    except BaseException:
        process.kill(qemu)
        await process.ended(qemu, 10.0)
        raise
    return record


async def stop(store: Store, name: str, *, now: bool = False, timeout_s: float = 60.0) -> None:
    """Stop a VM: press its power button and wait, or end it at once.

    Args:
        store: Where it is kept.
        name: The VM.
        now: Do not ask the guest; QEMU flushes its images and ends.
        timeout_s: How long the guest may take.

    Raises:
        ConflictError: It does not run, or the guest did not power off in time.
    """
    record = store.find(name)
    with store.locked(record):
        qemu = _must_run(store, record)
        if now:
            await _end(store, record, qemu)
            return
        async with launch.controlling(store, record) as monitor:
            await monitor.execute("system_powerdown")
        if not await process.ended(qemu, timeout_s):
            raise ConflictError(
                f"the guest of {name!r} did not power off within {timeout_s:g} s",
                f"`calotype stop --now {name}` ends it at once",
            )


async def _end(store: Store, record: VmRecord, qemu: Process) -> None:
    """End QEMU: by its monitor, and one that does not answer by its pid."""
    try:
        async with launch.controlling(store, record) as monitor:
            await monitor.execute("quit")
    except (QemuError, ConflictError):
        process.kill(qemu)
    if not await process.ended(qemu, 30.0):
        process.kill(qemu)
        await process.ended(qemu, 10.0)


def forget(store: Store, name: str) -> tuple[VmRecord, Path, list[Manifest]]:
    """Take a VM that does not run out of the catalogue; all its files stay.

    Returns:
        The record, the folder that its files are in now, and the snapshots in it.

    Raises:
        ConflictError: It runs.
    """
    record = store.find(name)
    with store.locked(record):
        _must_not_run(store, record)
        manifests = store.manifests(record.id)
        return record, store.forget(record), manifests


def _definition(record: VmRecord) -> Definition:
    return command_line.definition(CommandLine.parse(record.argv), record.cwd)

"""What each step of a restore does to the world, and what undoes it.

The VM does not run when a restore begins, and until the very last step its guest does not run
either: so everything up to there is undone by ending the new QEMU and removing what was made.
"""

import asyncio
import os
from datetime import UTC, datetime
from pathlib import Path

from msgspec.structs import replace

from calotype.engine import launch
from calotype.engine.execute import Effect, Effects
from calotype.engine.progress import Progress
from calotype.errors import MismatchError, QemuError
from calotype.model import names
from calotype.model.snapshot import Manifest
from calotype.model.vm import Image, ImageFacts, Process, VmRecord
from calotype.plan.compose import Outcome, compose_left_behind
from calotype.plan.restore import Definition, RestorePlan
from calotype.plan.steps import (
    ApplyInside,
    CheckTopology,
    Commit,
    CreateOverlay,
    DiscardImages,
    ExtractInside,
    FreezeImages,
    LetRun,
    LoadState,
    MakeSnapshotFolder,
    RecordNow,
    StartQemu,
)
from calotype.qemu import image_tool, migration, observe, process
from calotype.store import images
from calotype.store.store import Store


class Restoring:
    """A restore under way: what it acts on, and what came out of it so far."""

    def __init__(
        self,
        store: Store,
        record: VmRecord,
        manifest: Manifest,
        plan: RestorePlan,
        definition: Definition,
        progress: Progress,
    ) -> None:
        self.store = store
        self.record = record
        self.manifest = manifest
        self.plan = plan
        self.definition = definition
        self.progress = progress
        self.began = asyncio.get_running_loop().time()
        self.phases_ms: dict[str, float] = {}
        self.qemu: Process | None = None
        self.log_mark = launch.log_size(store.folder(record.id))


# --- disks ---------------------------------------------------------------------------------------


async def _create_overlay(_: Restoring, step: CreateOverlay) -> None:
    await image_tool.create_overlay(step.overlay, step.backing, step.size_bytes)


async def _remove_overlay(_: Restoring, step: CreateOverlay) -> None:
    Path(step.overlay).unlink(missing_ok=True)


async def _apply_inside(_: Restoring, step: ApplyInside) -> None:
    await image_tool.snapshot_inside(step.image, step.keep_as)
    await image_tool.apply_inside(step.image, step.internal_name)


async def _unapply_inside(_: Restoring, step: ApplyInside) -> None:
    metadata = await asyncio.to_thread(images.read_metadata, Path(step.image.path))
    if step.keep_as in {entry.name for entry in metadata.snapshots}:
        await image_tool.apply_inside(step.image, step.keep_as)
        await image_tool.delete_inside(step.image, step.keep_as)


async def _extract_inside(_: Restoring, step: ExtractInside) -> None:
    await image_tool.extract_inside(step.image, step.internal_name, step.copy)


async def _remove_copy(_: Restoring, step: ExtractInside) -> None:
    Path(step.copy).unlink(missing_ok=True)


# --- machine -------------------------------------------------------------------------------------


async def _start_qemu(restoring: Restoring, step: StartQemu) -> None:
    restoring.progress("starting", 0, 0)
    restoring.qemu = await launch.start(
        restoring.store,
        restoring.record,
        step.active,
        machine=step.machine,
        incoming=step.incoming,
    )


async def _end_qemu(restoring: Restoring, _: StartQemu) -> None:
    qemu = restoring.qemu or launch.is_running(restoring.store, restoring.record)
    if qemu is not None:
        process.kill(qemu)
        await process.ended(qemu, 10.0)


async def _check_topology(restoring: Restoring, step: CheckTopology) -> None:
    """Refuse a machine that is not the one whose state would be loaded into it."""
    async with launch.controlling(restoring.store, restoring.record) as monitor:
        found = await observe.observe_topology(monitor)
    for field in found.__struct_fields__:
        then, now = getattr(step.expected, field), getattr(found, field)
        if then != now:
            raise MismatchError(
                f"the machine's {field} is {now!r}, the snapshot has {then!r}",
                "define the VM as it was: `calotype show` prints its command line",
                field=field,
                snapshot=then,
                now=now,
            )


async def _load_state(restoring: Restoring, step: LoadState) -> None:
    """Feed the machine state to QEMU; one that cannot take it ends, and its log says why."""
    folder = restoring.store.snapshot_folder(restoring.record.id, step.snapshot)
    descriptor = os.open(folder / step.file, os.O_RDONLY | os.O_CLOEXEC)
    restoring.progress("loading", 0, os.fstat(descriptor).st_size)
    try:
        async with launch.controlling(restoring.store, restoring.record) as monitor:
            await migration.load(monitor, descriptor, names.state_descriptor(step.snapshot))
    except QemuError as error:
        said = launch.last_words(restoring.store.folder(restoring.record.id), restoring.log_mark)
        raise QemuError(
            f"QEMU cannot load the machine state: {said or error.problem}", "", qemu=said
        ) from error
    finally:
        os.close(descriptor)


async def _let_run(restoring: Restoring, _: LetRun) -> None:
    async with launch.controlling(restoring.store, restoring.record) as monitor:
        await monitor.execute("cont")
        status = await monitor.execute("query-status")
    if not status["running"]:
        raise QemuError(f"the guest does not run: it is {status['status']!r}")


# --- what is left behind -------------------------------------------------------------------------


async def _make_folder(restoring: Restoring, step: MakeSnapshotFolder) -> None:
    restoring.store.make_snapshot_folder(restoring.record.id, step.snapshot)


async def _remove_folder(restoring: Restoring, step: MakeSnapshotFolder) -> None:
    restoring.store.remove_snapshot_folder(restoring.record.id, step.snapshot)


async def _freeze_images(_: Restoring, step: FreezeImages) -> None:
    for path in step.modes_before:
        await asyncio.to_thread(images.freeze, Path(path))


async def _thaw_images(_: Restoring, step: FreezeImages) -> None:
    for path, mode in step.modes_before.items():
        images.thaw(Path(path), images.Frozen(mode, immutable=True))


async def _commit_left_behind(restoring: Restoring, step: Commit) -> None:
    record = restoring.record
    now = asyncio.get_running_loop().time()
    outcome = Outcome(
        instant=datetime.now(UTC).isoformat(),
        stop_us=None,
        resume_us=None,
        machine_state=None,
        chains={disk.index: await _chain(disk.active) for disk in record.disks},
        internal=await asyncio.to_thread(_find_internal, record, step.snapshot),
        total_ms=(now - restoring.began) * 1000,
        phases_ms=restoring.phases_ms,
    )
    left = compose_left_behind(
        step.snapshot,
        restoring.manifest,
        record,
        restoring.definition,
        restoring.plan.active,
        outcome,
    )
    restoring.store.commit(left)


async def _chain(image: Image) -> tuple[ImageFacts, ...]:
    return await asyncio.to_thread(lambda: tuple(observe.image_chain(image)))


def _find_internal(record: VmRecord, snapshot: str) -> dict[int, tuple[str, str]]:
    return {
        disk.index: (entry.id, entry.digest)
        for disk in record.disks
        if disk.active.format == "qcow2"
        for entry in images.read_metadata(Path(disk.active.path)).snapshots
        if entry.name == names.internal_name(snapshot)
    }


async def _revoke_left_behind(restoring: Restoring, step: Commit) -> None:
    restoring.store.revoke(restoring.record.id, step.snapshot)


async def _record_now(restoring: Restoring, step: RecordNow) -> None:
    _record(restoring, step.active, step.parent)


async def _record_before(restoring: Restoring, step: RecordNow) -> None:
    _record(restoring, step.active_before, step.parent_before)


def _record(restoring: Restoring, active: dict[int, Image], parent: str | None) -> None:
    record = restoring.record
    disks = tuple(replace(disk, active=active[disk.index]) for disk in record.disks)
    restoring.store.save(replace(record, disks=disks, parent=parent))


async def _discard_images(restoring: Restoring, step: DiscardImages) -> None:
    for path in step.paths:
        Path(path).unlink(missing_ok=True)
    for image, name in step.inside:
        if restoring.qemu is None:
            await image_tool.delete_inside(image, name)
        else:
            async with launch.controlling(restoring.store, restoring.record) as monitor:
                await observe.delete_inside(monitor, image, name)


RESTORE_EFFECTS: Effects = {
    CreateOverlay: Effect(_create_overlay, _remove_overlay),
    ApplyInside: Effect(_apply_inside, _unapply_inside),
    ExtractInside: Effect(_extract_inside, _remove_copy),
    StartQemu: Effect(_start_qemu, _end_qemu),
    CheckTopology: Effect(_check_topology),
    LoadState: Effect(_load_state),
    MakeSnapshotFolder: Effect(_make_folder, _remove_folder),
    FreezeImages: Effect(_freeze_images, _thaw_images),
    Commit: Effect(_commit_left_behind, _revoke_left_behind),
    RecordNow: Effect(_record_now, _record_before),
    LetRun: Effect(_let_run),
    DiscardImages: Effect(_discard_images),
}

"""What the steps of a start and of a restore do, and what undoes them.

Until the very last step the guest of the QEMU that is started does not run: so everything up to
there is undone by ending it and removing what was made. Where another QEMU runs the VM meanwhile,
that last step is a handover (`handover_effects.py`).
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

from msgspec.structs import replace

from calotype.engine import launch
from calotype.engine.agent_effects import set_clock
from calotype.engine.disk_effects import chain_of
from calotype.engine.handover_effects import LEFT_STATE
from calotype.engine.progress import Progress
from calotype.engine.world import Effect, Effects, World
from calotype.errors import MismatchError, QemuError
from calotype.formats import argv as command_line
from calotype.formats.argv import CommandLine
from calotype.model import names
from calotype.model.acts import NEXT
from calotype.model.snapshot import MachineStatePart, Manifest
from calotype.model.vm import Process, VmRecord
from calotype.plan.compose import Outcome, compose_left_behind
from calotype.plan.restore_plan import RestorePlan
from calotype.plan.steps import (
    ApplyInside,
    CheckTopology,
    CommitLeftBehind,
    Define,
    ExtractInside,
    LetRun,
    LoadState,
    RecordStarted,
    SetClock,
    StartQemu,
)
from calotype.qemu import image_tool, migration, observe, process
from calotype.qemu.monitor import Monitor
from calotype.store import images
from calotype.store.store import Store


class Restoring(World):
    """A restore under way: what it acts on, and what came out of it so far."""

    def __init__(
        self,
        store: Store,
        record: VmRecord,
        manifest: Manifest,
        plan: RestorePlan,
        progress: Progress,
        running: Process | None = None,
    ) -> None:
        super().__init__(store, record, running, progress)
        self.manifest = manifest
        self.plan = plan
        self.log_mark = launch.log_size(store.folder(record.id))

    @contextlib.asynccontextmanager
    async def preparing(self) -> AsyncIterator[Monitor]:
        """A connection to the QEMU that is prepared: the VM's own, or the one beside it."""
        is_beside = self.began_with is not None
        async with launch.controlling(self.store, self.record, beside=is_beside) as monitor:
            yield monitor


# --- disks ---------------------------------------------------------------------------------------


async def _apply_inside(_: World, step: ApplyInside) -> None:
    await image_tool.snapshot_inside(step.image, step.keep_as)
    await image_tool.apply_inside(step.image, step.internal_name)


async def _unapply_inside(_: World, step: ApplyInside) -> None:
    """Go back to the content that was kept; a qemu-img that was killed may have left leaks."""
    await image_tool.mend(step.image)
    metadata = await asyncio.to_thread(images.read_metadata, Path(step.image.path))
    if step.keep_as in {entry.name for entry in metadata.snapshots}:
        await image_tool.apply_inside(step.image, step.keep_as)
        await image_tool.delete_inside(step.image, step.keep_as)


async def _extract_inside(_: World, step: ExtractInside) -> None:
    await image_tool.extract_inside(step.image, step.internal_name, step.copy)


async def _remove_copy(_: World, step: ExtractInside) -> None:
    Path(step.copy).unlink(missing_ok=True)


# --- machine -------------------------------------------------------------------------------------


async def _start_qemu(world: World, step: StartQemu) -> None:
    world.progress("starting", 0, 0)
    await launch.start(
        world.store,
        world.record,
        step.active,
        machine=step.machine,
        incoming=step.incoming,
        beside=step.beside,
    )


async def _end_qemu(world: World, step: StartQemu) -> None:
    """End the QEMU that was started, also one that nobody had the time to write down.

    One that was adopted meanwhile is no work of ours.
    """
    runs = world.qemu
    recorded = {runs} if runs is not None and not runs.monitor and not step.beside else set()
    for qemu in {*recorded, *process.find(launch.MARK, world.record.id)} - {world.began_with}:
        await process.end(qemu)
    for path in (*map(Path, step.sockets), *world.store.folder(world.record.id).glob(f"*{NEXT}")):
        path.unlink(missing_ok=True)


async def _define(world: World, step: Define) -> None:
    world.store.save(step.record)


async def _define_as_before(world: World, step: Define) -> None:
    if step.before is not None:
        world.store.save(step.before)


async def _record_started(world: World, _: RecordStarted) -> None:
    record = world.store.record(world.record.id)
    async with world.controlling() as monitor:
        named = await observe.name_disks(monitor, record.disks)
        topology = await observe.observe_topology(monitor)
    world.store.save(replace(record, disks=named, topology=topology))


async def _record_before_start(world: World, step: RecordStarted) -> None:
    record = world.store.record(world.record.id)
    world.store.save(replace(record, disks=step.disks_before, topology=step.topology_before))


async def _check_topology(restoring: Restoring, step: CheckTopology) -> None:
    """Refuse a machine that is not the one whose state would be loaded into it."""
    async with restoring.preparing() as monitor:
        found = await observe.observe_topology(monitor)
    for field in found.__struct_fields__:
        then, now = getattr(step.expected, field), getattr(found, field)
        if then != now:
            raise MismatchError(
                f"the machine's {field} is {now!r}, the snapshot has {then!r}",
                "define the VM as it was: `calotype show NAME` prints its command line",
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
        async with restoring.preparing() as monitor:
            await migration.load(monitor, descriptor, names.state_descriptor(step.snapshot))
    except QemuError as error:
        record = restoring.record
        said = launch.last_words(restoring.store.folder(record.id), record, restoring.log_mark)
        raise QemuError(
            f"QEMU cannot load the machine state: {said or error.problem}",
            "it was saved by another QEMU, or damaged: compare versions and digests",
            qemu=said,
        ) from error
    finally:
        os.close(descriptor)


async def _let_run(world: World, _: LetRun) -> None:
    async with world.controlling() as monitor:
        await monitor.execute("cont")
        world.let_run_at = datetime.now(UTC)
        status = await monitor.execute("query-status")
    if not status["running"]:
        raise QemuError(f"the guest does not run: it is {status['status']!r}", "see its log")


# --- what is left behind -------------------------------------------------------------------------


async def _commit_left_behind(world: World, step: CommitLeftBehind) -> None:
    now = asyncio.get_running_loop().time()
    outcome = Outcome(
        instant=datetime.now(UTC).isoformat(),
        stop_us=None,
        resume_us=None,
        machine_state=await asyncio.to_thread(_left_state, world, step.snapshot),
        chains={index: await chain_of(image) for index, image in step.active_before.items()},
        internal=await asyncio.to_thread(_find_internal, step),
        total_ms=(now - world.began) * 1000,
        phases_ms=world.phases_ms,
    )
    restored = world.store.manifest(world.record.id, step.restored)
    definition = command_line.definition(CommandLine.parse(world.record.argv), world.record.cwd)
    world.store.commit(compose_left_behind(step, restored, world.record, definition, outcome))


def _left_state(world: World, snapshot: str) -> MachineStatePart | None:
    """The machine state that was saved of what is left behind, if it was."""
    path = world.store.snapshot_folder(world.record.id, snapshot) / LEFT_STATE
    if not path.exists():
        return None
    return MachineStatePart(LEFT_STATE, images.identify(path, "raw"), images.digest(path))


def _find_internal(step: CommitLeftBehind) -> dict[int, tuple[str, str]]:
    return {
        index: (entry.id, entry.digest)
        for index, image in step.active_before.items()
        if image.format == "qcow2"
        for entry in images.read_metadata(Path(image.path)).snapshots
        if entry.name == names.internal_name(step.snapshot)
    }


async def _revoke_left_behind(world: World, step: CommitLeftBehind) -> None:
    world.store.drop_snapshot(world.record.id, step.snapshot)


RESTORE_EFFECTS: Effects = {
    ApplyInside: Effect(_apply_inside, _unapply_inside),
    ExtractInside: Effect(_extract_inside, _remove_copy),
    Define: Effect(_define, _define_as_before),
    StartQemu: Effect(_start_qemu, _end_qemu),
    RecordStarted: Effect(_record_started, _record_before_start),
    CheckTopology: Effect(_check_topology),
    LoadState: Effect(_load_state),
    CommitLeftBehind: Effect(_commit_left_behind, _revoke_left_behind),
    LetRun: Effect(_let_run),
    SetClock: Effect(set_clock),
}

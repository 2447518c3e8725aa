"""What the steps of a take do to a running VM, and what undoes them.

One function for each, and one table at the end. What undoes a step asks QEMU and the files what
is there, because it also runs for a step that was cut off half-way, and for one whose process is
dead. Undoing the instant is the longest and stands in `abandon_effects.py`.
"""

import asyncio
import contextlib
import os
import shlex
from datetime import UTC, datetime
from pathlib import Path

from calotype.engine import launch
from calotype.engine.abandon_effects import abandon_instant
from calotype.engine.agent_effects import freeze, thaw
from calotype.engine.disk_effects import chain_of
from calotype.engine.progress import Progress
from calotype.engine.world import Effect, Effects, World
from calotype.errors import ConflictError, HostError, PauseLimitError, QemuError
from calotype.model import names
from calotype.model.snapshot import MachineStatePart, Manifest, Quiesced
from calotype.model.vm import Facts, Process, VmRecord
from calotype.plan.compose import Outcome, compose_taken
from calotype.plan.restore_plan import Definition
from calotype.plan.steps import (
    AwaitSave,
    CloseState,
    Commit,
    FlushImages,
    FreezeFileSystems,
    OpenOverlay,
    OpenState,
    PassInstant,
    PutBackMigration,
    SetMigration,
    ThawFileSystems,
    qmp_action,
)
from calotype.plan.take_plan import TakePlan
from calotype.plan.window import Accepted, Failed, Window
from calotype.qemu import migration, observe, process
from calotype.qemu.monitor import CommandRefused, Monitor
from calotype.qemu.passing import pass_through
from calotype.store import files, images
from calotype.store.store import Store

STATE_FILE = "machine-state"
INSTANT = "saving"
"""The phase that progress is told of when the instant has passed: all its parts are of one time."""
FLUSH_ROUNDS = 3
FLUSHED_MS = 10.0
DYING_S = 1.0
"""How long a QEMU that does not answer before the pause is given to turn out to be dead."""


class Taking(World):
    """A take under way: what it acts on, and what came out of it so far."""

    def __init__(
        self,
        store: Store,
        record: VmRecord,
        monitor: Monitor,
        qemu: Process,
        facts: Facts,
        plan: TakePlan,
        definition: Definition,
        tag: str,
        description: str,
        progress: Progress,
    ) -> None:
        super().__init__(store, record, qemu, progress, monitor)
        self.monitor = monitor
        self.pid = qemu.pid
        self.is_settled = True
        self.facts = facts
        self.plan = plan
        self.definition = definition
        self.tag = tag
        self.description = description
        self.accepted = Accepted(None, None)
        self.instant = datetime.now(UTC)
        self.machine_state: MachineStatePart | None = None
        self.quiesced: Quiesced | None = None
        self.manifest: Manifest | None = None

    @property
    def folder(self) -> Path:
        """The snapshot's own folder."""
        return self.store.snapshot_folder(self.record.id, self.plan.snapshot)


# --- prepare -------------------------------------------------------------------------------------


async def _open_overlay(taking: Taking, step: OpenOverlay) -> None:
    await taking.monitor.send(
        "blockdev-add",
        {
            "driver": "qcow2",
            "node-name": step.node,
            "file": {"driver": "file", "filename": step.overlay, "cache": _cache(step)},
            "cache": _cache(step),
            "backing": None,
            "discard": "unmap",
            "detect-zeroes": step.detect_zeroes,
        },
    )


def _cache(step: OpenOverlay) -> dict[str, bool]:
    return {"direct": step.cache_direct, "no-flush": step.cache_no_flush}


async def _close_overlay(world: World, step: OpenOverlay) -> None:
    if world.qemu is None:
        return
    async with world.controlling() as monitor:
        nodes = await monitor.execute("query-named-block-nodes", flat=True)
        if step.node in {node["node-name"] for node in nodes}:
            await monitor.execute("blockdev-del", node_name=step.node)


async def _open_state(taking: Taking, step: OpenState) -> None:
    descriptor = files.create_private(taking.folder / STATE_FILE)
    try:
        if step.fdset:
            opaque = names.state_descriptor(step.snapshot)
            await taking.monitor.add_file(descriptor, step.fdset, opaque)
        else:
            await taking.monitor.get_file(descriptor, names.state_descriptor(step.snapshot))
    finally:
        os.close(descriptor)


async def _drop_state(world: World, step: OpenState) -> None:
    _state_path(world, step.snapshot).unlink(missing_ok=True)
    if world.qemu is not None:
        async with world.controlling() as monitor:
            await _let_go_of_state(monitor, step.snapshot, step.fdset)


def _state_path(world: World, snapshot: str) -> Path:
    return world.store.snapshot_folder(world.record.id, snapshot) / STATE_FILE


async def _let_go_of_state(monitor: Monitor, snapshot: str, fdset: int) -> None:
    with contextlib.suppress(CommandRefused):  # it is not there: QEMU let go of it by itself
        if fdset:
            await monitor.execute("remove-fd", fdset_id=fdset)
        else:
            await monitor.execute("closefd", fdname=names.state_descriptor(snapshot))


async def _set_migration(taking: Taking, step: SetMigration) -> None:
    await migration.configure(taking.monitor, step.capabilities, step.parameters)


async def _unset_migration(world: World, step: SetMigration) -> None:
    """Put the settings back, if this still is the QEMU that they were made in."""
    if world.qemu is not None and world.qemu == world.began_with:
        async with world.controlling() as monitor:
            await migration.configure(monitor, step.capabilities_before, step.parameters_before)


async def _put_back_migration(taking: Taking, step: PutBackMigration) -> None:
    await migration.configure(taking.monitor, step.capabilities, step.parameters)


async def _flush_images(_: Taking, step: FlushImages) -> None:
    """Flush until a round takes under 10 ms, three times at the most: `stop` flushes the rest."""
    for _round in range(FLUSH_ROUNDS):
        spent_ms = [await asyncio.to_thread(images.sync_data, Path(path)) for path in step.paths]
        if sum(spent_ms) < FLUSHED_MS:
            return


# --- instant -------------------------------------------------------------------------------------


async def _pass_instant(taking: Taking, step: PassInstant) -> None:
    """Go through the paused window, unless the block graph is not what was planned for."""
    uri = f"file:/dev/fdset/{step.fdset}" if step.fdset else _fd_uri(taking.plan.snapshot)
    window = Window(
        step.method,
        was_running=step.was_running,
        migrate={"uri": uri},
        actions=[qmp_action(action) for action in step.actions],
        limit_ms=step.limit_ms,
        properties=step.properties,
    )
    try:
        end = await _guarded(taking, step, window)
    except (HostError, QemuError) as error:
        if taking.began_with and await process.ended(taking.began_with, DYING_S):
            raise _death(taking.record, error.problem) from error
        raise
    taking.is_settled = isinstance(end, Accepted) or end.settled
    if isinstance(end, Failed):
        raise _death(taking.record, end.reason) if taking.qemu is None else _window_error(end)
    taking.accepted = end
    taking.progress(INSTANT, 0, 0)
    stamp = end.stop_us
    taking.instant = datetime.fromtimestamp(stamp / 1e6, UTC) if stamp else datetime.now(UTC)


async def _guarded(taking: Taking, step: PassInstant, window: Window) -> Accepted | Failed:
    """Pass through the window, a guard standing by to end the pause should we not live to do it."""
    if not step.was_running or step.method == "storage-only":  # nothing is paused by us
        await _compare_graph(taking, step)
        return await pass_through(window, taking.monitor)
    forgetful = taking.pid if step.method == "live-storage-first" else None
    async with launch.guarded(taking.store, taking.record, taking.monitor) as guard:
        await guard.arm(step.limit_ms / 1000, forgetful=forgetful)
        try:
            await _compare_graph(taking, step)
        except BaseException:
            await guard.stand_down()
            raise
        taking.is_settled = False
        end = await pass_through(window, taking.monitor, forgetful)
        if isinstance(end, Accepted) or end.settled:
            is_overruled = not await guard.stand_down()
        else:
            is_overruled = taking.monitor.is_handed_over
            taking.monitor.is_silent = True
    if is_overruled:
        return Failed(_OVERRULED, limit=True, settled=False)
    return end


_OVERRULED = "the pause reached its limit, and the guard has ended it"


async def _compare_graph(taking: Taking, step: PassInstant) -> None:
    opened = {each.node for each in taking.plan.steps if isinstance(each, OpenOverlay)}
    if await observe.observe_graph_digest(taking.monitor, opened) != step.graph_digest:
        raise ConflictError("the VM's disks changed while the snapshot was prepared", "try again")


def _fd_uri(snapshot: str) -> str:
    return f"fd:{names.state_descriptor(snapshot)}"


def _death(record: VmRecord, seen: str) -> QemuError:
    """What is said where there is no QEMU any more, whatever was *seen* of that."""
    return QemuError(
        f"no snapshot was taken: QEMU has died ({seen})",
        f"`calotype start {shlex.quote(record.name)}` starts it again",
    )


async def _thaw(taking: Taking, _: ThawFileSystems) -> None:
    """Thaw right after the instant; it was quiesced if all had stayed frozen until now."""
    held = taking.freeze
    assert held is not None
    thawed = await held.thaw()
    taking.freeze, taking.is_thawed = None, True
    if thawed != held.count:
        raise QemuError(
            f"of the guest's {held.count} frozen file systems {thawed} were still frozen when the"
            " snapshot had been taken: somebody else had thawed them",
            "see who in the guest does that, and try again",
        )
    agent = taking.facts.agent
    taking.quiesced = Quiesced(held.count, held.frozen_ms, agent.version if agent else "")


def _window_error(failed: Failed) -> QemuError | PauseLimitError:
    after = "the guest runs as before" if failed.settled else "QEMU did not confirm the run state"
    if failed.limit:
        return PauseLimitError(
            f"{failed.reason}; {after}", "raise --pause-limit", settled=failed.settled
        )
    return QemuError(
        f"no snapshot was taken: {failed.reason}; {after}",
        "try again; `calotype take NAME --plan` tells what is in the way",
        settled=failed.settled,
    )


# --- finish --------------------------------------------------------------------------------------


async def _await_save(taking: Taking, step: AwaitSave) -> None:
    """Wait until the machine state is written; the guest runs."""
    await migration.saved(
        taking.monitor,
        lambda done_bytes: taking.progress("saving", done_bytes, step.expected_bytes),
    )


async def _give_room_back(world: World, step: AwaitSave) -> None:
    """Empty the state's file: where it has filled the store, nothing else could be recorded."""
    with contextlib.suppress(FileNotFoundError):
        os.truncate(_state_path(world, step.snapshot), 0)


async def _close_state(taking: Taking, step: CloseState) -> None:
    """Make the machine state durable and take its digest."""
    await _let_go_of_state(taking.monitor, step.snapshot, step.fdset)
    path = taking.folder / STATE_FILE
    await asyncio.to_thread(images.sync_data, path)
    taking.machine_state = MachineStatePart(
        file=STATE_FILE,
        digest=await asyncio.to_thread(images.digest, path),
        identity=images.identify(path, "raw"),
    )


async def _commit(taking: Taking, _: Commit) -> None:
    """Look at the parts once more as they are now for good, and write the manifest."""
    now = asyncio.get_running_loop().time()
    outcome = Outcome(
        instant=taking.instant.isoformat(),
        stop_us=taking.accepted.stop_us,
        resume_us=taking.accepted.resume_us,
        machine_state=taking.machine_state,
        chains={disk.index: await chain_of(disk.image) for disk in taking.facts.disks},
        internal=await asyncio.to_thread(find_internal, taking.facts, taking.plan),
        total_ms=(now - taking.began) * 1000,
        phases_ms=taking.phases_ms,
        quiesced=taking.quiesced,
    )
    taking.manifest = compose_taken(
        taking.plan,
        taking.facts,
        taking.record,
        taking.definition,
        taking.tag,
        taking.description,
        outcome,
    )
    taking.store.commit(taking.manifest)


def find_internal(facts: Facts, plan: TakePlan) -> dict[int, tuple[str, str]]:
    """Id and digest of each internal snapshot that *plan* makes, by disk index."""
    made = {disk.index: disk.internal_name for disk in plan.disks if disk.kind == "internal"}
    return {
        disk.index: (entry.id, entry.digest)
        for disk in facts.disks
        if disk.index in made
        for entry in images.read_metadata(Path(disk.image.path)).snapshots
        if entry.name == made[disk.index]
    }


async def _revoke(world: World, step: Commit) -> None:
    world.store.drop_snapshot(world.record.id, step.snapshot)


TAKE_EFFECTS: Effects = {
    OpenOverlay: Effect(_open_overlay, _close_overlay),
    OpenState: Effect(_open_state, _drop_state),
    SetMigration: Effect(_set_migration, _unset_migration),
    FlushImages: Effect(_flush_images),
    FreezeFileSystems: Effect(freeze, thaw),
    PassInstant: Effect(_pass_instant, abandon_instant),
    ThawFileSystems: Effect(_thaw),
    AwaitSave: Effect(_await_save, _give_room_back),
    PutBackMigration: Effect(_put_back_migration),
    CloseState: Effect(_close_state),
    Commit: Effect(_commit, _revoke),
}

"""What each step of a take does to the world, and what undoes it.

One function for each, and one table at the end. What undoes a step asks QEMU and the files what
is there, because it also runs for a step that was cut off half-way. Undoing the instant is the
longest: the save is cancelled, each overlay's content (what the guest wrote since) is merged back
into the image below, and only then the overlay is let go.
"""

import asyncio
import contextlib
import os
from datetime import UTC, datetime
from pathlib import Path

from msgspec.structs import replace

from calotype.engine.execute import Effect, Effects
from calotype.engine.progress import Progress
from calotype.errors import ConflictError, PauseLimitError, QemuError
from calotype.model import names
from calotype.model.snapshot import MachineStatePart, Manifest
from calotype.model.vm import Facts, Image, ImageFacts, Process, VmRecord
from calotype.plan.compose import Outcome, compose_taken
from calotype.plan.restore import Definition
from calotype.plan.steps import (
    AwaitSave,
    CloseState,
    Commit,
    CreateOverlay,
    FlushImages,
    FreezeImages,
    MakeSnapshotFolder,
    OpenOverlay,
    OpenState,
    PassInstant,
    RecordNow,
    SetMigration,
    SnapshotInside,
    StorageAction,
    SwitchToOverlay,
    qmp_action,
)
from calotype.plan.take import TakePlan
from calotype.plan.window import Accepted, Failed, Window
from calotype.qemu import image_tool, migration, observe, process
from calotype.qemu.monitor import CommandRefused, Monitor
from calotype.qemu.passing import pass_through
from calotype.store import files, images
from calotype.store.store import Store

STATE_FILE = "machine-state"
FLUSH_ROUNDS = 3
FLUSHED_MS = 10.0
_POLL_S = 0.02


class Taking:
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
        self.store = store
        self.record = record
        self.monitor = monitor
        self.qemu = qemu
        self.facts = facts
        self.plan = plan
        self.definition = definition
        self.tag = tag
        self.description = description
        self.progress = progress
        self.began = asyncio.get_running_loop().time()
        self.phases_ms: dict[str, float] = {}
        self.accepted = Accepted(None, None)
        self.instant = datetime.now(UTC)
        self.machine_state: MachineStatePart | None = None
        self.manifest: Manifest | None = None

    @property
    def folder(self) -> Path:
        """The snapshot's own folder."""
        return self.store.snapshot_folder(self.record.id, self.plan.snapshot)


# --- prepare -------------------------------------------------------------------------------------


async def _make_folder(taking: Taking, step: MakeSnapshotFolder) -> None:
    taking.store.make_snapshot_folder(taking.record.id, step.snapshot)


async def _remove_folder(taking: Taking, step: MakeSnapshotFolder) -> None:
    taking.store.remove_snapshot_folder(taking.record.id, step.snapshot)


async def _create_overlay(_: Taking, step: CreateOverlay) -> None:
    await image_tool.create_overlay(step.overlay, step.backing, step.size_bytes)


async def _remove_overlay(taking: Taking, step: CreateOverlay) -> None:
    """Remove an overlay, unless it holds what the guest wrote: then it stays, on a frozen base."""
    if await _is_needed(taking, step.overlay):
        await asyncio.to_thread(images.freeze, Path(step.backing.path))
        raise QemuError(
            f"{step.overlay} holds the guest's newest writes and stays the active image"
        )
    if step.overlay in {disk.active.path for disk in taking.store.record(taking.record.id).disks}:
        raise QemuError(f"{step.overlay} stays: it is recorded as the active image")
    Path(step.overlay).unlink(missing_ok=True)


async def _is_needed(taking: Taking, overlay: str) -> bool:
    """Whether an overlay holds what is nowhere else; where that cannot be known, it does."""
    if not Path(overlay).exists():
        return False
    if process.is_alive(taking.qemu):
        try:
            return overlay in await observe.active_paths(taking.monitor)
        except QemuError:
            return True
    return images.read_metadata(Path(overlay)).l2_tables > 0


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


async def _close_overlay(taking: Taking, step: OpenOverlay) -> None:
    if step.node in await _node_names(taking.monitor):
        await taking.monitor.execute("blockdev-del", node_name=step.node)


async def _node_names(monitor: Monitor) -> set[str]:
    nodes = await monitor.execute("query-named-block-nodes", flat=True)
    return {node["node-name"] for node in nodes}


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


async def _drop_state(taking: Taking, step: OpenState) -> None:
    await _let_go_of_state(taking, step.snapshot, step.fdset)
    (taking.folder / STATE_FILE).unlink(missing_ok=True)


async def _let_go_of_state(taking: Taking, snapshot: str, fdset: int) -> None:
    with contextlib.suppress(CommandRefused):  # it is not there: QEMU let go of it by itself
        if fdset:
            await taking.monitor.execute("remove-fd", fdset_id=fdset)
        else:
            await taking.monitor.execute("closefd", fdname=names.state_descriptor(snapshot))


async def _set_migration(taking: Taking, step: SetMigration) -> None:
    await migration.configure(taking.monitor, step.capabilities, step.parameters)


async def _put_back_migration(taking: Taking, step: SetMigration) -> None:
    await migration.configure(taking.monitor, step.capabilities_before, step.parameters_before)


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
    )
    if await observe.observe_graph_digest(taking.monitor) != step.graph_digest:
        raise ConflictError("the VM's disks changed while the snapshot was prepared", "try again")
    end = await pass_through(window, taking.monitor)
    if isinstance(end, Failed):
        raise _window_error(end)
    taking.accepted = end
    stamp = end.stop_us
    taking.instant = datetime.fromtimestamp(stamp / 1e6, UTC) if stamp else datetime.now(UTC)


def _fd_uri(snapshot: str) -> str:
    return f"fd:{names.state_descriptor(snapshot)}"


def _window_error(failed: Failed) -> QemuError | PauseLimitError:
    after = "the guest runs as before" if failed.settled else "QEMU did not confirm the run state"
    if failed.limit:
        return PauseLimitError(
            f"{failed.reason}; {after}", "raise --pause-limit", settled=failed.settled
        )
    return QemuError(f"no snapshot was taken: {failed.reason}; {after}", settled=failed.settled)


async def _abandon_instant(taking: Taking, step: PassInstant) -> None:
    """Undo what happened at the instant, the guest running on with all it wrote since."""
    await migration.cancel(taking.monitor)
    if step.was_running:
        status = await taking.monitor.execute("query-status")
        if status["status"] in ("paused", "postmigrate"):
            await taking.monitor.execute("cont")
    for action in reversed(step.actions):
        await _abandon_storage(taking.monitor, action)


async def _abandon_storage(monitor: Monitor, action: StorageAction) -> None:
    match action:
        case SwitchToOverlay():
            await _merge_back(monitor, action)
        case SnapshotInside():
            with contextlib.suppress(CommandRefused):  # it was never made
                await monitor.execute(
                    "blockdev-snapshot-delete-internal-sync", device=action.node, name=action.name
                )


async def _merge_back(monitor: Monitor, action: SwitchToOverlay) -> None:
    """Merge an overlay that is in use back into its base, which takes its place again."""
    if action.overlay not in await observe.active_paths(monitor):
        return
    await monitor.execute(
        "block-commit",
        job_id=action.merge_job,
        device=action.overlay_node,
        base_node=action.node,
        auto_dismiss=False,
    )
    await _job_state(monitor, action.merge_job, "ready")
    await monitor.execute("job-complete", id=action.merge_job)
    await _job_state(monitor, action.merge_job, "concluded")
    await monitor.execute("job-dismiss", id=action.merge_job)


async def _job_state(monitor: Monitor, job_id: str, wanted: str) -> None:
    """Wait until a job is in the state *wanted*; one that concludes early has failed."""
    while True:
        jobs = {job["id"]: job for job in await monitor.execute("query-jobs")}
        job = jobs[job_id]
        if "error" in job:
            raise QemuError(f"the job {job_id} failed: {job['error']}", qemu=job["error"])
        if job["status"] == wanted:
            return
        await asyncio.sleep(_POLL_S)


# --- finish --------------------------------------------------------------------------------------


async def _record_now(taking: Taking, step: RecordNow) -> None:
    _record(taking, step.active, step.parent)


async def _record_before(taking: Taking, step: RecordNow) -> None:
    """Record the images from before, but for an overlay that could not be merged back."""
    active = {
        index: image if await _is_needed(taking, image.path) else step.active_before[index]
        for index, image in step.active.items()
    }
    _record(taking, active, step.parent_before)


def _record(taking: Taking, active: dict[int, Image], parent: str | None) -> None:
    record = taking.record
    disks = tuple(replace(disk, active=active[disk.index]) for disk in record.disks)
    taking.store.save(replace(record, disks=disks, parent=parent))


async def _await_save(taking: Taking, step: AwaitSave) -> None:
    """Wait until the machine state is written; the guest runs."""
    await migration.saved(
        taking.monitor,
        lambda done_bytes: taking.progress("saving", done_bytes, step.expected_bytes),
    )


async def _close_state(taking: Taking, step: CloseState) -> None:
    """Make the machine state durable and take its digest."""
    await _let_go_of_state(taking, step.snapshot, step.fdset)
    path = taking.folder / STATE_FILE
    await asyncio.to_thread(images.sync_data, path)
    taking.machine_state = MachineStatePart(
        file=STATE_FILE,
        digest=await asyncio.to_thread(images.digest, path),
        identity=images.identify(path, "raw"),
    )


async def _freeze_images(_: Taking, step: FreezeImages) -> None:
    for path in step.modes_before:
        await asyncio.to_thread(images.freeze, Path(path))


async def _thaw_images(_: Taking, step: FreezeImages) -> None:
    for path, mode in step.modes_before.items():
        images.thaw(Path(path), images.Frozen(mode, immutable=True))


async def _commit(taking: Taking, step: Commit) -> None:
    """Look at the parts once more as they are now for good, and write the manifest."""
    now = asyncio.get_running_loop().time()
    outcome = Outcome(
        instant=taking.instant.isoformat(),
        stop_us=taking.accepted.stop_us,
        resume_us=taking.accepted.resume_us,
        machine_state=taking.machine_state,
        chains={disk.index: await _chain(disk.image) for disk in taking.facts.disks},
        internal=await asyncio.to_thread(find_internal, taking.facts, step.snapshot),
        total_ms=(now - taking.began) * 1000,
        phases_ms=taking.phases_ms,
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


async def _chain(image: Image) -> tuple[ImageFacts, ...]:
    return await asyncio.to_thread(lambda: tuple(observe.image_chain(image)))


def find_internal(facts: Facts, snapshot: str) -> dict[int, tuple[str, str]]:
    """Id and digest of each internal snapshot named after *snapshot*, by disk index."""
    found = {}
    for disk in facts.disks:
        if disk.image.format == "qcow2":
            for entry in images.read_metadata(Path(disk.image.path)).snapshots:
                if entry.name == names.internal_name(snapshot):
                    found[disk.index] = (entry.id, entry.digest)
    return found


async def _revoke(taking: Taking, step: Commit) -> None:
    taking.store.revoke(taking.record.id, step.snapshot)


TAKE_EFFECTS: Effects = {
    MakeSnapshotFolder: Effect(_make_folder, _remove_folder),
    CreateOverlay: Effect(_create_overlay, _remove_overlay),
    OpenOverlay: Effect(_open_overlay, _close_overlay),
    OpenState: Effect(_open_state, _drop_state),
    SetMigration: Effect(_set_migration, _put_back_migration),
    FlushImages: Effect(_flush_images),
    PassInstant: Effect(_pass_instant, _abandon_instant),
    RecordNow: Effect(_record_now, _record_before),
    AwaitSave: Effect(_await_save),
    CloseState: Effect(_close_state),
    FreezeImages: Effect(_freeze_images, _thaw_images),
    Commit: Effect(_commit, _revoke),
}

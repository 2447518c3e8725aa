"""Plan a restore: compare what is there with what was recorded (`preflight`), then say the steps.

Every difference is found before anything is touched, and all of them are named, not only the
first. Identities are compared, contents are not read. What is left behind is kept: the disks that
the VM was on become a snapshot of their own, without a machine state unless that is asked for.

A VM that runs is gone over *beside*: a second QEMU is prepared completely, on images of its own,
while the first runs on, and takes its place in one pause. So the two never write to one image: an
internal snapshot is copied out where it would otherwise be gone back to in place.
"""

import shlex
from collections.abc import Iterator

from calotype.model import names
from calotype.model.acts import Act, Keep, Move, Tell
from calotype.model.snapshot import Manifest, StoragePart
from calotype.model.vm import (
    DiskRecord,
    Image,
    RunState,
    VmRecord,
)
from calotype.plan.preflight import mismatches
from calotype.plan.restore_plan import Found, RestorePlan, RestoreRequest, Running
from calotype.plan.steps import (
    ApplyInside,
    CheckTopology,
    CommitLeftBehind,
    CreateOverlay,
    DiscardImages,
    EndOld,
    ExtractInside,
    FreezeImages,
    HandOver,
    LetRun,
    LoadState,
    MakeSnapshotFolder,
    RecordRestored,
    SaveLeftBehind,
    SetClock,
    StartQemu,
    Step,
)
from calotype.plan.take import set_migration
from calotype.plan.take_plan import Blocker


def plan_restore(
    manifest: Manifest,
    record: VmRecord,
    found: Found,
    request: RestoreRequest,
    left_behind: str,
    running: Running | None = None,
) -> RestorePlan:
    """Plan to put a VM back to a snapshot.

    Args:
        manifest: The snapshot.
        record: The VM as it is defined now.
        found: What is on disk now.
        request: What the user asked for.
        left_behind: The id of the snapshot that keeps the present disks, and of the new overlays.
        running: The QEMU that runs it, if one does.

    Returns:
        The plan; its `mismatches` and `blockers` are empty if it can be carried out.
    """
    go = _Going(manifest, record, found, request, left_behind, running)
    return RestorePlan(
        snapshot=manifest.id,
        left_behind=left_behind,
        keeps_left_behind=not request.discard_current,
        run_state=go.run_state,
        active=go.active,
        mismatches=tuple(
            mismatch
            for mismatch in mismatches(manifest, record, found, request)
            if not (request.accept_touched and mismatch.kind == "touched")
        ),
        steps=tuple(_steps(go) if running is None else _steps_beside(go, running)),
        blockers=tuple(_blockers(go, running)),
        endpoints=running.endpoints if running else (),
        notes=tuple(_notes(go)) if running else (),
    )


# --- what is in the way --------------------------------------------------------------------------


def _blockers(go: "_Going", running: Running | None) -> Iterator[Blocker]:
    if running is not None:
        yield from _beside_blockers(go, running)
    if go.request.sync_time:
        yield from _clock_blockers(go)


_STOP_FIRST = "give --stop-first: the VM is saved, ended, and put back if the restore fails"


def _beside_blockers(go: "_Going", running: Running) -> Iterator[Blocker]:
    """Why the VM cannot be gone over from while it runs."""
    if not go.left:
        yield Blocker(
            "no disk of it gets another image, so nothing would tell which of two QEMUs is the VM",
            _STOP_FIRST,
        )
    if running.adopted_at:
        yield Blocker(
            f"its QEMU was started by hand and adopted at {running.adopted_at}, and a second one"
            " would take its user's sockets",
            _STOP_FIRST,
        )
    if go.run_state == "off":
        yield Blocker(
            f"the snapshot {go.manifest.id} has no machine state, and the VM runs",
            f"`calotype stop {shlex.quote(go.record.name)}` first, or boot its disks with"
            " --run-state running",
        )
    for argument, reason in running.unshared:
        yield Blocker(f"{argument}: {reason}", _STOP_FIRST)
    for job in running.jobs:
        yield Blocker(f"the block job {job!r} would end with the VM", "wait for it or cancel it")
    if running.migration.status in ("active", "setup", "device", "cancelling"):
        yield Blocker("a migration is under way", "wait for it or cancel it")
    for part, disk in go.pairs:
        if part.kind == "skip" and not (running.can_let_go and go.manifest.machine_state):
            yield Blocker(f"disk {disk.name!r} is skipped, so both would be on it", _STOP_FIRST)
    if go.request.keep_current and go.request.discard_current:
        yield Blocker("it cannot be both kept and discarded", "give one of the two")


def _clock_blockers(go: "_Going") -> Iterator[Blocker]:
    """Why the guest's clock could not be set afterwards."""
    if go.manifest.machine_state is None:
        yield Blocker(
            "the snapshot has no machine state: the guest boots, and looks at its hardware's clock",
            "leave --sync-time out",
        )
    elif go.run_state != "running":
        yield Blocker(
            f"the guest is to be {go.run_state}: one that stands still cannot set its clock",
            "add --run-state running, or leave --sync-time out",
        )
    elif go.found.agent.problem:
        yield Blocker(go.found.agent.problem, f"{go.found.agent.remedy}; or leave --sync-time out")


def _notes(go: "_Going") -> Iterator[str]:
    for part, disk in go.pairs:
        if part.kind == "internal":
            yield (
                f"disk {disk.name!r}: its snapshot is inside an image that is in use, and is copied"
                f" out of it, to {go.active[disk.index].path}; with --stop-first it need not be"
            )


# --- steps ---------------------------------------------------------------------------------------


class _Going:
    """Where the VM goes: what a plan is made of, and what follows from that at once."""

    def __init__(
        self,
        manifest: Manifest,
        record: VmRecord,
        found: Found,
        request: RestoreRequest,
        left_behind: str,
        running: Running | None,
    ) -> None:
        self.manifest = manifest
        self.record = record
        self.found = found
        self.request = request
        self.left_behind = left_behind
        self.is_beside = running is not None
        moves = [act for act in running.forth if isinstance(act, Move)] if running else []
        self.sockets = tuple(move.source for move in moves)
        disks = {disk.index: disk for disk in record.disks}
        self.pairs = [(part, disks[part.index]) for part in manifest.storage if part.index in disks]
        self.before = {disk.index: disk.active for disk in record.disks}
        self.active = {part.index: self._new_active(part, disk) for part, disk in self.pairs}
        self.run_state: RunState = (
            manifest.run_state if request.run_state == "saved" else request.run_state
        )

    def _new_active(self, part: StoragePart, disk: DiskRecord) -> Image:
        if part.kind == "skip" or self.is_in_place(part, disk):
            return disk.active
        return Image(names.overlay_path(disk.origin.path, self.left_behind), "qcow2")

    def is_in_place(self, part: StoragePart, disk: DiskRecord) -> bool:
        """Whether the part lies inside the image that is active and closed: gone back to there."""
        return not self.is_beside and part.kind == "internal" and part.image == disk.active

    @property
    def left(self) -> set[str]:
        """The images that are left behind."""
        return {
            self.before[index].path
            for index, image in self.active.items()
            if image != self.before[index]
        }


def _steps(go: _Going) -> Iterator[Step]:
    """Go to a snapshot with a VM that does not run."""
    yield from _prepared(go)
    if not go.request.discard_current:
        yield MakeSnapshotFolder(go.left_behind)
        yield from _kept(go, "off")
    yield RecordRestored(go.active, go.before, go.manifest.id, go.record.parent)
    if go.run_state == "running":
        yield LetRun()
    yield from _clock(go)
    if go.request.discard_current:
        yield _discarded(go)


def _steps_beside(go: _Going, running: Running) -> Iterator[Step]:
    """Go to a snapshot while another QEMU runs the VM, whose place is taken at the very end."""
    yield from _prepared(go)
    if not go.request.discard_current:
        yield MakeSnapshotFolder(go.left_behind)
    forth, back = running.forth, running.back
    if any(part.kind == "skip" for part, _ in go.pairs):
        forth, back = (*forth, _active(on=False)), (_active(on=True), *back)
    yield HandOver(
        active=go.active,
        active_before=go.before,
        parent=go.manifest.id,
        parent_before=go.record.parent,
        forth=forth,
        back=back,
        was_running=running.was_running,
        let_run=go.run_state == "running",
    )
    if go.request.keep_current:
        settings = set_migration(running.migration, "paused")
        yield SaveLeftBehind(go.left_behind, settings.capabilities, settings.parameters)
    yield EndOld(tuple(act.name for act in forth if isinstance(act, Keep)))
    if go.request.discard_current:
        yield _discarded(go)
    else:
        yield from _kept(go, "running" if running.was_running else "paused")
    yield from _clock(go)


def _clock(go: _Going) -> Iterator[Step]:
    """Set the guest's clock once it runs, if that was asked for."""
    if go.request.sync_time and go.run_state == "running":
        yield SetClock(go.found.agent.socket)


def _active(*, on: bool) -> Act:
    """Have the old QEMU give up its images, or take them back (qapi/block-core.json)."""
    return Tell("old", "blockdev-set-active", {"active": on})


def _prepared(go: _Going) -> Iterator[Step]:
    """The new images, and a QEMU on them that has the snapshot's state loaded."""
    for part, disk in go.pairs:
        yield from _disk_steps(go, part, disk)
    if go.run_state == "off":
        return
    manifest = go.manifest
    machine = manifest.topology.machine if manifest.topology else ""
    is_incoming = manifest.machine_state is not None
    yield StartQemu(go.active, is_incoming, machine, beside=go.is_beside, sockets=go.sockets)
    if manifest.topology is not None:
        yield CheckTopology(manifest.topology)
    if manifest.machine_state is not None:
        yield LoadState(manifest.id, manifest.machine_state.file)


def _kept(go: _Going, run_state: RunState) -> Iterator[Step]:
    """Keep what is left behind as a snapshot."""
    yield FreezeImages({path: go.found.modes.get(path, 0) for path in sorted(go.left)})
    yield CommitLeftBehind(
        snapshot=go.left_behind,
        restored=go.manifest.id,
        active=go.active,
        active_before=go.before,
        parent_before=go.record.parent,
        run_state=run_state,
    )


def _discarded(go: _Going) -> DiscardImages:
    inside = tuple(
        (disk.active, names.internal_name(go.left_behind))
        for part, disk in go.pairs
        if go.is_in_place(part, disk)
    )
    gone = go.left - {image.path for image in go.active.values()}
    return DiscardImages(tuple(sorted(_discardable(gone, go.record, go.found))), inside)


def _disk_steps(go: _Going, part: StoragePart, disk: DiskRecord) -> Iterator[Step]:
    active = go.active[disk.index]
    if part.kind == "skip" or part.image is None:
        return
    if part.kind == "external":
        yield CreateOverlay(active.path, part.image, part.virtual_size_bytes)
    elif go.is_in_place(part, disk):
        yield ApplyInside(part.image, part.internal_name, names.internal_name(go.left_behind))
    else:
        yield ExtractInside(part.image, part.internal_name, active.path)


def _discardable(left: set[str], record: VmRecord, found: Found) -> Iterator[str]:
    """The images left behind that are overlays of ours and that no snapshot stands on."""
    origins = {disk.active.path: disk.origin.path for disk in record.disks}
    for path in left - found.kept_paths:
        if names.is_overlay_of(path, origins[path]):
            yield path

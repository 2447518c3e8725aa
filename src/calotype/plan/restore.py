"""Plan a restore: compare what is there with what was recorded, then say the steps.

Every difference is found before anything is touched, and all of them are named, not only the
first. Identities are compared, contents are not read. What is left behind is kept: the disks that
the VM was on become a snapshot of their own, without a machine state unless that is asked for.

A VM that runs is gone over *beside*: a second QEMU is prepared completely, on images of its own,
while the first runs on, and takes its place in one pause. So the two never write to one image: an
internal snapshot is copied out where it would otherwise be gone back to in place.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from msgspec import Struct

from calotype.model import names
from calotype.model.acts import Act, Keep, Move, Tell
from calotype.model.identity import Difference, Identity, differences
from calotype.model.snapshot import Manifest, StoragePart
from calotype.model.vm import (
    DiskRecord,
    Image,
    ImageFacts,
    MigrationFacts,
    ReadOnlyDisk,
    RunState,
    VmRecord,
)
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
    StartQemu,
    Step,
)
from calotype.plan.take import set_migration
from calotype.plan.take_plan import Blocker

Definition = tuple[tuple[str, str], ...]


class RestoreRequest(Struct, frozen=True):
    """What the user asked for."""

    run_state: Literal["saved", "running", "paused"] = "saved"
    discard_current: bool = False
    accept_touched: bool = False
    """Go on although a file's mode, owner or name was changed, if nothing else of it was."""
    keep_current: bool = False
    """Keep the machine state that is left behind, too; of a VM that runs."""


class Found(Struct, frozen=True):
    """What is there now, read before the plan is made."""

    definition: Definition
    identities: Mapping[str, Identity]
    """By path; a path that is missing here is missing on disk."""
    internal: Mapping[tuple[str, str], str]
    """Digest of each internal snapshot, by image path and name."""
    state: Identity | None
    """The machine state's file."""
    modes: Mapping[str, int]
    """The permission bits of the active images, by path."""
    kept_paths: frozenset[str]
    """Images that some snapshot of this VM stands on."""


class Running(Struct, frozen=True):
    """What is found of the QEMU that runs the VM, whose place another is to take."""

    was_running: bool
    """Whether its guest runs."""
    endpoints: tuple[tuple[str, str], ...]
    """What only one of the two can have, and how it is handed over, in words."""
    forth: tuple[Act, ...]
    back: tuple[Act, ...]
    unshared: tuple[tuple[str, str], ...]
    """Arguments of its command line that keep a second QEMU from being started, and why."""
    jobs: tuple[str, ...]
    """Block jobs that would end with it."""
    can_let_go: bool
    """Whether it can give up an image that the other takes over (blockdev-set-active)."""
    migration: MigrationFacts
    adopted_at: str = ""
    """The QMP socket of one that its user started; "" of one that we did."""


class Mismatch(Struct, frozen=True):
    """One difference, as a word that a program can use and a line for a person."""

    kind: Literal["missing", "extra", "swapped", "replaced", "resized", "written", "touched",
                  "header", "snapshots", "definition"]  # fmt: skip
    subject: str
    text: str


class RestorePlan(Struct, frozen=True):
    """All that a restore will do."""

    snapshot: str
    left_behind: str
    keeps_left_behind: bool
    run_state: RunState
    active: dict[int, Image]
    mismatches: tuple[Mismatch, ...]
    steps: tuple[Step, ...]
    blockers: tuple[Blocker, ...] = ()
    endpoints: tuple[tuple[str, str], ...] = ()
    """What is handed over from the QEMU that runs, and how; none where none runs."""
    notes: tuple[str, ...] = ()
    """What else there is to know."""


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
            for mismatch in _mismatches(manifest, record, found, request)
            if not (request.accept_touched and mismatch.kind == "touched")
        ),
        steps=tuple(_steps(go) if running is None else _steps_beside(go, running)),
        blockers=tuple(_blockers(go, running)) if running else (),
        endpoints=running.endpoints if running else (),
        notes=tuple(_notes(go)) if running else (),
    )


# --- preflight -----------------------------------------------------------------------------------


def _mismatches(
    manifest: Manifest, record: VmRecord, found: Found, request: RestoreRequest
) -> Iterator[Mismatch]:
    yield from _definition_mismatches(manifest.definition, found.definition)
    yield from _disk_set_mismatches(manifest, record)
    for part in manifest.storage:
        yield from _part_mismatches(part, manifest, found)
    for disk in manifest.read_only:
        yield from _read_only_mismatches(disk, found)
    for now in record.disks:
        if now.active.path not in found.modes and not request.discard_current:
            text = f"disk {now.name!r}: its newest image {now.active.path} is missing"
            yield Mismatch("missing", now.name, f"{text} (--discard-current does without it)")
    if manifest.machine_state is not None and found.state is None:
        file = manifest.machine_state.file
        yield Mismatch("missing", "machine state", f"the machine state's file {file!r} is missing")
    elif manifest.machine_state is not None and found.state is not None:
        for change in _gravest(manifest.machine_state.identity, found.state):
            yield Mismatch(change.change, "machine state", f"the machine state: {change.text}")


def _definition_mismatches(recorded: Definition, now: Definition) -> Iterator[Mismatch]:
    """Options that the guest would notice, as the snapshot had them and as they are now."""
    for key in dict.fromkeys(key for key, _ in recorded + now):
        then = [value for name, value in recorded if name == key]
        today = [value for name, value in now if name == key]
        if then != today:
            text = f"-{key} is {_listed(today)} now, the snapshot has {_listed(then)}"
            yield Mismatch("definition", key, text)


def _listed(values: list[str]) -> str:
    return " and ".join(map(repr, values)) or "absent"


def _disk_set_mismatches(manifest: Manifest, record: VmRecord) -> Iterator[Mismatch]:
    then = {part.origin.path: part.disk for part in manifest.storage}
    now = {disk.origin.path: disk.name for disk in record.disks}
    for path in sorted(then.keys() - now.keys()):
        text = f"disk {then[path]!r} ({path}) is missing from the VM"
        yield Mismatch("missing", then[path], text)
    for path in sorted(now.keys() - then.keys()):
        text = f"disk {now[path]!r} ({path}) was not there when the snapshot was taken"
        yield Mismatch("extra", now[path], text)
    order = [(part.index, part.origin.path) for part in manifest.storage]
    present = [(disk.index, disk.origin.path) for disk in record.disks]
    if order != present and then.keys() == now.keys():
        yield Mismatch("swapped", "disks", "the disks are the same, but in another order")


def _part_mismatches(part: StoragePart, manifest: Manifest, found: Found) -> Iterator[Mismatch]:
    for layer in part.layers:
        yield from _layer_mismatches(part, layer, manifest, found)
    if part.kind == "internal" and part.image is not None:
        digest = found.internal.get((part.image.path, part.internal_name))
        if digest is None:
            text = f"disk {part.disk!r}: {part.image.path} no longer holds {part.internal_name!r}"
            yield Mismatch("missing", part.disk, text)
        elif digest != part.internal_digest:
            text = f"disk {part.disk!r}: the snapshot inside {part.image.path} has changed"
            yield Mismatch("snapshots", part.disk, text)


def _layer_mismatches(
    part: StoragePart, layer: ImageFacts, manifest: Manifest, found: Found
) -> Iterator[Mismatch]:
    now = found.identities.get(layer.path)
    if now is None:
        text = f"disk {part.disk!r}: {layer.path} is missing"
        yield Mismatch("missing", part.disk, text)
        return
    owner = _recorded_as(now, manifest)
    same = (now.device, now.inode) == (layer.identity.device, layer.identity.inode)
    if owner not in (None, part.disk) and not same:
        text = f"disk {part.disk!r}: {layer.path} is the image of disk {owner!r}"
        yield Mismatch("swapped", part.disk, text)
        return
    for change in _gravest(layer.identity, now):
        text = f"disk {part.disk!r}: {layer.path}: {change.text}"
        yield Mismatch(change.change, part.disk, text)


def _read_only_mismatches(disk: ReadOnlyDisk, found: Found) -> Iterator[Mismatch]:
    if disk.image is None:
        return
    now = found.identities.get(disk.image.path)
    if now is None:
        yield Mismatch("missing", disk.name, f"{disk.name!r}: {disk.image.path} is missing")
        return
    for change in _gravest(disk.image.identity, now):
        text = f"{disk.name!r} (read-only): {disk.image.path}: {change.text}"
        yield Mismatch(change.change, disk.name, text)


def _gravest(recorded: Identity, now: Identity) -> tuple[Difference, ...]:
    """The gravest difference, if any.

    A new device number alone is none for a file: a boot may give its file system one. A block
    device is known by nothing else.
    """
    changes = differences(recorded, now)
    is_file = recorded.inode != 0
    return () if is_file and [each.field for each in changes] == ["device"] else changes[:1]


def _recorded_as(now: Identity, manifest: Manifest) -> str | None:
    """The disk whose image this file was when the snapshot was taken."""
    for part in manifest.storage:
        for layer in part.layers:
            if (layer.identity.device, layer.identity.inode) == (now.device, now.inode):
                return part.disk
    return None


# --- what is in the way of going over from a VM that runs ----------------------------------------

_STOP_FIRST = "give --stop-first: the VM is saved, ended, and put back if the restore fails"


def _blockers(go: "_Going", running: Running) -> Iterator[Blocker]:
    if running.adopted_at:
        yield Blocker(
            f"its QEMU was started by hand and adopted at {running.adopted_at}, and a second one"
            " would take its user's sockets",
            _STOP_FIRST,
        )
    if go.run_state == "off":
        yield Blocker(
            f"the snapshot {go.manifest.id} has no machine state, and the VM runs",
            "`calotype stop NAME` first, or boot its disks with --run-state running",
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

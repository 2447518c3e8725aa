"""Plan a restore: compare what is there with what was recorded, then say the steps.

Every difference is found before anything is touched, and all of them are named, not only the
first. Identities are compared, contents are not read. What is left behind is kept: the disks that
the VM was on become a snapshot of their own, without a machine state.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

from msgspec import Struct

from calotype.formats.secrets import redacted_value
from calotype.model import names
from calotype.model.identity import Difference, Identity, differences
from calotype.model.snapshot import Manifest, StoragePart
from calotype.model.vm import DiskRecord, Image, ImageFacts, ReadOnlyDisk, RunState, VmRecord
from calotype.plan.steps import (
    ApplyInside,
    CheckTopology,
    CommitLeftBehind,
    CreateOverlay,
    DiscardImages,
    ExtractInside,
    FreezeImages,
    LetRun,
    LoadState,
    MakeSnapshotFolder,
    RecordRestored,
    StartQemu,
    Step,
)

Definition = tuple[tuple[str, str], ...]


class RestoreRequest(Struct, frozen=True):
    """What the user asked for."""

    run_state: Literal["saved", "running", "paused"] = "saved"
    discard_current: bool = False
    accept_touched: bool = False
    """Go on although a file's mode, owner or name was changed, if nothing else of it was."""


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


def plan_restore(
    manifest: Manifest,
    record: VmRecord,
    found: Found,
    request: RestoreRequest,
    left_behind: str,
) -> RestorePlan:
    """Plan to put a VM that does not run back to a snapshot.

    Args:
        manifest: The snapshot.
        record: The VM as it is defined now.
        found: What is on disk now.
        request: What the user asked for.
        left_behind: The id of the snapshot that keeps the present disks, and of the new overlays.

    Returns:
        The plan; its `mismatches` are empty if it can be carried out.
    """
    disks = {disk.index: disk for disk in record.disks}
    pairs = [(part, disks[part.index]) for part in manifest.storage if part.index in disks]
    active = {part.index: _new_active(part, disk, left_behind) for part, disk in pairs}
    run_state: RunState = manifest.run_state if request.run_state == "saved" else request.run_state
    return RestorePlan(
        snapshot=manifest.id,
        left_behind=left_behind,
        keeps_left_behind=not request.discard_current,
        run_state=run_state,
        active=active,
        mismatches=tuple(
            mismatch
            for mismatch in _mismatches(manifest, record, found, request)
            if not (request.accept_touched and mismatch.kind == "touched")
        ),
        steps=tuple(
            _steps(manifest, record, found, request, left_behind, run_state, pairs, active)
        ),
    )


# --- preflight -----------------------------------------------------------------------------------


def _mismatches(
    manifest: Manifest, record: VmRecord, found: Found, request: RestoreRequest
) -> Iterator[Mismatch]:
    yield from _definition_mismatches(manifest.definition, found.definition)
    yield from _disk_set_mismatches(manifest, record)
    for part in manifest.storage:
        yield from part_mismatches(part, manifest, found)
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
            text = f"-{key} is {_listed(key, today)} now, the snapshot has {_listed(key, then)}"
            yield Mismatch("definition", key, text)


def _listed(key: str, values: list[str]) -> str:
    return " and ".join(repr(redacted_value(key, value)) for value in values) or "absent"


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


def part_mismatches(part: StoragePart, manifest: Manifest, found: Found) -> Iterator[Mismatch]:
    """What of one part of a snapshot is not what was recorded."""
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


# --- steps ---------------------------------------------------------------------------------------


def _new_active(part: StoragePart, disk: DiskRecord, left_behind: str) -> Image:
    if part.kind == "skip" or _is_in_place(part, disk):
        return disk.active
    return Image(names.overlay_path(disk.origin.path, left_behind), "qcow2")


def _is_in_place(part: StoragePart, disk: DiskRecord) -> bool:
    """Whether the part lies inside the very image that is active: then it is gone back to there."""
    return part.kind == "internal" and part.image == disk.active


def _steps(
    manifest: Manifest,
    record: VmRecord,
    found: Found,
    request: RestoreRequest,
    left_behind: str,
    run_state: RunState,
    pairs: list[tuple[StoragePart, DiskRecord]],
    active: dict[int, Image],
) -> Iterator[Step]:
    before = {disk.index: disk.active for disk in record.disks}
    for part, disk in pairs:
        yield from _disk_steps(part, disk, active[disk.index], left_behind)
    if run_state != "off":
        yield StartQemu(active, manifest.machine_state is not None, _machine(manifest))
    if run_state != "off" and manifest.topology is not None:
        yield CheckTopology(manifest.topology)
    if run_state != "off" and manifest.machine_state is not None:
        yield LoadState(manifest.id, manifest.machine_state.file)
    left = {before[index].path for index in active if active[index] != before[index]}
    if not request.discard_current:
        yield MakeSnapshotFolder(left_behind)
        yield FreezeImages({path: found.modes.get(path, 0) for path in sorted(left)})
        yield CommitLeftBehind(left_behind)
    yield RecordRestored(active, before, manifest.id, record.parent)
    if run_state == "running":
        yield LetRun()
    if request.discard_current:
        inside = tuple(
            (disk.active, names.internal_name(left_behind))
            for part, disk in pairs
            if _is_in_place(part, disk)
        )
        gone = left - {image.path for image in active.values()}
        yield DiscardImages(tuple(sorted(_discardable(gone, record, found))), inside)


def _machine(manifest: Manifest) -> str:
    return manifest.topology.machine if manifest.topology else ""


def _disk_steps(
    part: StoragePart, disk: DiskRecord, active: Image, left_behind: str
) -> Iterator[Step]:
    if part.kind == "skip" or part.image is None:
        return
    if part.kind == "external":
        yield CreateOverlay(active.path, part.image, part.virtual_size_bytes)
    elif _is_in_place(part, disk):
        yield ApplyInside(part.image, part.internal_name, names.internal_name(left_behind))
    else:
        yield ExtractInside(part.image, part.internal_name, active.path)


def _discardable(left: set[str], record: VmRecord, found: Found) -> Iterator[str]:
    """The images left behind that are overlays of ours and that no snapshot stands on."""
    origins = {disk.active.path: disk.origin.path for disk in record.disks}
    for path in left - found.kept_paths:
        if names.is_overlay_of(path, origins[path]):
            yield path

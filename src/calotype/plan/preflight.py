"""Compare what is there with what a snapshot was taken of: all differences, not only the first."""

from collections.abc import Iterator, Sequence

from calotype.errors import MismatchError
from calotype.formats.secrets import redacted_value
from calotype.model.identity import Difference, Identity, differences
from calotype.model.snapshot import Manifest, StoragePart
from calotype.model.vm import ImageFacts, ReadOnlyDisk, VmRecord
from calotype.plan.restore_plan import Definition, Found, Mismatch, RestoreRequest


def as_error(problem: str, found: Sequence[Mismatch]) -> MismatchError:
    """The refusal for what is another than was recorded, after the words *problem*."""
    is_touched = all(mismatch.kind == "touched" for mismatch in found)
    return MismatchError(
        f"{problem}: " + "; ".join(mismatch.text for mismatch in found),
        "if that was you, and you wrote nothing to it, give --accept-touched"
        if is_touched
        else "put back what is named here; nothing was changed",
        mismatches=[
            {"kind": mismatch.kind, "subject": mismatch.subject, "text": mismatch.text}
            for mismatch in found
        ],
    )


def mismatches(
    manifest: Manifest, record: VmRecord, found: Found, request: RestoreRequest
) -> Iterator[Mismatch]:
    """All that is another than when the snapshot was taken."""
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

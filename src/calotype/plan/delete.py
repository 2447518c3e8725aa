"""Plan a delete: what goes, what stays and why, what is merged which way, and the steps.

What becomes of the images stands in `layers.py`, the order of the steps in `delete_steps.py`. As
with the other plans everything that is in the way is named, not only the first thing.
"""

import shlex
from collections.abc import Iterator, Mapping

from msgspec import Struct
from msgspec.structs import replace

from calotype.errors import BlockedError, MismatchError
from calotype.model.identity import Identity, differences
from calotype.model.snapshot import Manifest, StoragePart
from calotype.model.vm import VmRecord
from calotype.plan.delete_costs import Merge, freed_bytes, merges, peak_bytes
from calotype.plan.delete_steps import Settled, delete_steps, touched
from calotype.plan.layers import (
    DiskLayers,
    Down,
    Inside,
    Layer,
    Operation,
    Remove,
    Replace,
    Stay,
    Up,
    closed,
    settle,
    stays,
)
from calotype.plan.restore_plan import Mismatch
from calotype.plan.steps import Step
from calotype.plan.take_plan import Blocker

MIB = 1 << 20


class DeleteRequest(Struct, frozen=True):
    """What the user asked for."""

    snapshots: frozenset[str]
    """Their whole ids; none: merge what earlier deletes had to keep."""
    children: bool = False
    """Delete what descends from them as well."""


class Catalogue(Struct, frozen=True):
    """All that is there now, read before the plan is made."""

    record: VmRecord
    manifests: tuple[Manifest, ...]
    protected: frozenset[str]
    disks: tuple[DiskLayers, ...]
    identities: Mapping[str, Identity]
    """By path, of every image of ours."""
    state_bytes: Mapping[str, int]
    """By snapshot: what its own files take."""
    is_running: bool = False
    """Whether the guest runs."""
    faults: tuple[Blocker, ...] = ()
    """What is wrong with the QEMU that runs, if it is in the way of any merge."""


class DeletePlan(Struct, frozen=True):
    """All that a delete will do."""

    snapshots: tuple[str, ...]
    reparented: dict[str, str | None]
    """Snapshot that stays -> its new parent."""
    freed_bytes: int
    """At least, as two images may hold the same places of the disk; negative: more may be taken."""
    freed_limit_bytes: int
    """At most; negative where more is taken in any case."""
    removes: tuple[str, ...]
    merges: tuple[Merge, ...]
    seconds: float
    stays: tuple[Stay, ...]
    blockers: tuple[Blocker, ...]
    mismatches: tuple[Mismatch, ...]
    steps: tuple[Step, ...]
    is_more_when_off: bool = False
    """Whether more can be merged or removed once the VM is off."""


def plan_delete(catalogue: Catalogue, request: DeleteRequest) -> DeletePlan:
    """Plan to delete snapshots of a VM, whether or not it runs.

    Args:
        catalogue: What is there now.
        request: What the user asked for.

    Returns:
        The plan; without blockers and mismatches it can be carried out.
    """
    doomed = _doomed(catalogue, request)
    disks = [_settle(catalogue, disk, doomed) for disk in catalogue.disks]
    operations = [operation for disk in disks for operation in disk.operations]
    all_merges = tuple(merges(operations))
    least, most = freed_bytes(operations)
    states = sum(catalogue.state_bytes.get(snapshot, 0) for snapshot in doomed)
    parents = _parents(catalogue, doomed)
    return DeletePlan(
        snapshots=doomed,
        reparented={
            manifest.id: parents[manifest.id]
            for manifest in _kept(catalogue, doomed)
            if parents[manifest.id] != manifest.parent
        },
        freed_bytes=states + least,
        freed_limit_bytes=states + most,
        removes=tuple(each.layer.path for each in operations if isinstance(each, Remove)),
        merges=all_merges,
        seconds=round(sum(merge.seconds for merge in all_merges), 1),
        stays=tuple(stay for disk in disks for stay in stays(disk.end)),
        blockers=tuple(_blockers(catalogue, doomed, disks)),
        mismatches=tuple(_mismatches(catalogue, doomed, disks)),
        steps=delete_steps(
            catalogue.record,
            doomed,
            _kept(catalogue, doomed),
            disks,
            parents,
            was_running=catalogue.is_running,
        ),
        is_more_when_off=any(settle(closed(disk.end))[0] for disk in disks),
    )


# --- who goes, who stays -------------------------------------------------------------------------


def _doomed(catalogue: Catalogue, request: DeleteRequest) -> tuple[str, ...]:
    """The snapshots to delete, oldest first."""
    chosen = set(request.snapshots)
    while request.children:
        more = {each.id for each in catalogue.manifests if each.parent in chosen} - chosen
        if not more:
            break
        chosen |= more
    return tuple(manifest.id for manifest in catalogue.manifests if manifest.id in chosen)


def _kept(catalogue: Catalogue, doomed: tuple[str, ...]) -> list[Manifest]:
    return [manifest for manifest in catalogue.manifests if manifest.id not in doomed]


def _parents(catalogue: Catalogue, doomed: tuple[str, ...]) -> dict[str, str | None]:
    """The nearest ancestor that stays, of each snapshot, and of "" (the VM's present state)."""
    parent = {manifest.id: manifest.parent for manifest in catalogue.manifests}
    gone = set(doomed)

    def nearest(snapshot: str | None) -> str | None:
        while snapshot in gone:
            snapshot = parent.get(snapshot or "")
        return snapshot

    found = {snapshot: nearest(above) for snapshot, above in parent.items()}
    return found | {"": nearest(catalogue.record.parent)}


# --- images --------------------------------------------------------------------------------------


def _settle(catalogue: Catalogue, disk: DiskLayers, doomed: tuple[str, ...]) -> Settled:
    """What becomes of one disk's images once the snapshots are gone."""
    gone = {
        (part.image.path, part.internal_id, part.internal_name)
        for manifest in catalogue.manifests
        if manifest.id in doomed
        for part in _parts(manifest, disk)
        if part.kind == "internal" and part.image
    }

    def is_gone(layer: Layer, entry: Inside) -> bool:
        return (layer.path, entry.id, entry.name) in gone

    layers = {
        path: replace(
            layer, inside=tuple(entry for entry in layer.inside if not is_gone(layer, entry))
        )
        for path, layer in disk.layers.items()
    }
    held: dict[str, tuple[str, ...]] = {}
    for manifest in _kept(catalogue, doomed):
        for part in _parts(manifest, disk):
            if part.kind == "external" and part.image:
                held[part.image.path] = (*held.get(part.image.path, ()), manifest.id)
    before = replace(disk, layers=layers, held=held)
    operations, end = settle(before)
    staying = _staying(before, operations)
    inside = tuple(
        (layer.image, entry)
        for path, layer in disk.layers.items()
        for entry in layer.inside
        if is_gone(layer, entry) and path in staying
    )
    return Settled(before, operations, end, inside)


def _parts(manifest: Manifest, disk: DiskLayers) -> list[StoragePart]:
    return [part for part in manifest.storage if part.origin.path == disk.origin.path]


def _staying(disk: DiskLayers, operations: list[Operation]) -> set[str]:
    """The files that are still there in the end, by the path that they have now."""
    gone = set()
    for operation in operations:
        match operation:
            case Remove(layer) | Down(top=layer) | Up(layer=Layer() as layer):
                gone.add(layer.path)
            case Replace(origin=layer):
                gone.add(layer.path)
            case _:
                pass
    return disk.layers.keys() - gone


# --- what is in the way --------------------------------------------------------------------------


def _blockers(
    catalogue: Catalogue, doomed: tuple[str, ...], disks: list[Settled]
) -> Iterator[Blocker]:
    name = catalogue.record.name
    for snapshot in doomed:
        if snapshot in catalogue.protected:
            yield Blocker(
                f"the snapshot {snapshot} is protected",
                f"`calotype unprotect {shlex.quote(name)} --id {snapshot}` first",
            )
    if any(operation for disk in disks for operation in disk.operations if _is_live(operation)):
        yield from catalogue.faults
    for disk in disks:
        if (needed := peak_bytes(disk.operations)) > disk.before.free_bytes:
            yield Blocker(
                f"merging takes up to {needed // MIB} MiB for a while,"
                f" {disk.before.free_bytes // MIB} MiB are free beside {disk.before.origin.path}",
                "free some space",
            )
        for image, entry in disk.inside:
            layer = disk.before.layers[image.path]
            if not layer.is_open and entry.name in {other.name for other in layer.inside}:
                yield Blocker(
                    f"{image.path} holds more than one snapshot called {entry.name!r}",
                    "qemu-img deletes by name: delete the other one, or rename it, first",
                )
            if layer.is_open and image.path != disk.end.active_path:
                yield Blocker(
                    f"the snapshot {entry.name!r} is inside {image.path}, which the VM stands on"
                    " and cannot change while it runs",
                    f"stop the VM first (`calotype stop {shlex.quote(name)}`)",
                )


def _is_live(operation: Operation) -> bool:
    return isinstance(operation, Down) and operation.top.is_open


def _mismatches(
    catalogue: Catalogue, doomed: tuple[str, ...], disks: list[Settled]
) -> Iterator[Mismatch]:
    """Every image that would be touched and is not what some snapshot recorded."""
    paths = {path for disk in disks for path in touched(disk)}
    told = set()
    for manifest in catalogue.manifests:
        for part in manifest.storage:
            for layer in part.layers:
                now = catalogue.identities.get(layer.path)
                if layer.path not in paths or layer.path in told or now is None:
                    continue
                changes = [
                    change
                    for change in differences(layer.identity, now)
                    if change.field not in ("device", "ctime_ns")
                ]
                if changes:
                    told.add(layer.path)
                    text = f"disk {part.disk!r}: {layer.path}: {changes[0].text}"
                    yield Mismatch(changes[0].change, part.disk, text)
    yield from _internal_mismatches(catalogue, doomed, disks)


def _internal_mismatches(
    catalogue: Catalogue, doomed: tuple[str, ...], disks: list[Settled]
) -> Iterator[Mismatch]:
    deleted = {
        (image.path, entry.id, entry.name): entry.digest
        for disk in disks
        for image, entry in disk.inside
    }
    for manifest in catalogue.manifests:
        for part in manifest.storage:
            if manifest.id in doomed and part.kind == "internal" and part.image:
                key = (part.image.path, part.internal_id, part.internal_name)
                if deleted.get(key, part.internal_digest) != part.internal_digest:
                    text = f"disk {part.disk!r}: the snapshot inside {part.image.path} has changed"
                    yield Mismatch("snapshots", part.disk, text)


# --- the error of a plan that cannot be carried out ----------------------------------------------


def as_error(name: str, plan: DeletePlan) -> BlockedError | MismatchError | None:
    """What is in the way of a plan, the first of it in words and all of it as data."""
    if plan.mismatches:
        return MismatchError(
            f"nothing of {name!r} is deleted: "
            + "; ".join(mismatch.text for mismatch in plan.mismatches),
            "put back what is named here; nothing was changed",
            mismatches=[
                {"kind": mismatch.kind, "subject": mismatch.subject, "text": mismatch.text}
                for mismatch in plan.mismatches
            ],
        )
    if plan.blockers:
        first, more = plan.blockers[0], len(plan.blockers) - 1
        also = f" (and {more} more: see --dry-run)" if more else ""
        return BlockedError(
            f"nothing of {name!r} is deleted: {first.problem}{also}",
            first.remedy,
            blockers=[[blocker.problem, blocker.remedy] for blocker in plan.blockers],
        )
    return None

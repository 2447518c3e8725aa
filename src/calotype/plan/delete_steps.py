"""The steps of a delete, in an order that may be cut off anywhere and begun again from the first.

    drop the manifests -> their files -> merge, one image at a time -> snapshots inside ->
    the user's path -> look at the images of the snapshots that stay anew

The first step is the commit: from then on a delete is finished, never undone. Between any two
steps the record and every manifest that stays name images with the right content: an image is
removed only after what named it was written anew, and both hold the same content in between. What
such a manifest says of its images' *identity* may be out of date until the last steps.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from calotype.model import names
from calotype.model.snapshot import Manifest
from calotype.model.vm import Image, VmRecord
from calotype.plan.layers import (
    DiskLayers,
    Down,
    Inside,
    Layer,
    Operation,
    Remove,
    Replace,
    Up,
    after,
)
from calotype.plan.steps import (
    DeleteInside,
    DropSnapshot,
    MergeDown,
    MergeUp,
    RecordMerged,
    RemoveImage,
    RemoveSnapshotFiles,
    Retarget,
    Step,
    TakePath,
)

Parents = dict[str, str | None]
"""The parent of each snapshot that stays, and of "": the VM's present state."""


class Settled(NamedTuple):
    """One disk: as it is for those who stay, what is done to it, and as it is afterwards."""

    before: DiskLayers
    operations: list[Operation]
    end: DiskLayers
    inside: tuple[tuple[Image, Inside], ...]
    """Snapshots to be deleted from images that stay."""


def touched(disk: Settled) -> list[str]:
    """The images that are written to, replaced or removed, in order."""
    paths: list[str] = []
    for operation in disk.operations:
        match operation:
            case Remove(layer):
                paths.append(layer.path)
            case Down(top, base, children):
                paths += [top.path, base.path, *(child.path for child in children)]
            case Up(layer, children, _):
                paths += [layer.path] if layer else []
                paths += [child.path for child in children]
            case Replace(copy, origin):
                paths += [copy.path, origin.path]
            case _:
                pass
    paths += [image.path for image, _ in disk.inside]
    return list(dict.fromkeys(paths))


def delete_steps(
    record: VmRecord,
    doomed: tuple[str, ...],
    kept: Sequence[Manifest],
    disks: Sequence[Settled],
    parents: Parents,
    *,
    was_running: bool,
) -> tuple[Step, ...]:
    """All steps of a delete, in order.

    Args:
        record: The VM.
        doomed: The snapshots that go.
        kept: The manifests of those that stay.
        disks: What becomes of the images.
        parents: The parent that each snapshot that stays gets.
        was_running: Whether the guest runs.
    """
    return tuple(_Order(record, kept, parents, was_running).steps(doomed, disks))


class _Order:
    """The steps as they are put in order; it notes where the content of each image went."""

    def __init__(
        self, record: VmRecord, kept: Sequence[Manifest], parents: Parents, was_running: bool
    ) -> None:
        self._record = record
        self._was_running = was_running
        self._kept = kept
        self._parents = parents
        self._moved: dict[str, Image] = {}

    def steps(self, doomed: tuple[str, ...], disks: Sequence[Settled]) -> Iterator[Step]:
        for snapshot in doomed:
            yield DropSnapshot(snapshot)
        for snapshot in doomed:
            yield RemoveSnapshotFiles(snapshot)
        if self._parents[""] != self._record.parent:
            yield RecordMerged({}, {}, self._parents[""])
        for disk in disks:
            yield from self._of_disk(disk)
        changed = {path for disk in disks for path in touched(disk)}
        for manifest in self._kept:
            if self._is_affected(manifest, changed):
                yield self._retarget(manifest, tuple(sorted(changed)))

    def _is_affected(self, manifest: Manifest, changed: set[str]) -> bool:
        layers = {layer.path for part in manifest.storage for layer in part.layers}
        has_moved = self._parents[manifest.id] != manifest.parent
        return has_moved or bool((_named(manifest) | layers) & changed)

    def _of_disk(self, disk: Settled) -> Iterator[Step]:
        now = disk.before
        for operation in disk.operations:
            if not isinstance(operation, Replace):
                yield from self._of_operation(now, operation)
                now = after(now, operation)
        for image, entry in disk.inside:
            yield DeleteInside(image, entry.id, entry.name, now.active_path)
        for operation in disk.operations:
            if isinstance(operation, Replace):
                yield from self._of_operation(now, operation)

    def _of_operation(self, disk: DiskLayers, operation: Operation) -> Iterator[Step]:
        match operation:
            case Remove(layer):
                yield RemoveImage(layer.path)
            case Down(top, base, children):
                above = tuple(child.image for child in children)
                job = names.merge_job(names.id_in_overlay(top.path), max(disk.index, 0))
                active = base.path if top.path == disk.active_path else disk.active_path
                yield MergeDown(
                    disk.index, top.image, base.image, above, active, job, self._was_running
                )
                yield from self._move(disk, top, base.image)
            case Up(layer, children, onto):
                yield MergeUp(tuple(child.image for child in children), onto, disk.active_path)
                if layer is not None:
                    yield RemoveImage(layer.path)
            case Replace(copy, origin):
                yield TakePath(copy.path, origin.path)
                yield from self._move(disk, copy, origin.image)

    def _move(self, disk: DiskLayers, gone: Layer, heir: Image) -> Iterator[Step]:
        """Let all that names an image name its heir, then remove it."""
        for path, image in self._moved.items():
            if image.path == gone.path:
                self._moved[path] = heir
        self._moved[gone.path] = heir
        for manifest in self._kept:
            if any(self._moved.get(path) == heir for path in _named(manifest)):
                yield self._retarget(manifest, (gone.path, heir.path))
        if gone.path == disk.active_path:
            yield RecordMerged({disk.index: heir}, {disk.index: gone.image}, self._parents[""])
        yield RemoveImage(gone.path)

    def _retarget(self, manifest: Manifest, changed: tuple[str, ...]) -> Retarget:
        named = _named(manifest)
        here = {path: image for path, image in self._moved.items() if path in named}
        return Retarget(manifest.id, here, changed, self._parents[manifest.id])


def _named(manifest: Manifest) -> set[str]:
    return {part.image.path for part in manifest.storage if part.image}

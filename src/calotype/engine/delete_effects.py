"""What each step of a delete does; nothing undoes them, and each may be done again.

A delete that was cut off is finished by running its steps again from the first. So each looks at
what is there and leaves alone what is done already. The merges are in `merging.py`.
"""

import asyncio
import os
from pathlib import Path

from msgspec.structs import replace

from calotype.engine.merging import merge_down, merge_up, must_be_closed, writable
from calotype.engine.world import Effect, Effects, World
from calotype.errors import HostError, StoreError
from calotype.model.snapshot import StoragePart
from calotype.model.vm import Image, ImageFacts
from calotype.plan.steps import (
    DeleteInside,
    DropSnapshot,
    MergeDown,
    MergeUp,
    RecordMerged,
    RemoveImage,
    RemoveSnapshotFiles,
    Retarget,
    TakePath,
)
from calotype.qemu import image_tool, live_merge
from calotype.store import files, images

# --- snapshots -----------------------------------------------------------------------------------


async def _drop_snapshot(world: World, step: DropSnapshot) -> None:
    world.store.drop_snapshot(world.record.id, step.snapshot)


async def _remove_snapshot_files(world: World, step: RemoveSnapshotFiles) -> None:
    await asyncio.to_thread(world.store.remove_snapshot_files, world.record.id, step.snapshot)


async def _retarget(world: World, step: Retarget) -> None:
    """Write a manifest anew, unless it says all this already."""
    manifest = world.store.manifest(world.record.id, step.snapshot)
    storage = tuple([await asyncio.to_thread(_retargeted, part, step) for part in manifest.storage])
    now = replace(manifest, storage=storage, parent=step.parent)
    if now != manifest:
        world.store.commit(now)


def _retargeted(part: StoragePart, step: Retarget) -> StoragePart:
    """A part on the images of now; only images that were changed are looked at anew."""
    if part.image is None:
        return part
    image = step.images.get(part.image.path, part.image)
    recorded = {layer.path: layer for layer in part.layers}
    if image == part.image and not (recorded.keys() | {image.path}) & set(step.changed):
        return part
    try:
        chain = images.backing_chain(Path(image.path), image.format)
    except (HostError, StoreError):  # it could not be restored before, and cannot be now
        return replace(part, image=image)
    below = chain[1:] if part.kind == "internal" else chain
    layers = tuple(
        recorded[str(path)]
        if str(path) in recorded and str(path) not in step.changed
        else ImageFacts(str(path), format_, images.identify(path, format_))
        for path, format_ in below
    )
    return replace(part, image=image, layers=layers)


async def _record_merged(world: World, step: RecordMerged) -> None:
    record = world.store.record(world.record.id)
    disks = tuple(
        replace(disk, active=step.active[disk.index])
        if disk.active == step.active_before.get(disk.index)
        else disk
        for disk in record.disks
    )
    world.store.save(replace(record, disks=disks, parent=step.parent))


# --- inside, and the user's path -----------------------------------------------------------------


async def _delete_inside(world: World, step: DeleteInside) -> None:
    """Delete one internal snapshot by its id, and see that it was that one."""
    path = Path(step.image.path)
    before = _inside(path)
    if (step.internal_id, step.internal_name) not in before:
        return
    with writable((step.image,), {step.active}):
        if not await _deleted_live(world, step):
            if [name for _, name in before].count(step.internal_name) > 1:
                raise HostError(  # the plan refuses it: somebody made the other one meanwhile
                    f"{path} holds more than one snapshot called {step.internal_name!r}",
                    "qemu-img deletes by name: rename or delete the other one first",
                )
            await image_tool.delete_inside(step.image, step.internal_name)
    before.remove((step.internal_id, step.internal_name))
    if _inside(path) != before:
        raise StoreError(
            f"{path}: not just {step.internal_name!r} was deleted",
            "somebody else changes its snapshots: see `qemu-img snapshot -l`",
        )


async def _deleted_live(world: World, step: DeleteInside) -> bool:
    if world.qemu is None:
        return False
    async with world.controlling() as monitor:
        if not (await live_merge.look(monitor)).has(step.image.path):
            return False
        await live_merge.delete_inside(monitor, step.image, step.internal_id, step.internal_name)
    return True


def _inside(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        return []
    return [(entry.id, entry.name) for entry in images.read_metadata(path).snapshots]


async def _remove_image(world: World, step: RemoveImage) -> None:
    path = Path(step.path)
    if path.exists():
        await must_be_closed(world, (Image(step.path, "qcow2"),))
        images.thaw(path, images.Frozen(images.mode(path), immutable=True))
        path.unlink()
        files.sync_directory(path.parent)


async def _take_path(world: World, step: TakePath) -> None:
    """Give the copy the origin's path as a second name, so that both are right for a while."""
    copy, origin = Path(step.copy), Path(step.origin)
    if not copy.exists() or (origin.exists() and copy.samefile(origin)):
        return
    await must_be_closed(world, (Image(step.copy, "qcow2"), Image(step.origin, "qcow2")))
    if origin.exists():
        images.thaw(origin, images.Frozen(images.mode(origin), immutable=True))
    second = copy.with_name(f"{files.TEMPORARY_PREFIX}{copy.name}")
    second.unlink(missing_ok=True)
    with files.host_errors(origin):
        os.link(copy, second)
        second.replace(origin)
    files.sync_directory(origin.parent)


DELETE_EFFECTS: Effects = {
    DropSnapshot: Effect(_drop_snapshot),
    RemoveSnapshotFiles: Effect(_remove_snapshot_files),
    MergeDown: Effect(merge_down),
    MergeUp: Effect(merge_up),
    DeleteInside: Effect(_delete_inside),
    Retarget: Effect(_retarget),
    RecordMerged: Effect(_record_merged),
    RemoveImage: Effect(_remove_image),
    TakePath: Effect(_take_path),
}

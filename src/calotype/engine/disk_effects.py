"""What the steps do that make, freeze and remove files, and what undoes them."""

import asyncio
import os
from pathlib import Path

from msgspec.structs import replace

from calotype.engine.world import Effect, Effects, World
from calotype.errors import QemuError
from calotype.model.vm import Image, ImageFacts
from calotype.plan.steps import (
    CreateOverlay,
    DiscardImages,
    FreezeImages,
    MakeSnapshotFolder,
    RecordAhead,
    RecordRestored,
)
from calotype.qemu import image_tool, observe
from calotype.store import images


async def _make_folder(world: World, step: MakeSnapshotFolder) -> None:
    world.store.make_snapshot_folder(world.record.id, step.snapshot)


async def _remove_folder(world: World, step: MakeSnapshotFolder) -> None:
    world.store.remove_snapshot_folder(world.record.id, step.snapshot)


async def _create_overlay(_: World, step: CreateOverlay) -> None:
    await image_tool.create_overlay(step.overlay, step.backing, step.size_bytes)


async def _remove_overlay(world: World, step: CreateOverlay) -> None:
    """Remove an overlay, unless the record names it or a device is on it.

    What it stands on is protected where a device is on it, for it must not change any more; where
    that is not known, it may be the one that is written to.
    """
    record = world.store.record(world.record.id)
    is_recorded = step.overlay in {disk.active.path for disk in record.disks}
    is_in_use = os.path.realpath(step.overlay) in await paths_in_use(world)
    if is_in_use:
        await asyncio.to_thread(images.freeze, Path(step.backing.path))
    if is_in_use or is_recorded:
        raise QemuError(
            f"{step.overlay} stays: it is the newest image", "`calotype recover` tries again"
        )
    Path(step.overlay).unlink(missing_ok=True)


async def paths_in_use(world: World) -> set[str]:
    """The image files that the guest's devices are on, their links followed; none without QEMU."""
    if world.qemu is None:
        return set()
    async with world.controlling() as monitor:
        return await observe.active_paths(monitor)


async def _freeze_images(_: World, step: FreezeImages) -> None:
    for path in step.modes_before:
        await asyncio.to_thread(images.freeze, Path(path))


async def _thaw_images(_: World, step: FreezeImages) -> None:
    for path, mode in step.modes_before.items():
        images.thaw(Path(path), images.Frozen(mode, immutable=True))


async def _record_ahead(world: World, step: RecordAhead) -> None:
    record_disks(world, step.active, step.parent)


async def _record_before_switch(world: World, step: RecordAhead) -> None:
    """Record the images from before, but for an overlay whose content could not be merged back."""
    record = world.store.record(world.record.id)
    newest = {disk.active for disk in record.disks}
    in_use = await paths_in_use(world)
    active = {
        index: overlay if overlay in newest and is_needed else step.active_before[index]
        for index, overlay in step.active.items()
        for is_used in (os.path.realpath(overlay.path) in in_use,)
        for is_needed in (is_used or _holds_data(world, overlay),)
    }
    record_disks(world, active, step.parent_before)


def _holds_data(world: World, image: Image) -> bool:
    """Whether something was written to an overlay; where QEMU runs, that it is in use says so."""
    if world.qemu is not None or image.format != "qcow2" or not Path(image.path).exists():
        return False
    return images.read_metadata(Path(image.path)).l2_tables > 0


async def _record_restored(world: World, step: RecordRestored) -> None:
    record_disks(world, step.active, step.parent)


async def _record_before_restore(world: World, step: RecordRestored) -> None:
    record_disks(world, step.active_before, step.parent_before)


def record_disks(world: World, active: dict[int, Image], parent: str | None) -> None:
    """Record which image of each disk is the newest, and which snapshot that descends from."""
    record = world.store.record(world.record.id)
    disks = tuple(
        replace(disk, active=active.get(disk.index, disk.active)) for disk in record.disks
    )
    if (disks, parent) != (record.disks, record.parent):
        world.store.save(replace(record, disks=disks, parent=parent))


async def _discard_images(world: World, step: DiscardImages) -> None:
    named = {disk.active.path for disk in world.store.record(world.record.id).disks}
    for path in step.paths:
        if path not in named:
            Path(path).unlink(missing_ok=True)
    for image, name in step.inside:
        await delete_inside(world, image, name)


async def delete_inside(world: World, image: Image, name: str) -> None:
    """Delete an internal snapshot of ours, by its id; one that is not there is no error."""
    if not Path(image.path).exists():
        return
    metadata = await asyncio.to_thread(images.read_metadata, Path(image.path))
    for entry in metadata.snapshots:
        if entry.name == name and world.qemu is None:
            await image_tool.delete_inside(image, name)
        elif entry.name == name:
            async with world.controlling() as monitor:
                await observe.delete_inside(monitor, image, entry.id, name)


async def chain_of(image: Image) -> tuple[ImageFacts, ...]:
    """An image and what it stands on, with identities, top first."""
    return await asyncio.to_thread(lambda: tuple(observe.image_chain(image)))


DISK_EFFECTS: Effects = {
    MakeSnapshotFolder: Effect(_make_folder, _remove_folder),
    CreateOverlay: Effect(_create_overlay, _remove_overlay),
    FreezeImages: Effect(_freeze_images, _thaw_images),
    RecordAhead: Effect(_record_ahead, _record_before_switch),
    RecordRestored: Effect(_record_restored, _record_before_restore),
    DiscardImages: Effect(_discard_images),
}

"""What each step of a delete does; nothing undoes them, and each may be done again.

A delete that was cut off is finished by running its steps again from the first, perhaps with the VM
off that ran before, or running that was off. So each looks at what is there: the files, the record,
and the QEMU that runs now, if one does. What is done already is left alone.

The one dangerous moment is when a running guest goes over from the top image to the one below: the
guest is stopped, both are made the same, the record names the one below, and only then QEMU
switches. So whichever of the two the record names whenever we die, it has the newest content.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from pathlib import Path

from msgspec.structs import replace

from calotype.engine import launch
from calotype.engine.execute import Effect, Effects
from calotype.engine.progress import Progress
from calotype.errors import ConflictError, HostError, StoreError
from calotype.model.snapshot import StoragePart
from calotype.model.vm import Image, ImageFacts, Process, VmRecord
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
from calotype.qemu import image_tool, live_merge, offline_merge, process
from calotype.qemu.monitor import Monitor
from calotype.store import files, images
from calotype.store.store import Store


class Deleting:
    """A delete under way: what it acts on, and how long its steps took."""

    def __init__(
        self, store: Store, record: VmRecord, qemu: Process | None, progress: Progress
    ) -> None:
        self.store = store
        self.record = record
        self.qemu = qemu
        self.progress = progress
        self.phases_ms: dict[str, float] = {}

    @contextlib.asynccontextmanager
    async def controlling(self) -> AsyncIterator[Monitor]:
        """The monitor of the VM that runs."""
        async with launch.controlling(self.store, self.record) as monitor:
            yield monitor


# --- snapshots -----------------------------------------------------------------------------------


async def _drop_snapshot(deleting: Deleting, step: DropSnapshot) -> None:
    deleting.store.drop_snapshot(deleting.record.id, step.snapshot)


async def _remove_snapshot_files(deleting: Deleting, step: RemoveSnapshotFiles) -> None:
    await asyncio.to_thread(deleting.store.remove_snapshot_files, deleting.record.id, step.snapshot)


async def _retarget(deleting: Deleting, step: Retarget) -> None:
    """Write a manifest anew, unless it says all this already."""
    manifest = deleting.store.manifest(deleting.record.id, step.snapshot)
    storage = tuple([await asyncio.to_thread(_retargeted, part, step) for part in manifest.storage])
    now = replace(manifest, storage=storage, parent=step.parent)
    if now != manifest:
        deleting.store.commit(now)


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


async def _record_merged(deleting: Deleting, step: RecordMerged) -> None:
    record = deleting.store.record(deleting.record.id)
    disks = tuple(
        replace(disk, active=step.active[disk.index])
        if disk.active == step.active_before.get(disk.index)
        else disk
        for disk in record.disks
    )
    deleting.store.save(replace(record, disks=disks, parent=step.parent))


# --- merges --------------------------------------------------------------------------------------


async def _merge_down(deleting: Deleting, step: MergeDown) -> None:
    if not Path(step.top.path).exists():
        return
    recorded = {step.top.path, step.base.path} if _is_switch(step) else {step.active}
    with _writable((step.top, step.base, *step.children), recorded):
        if not await _merged_live(deleting, step) and not _is_recorded(deleting, step):
            _require_stands(step.top, step.base)
            await offline_merge.commit(step.top, step.base, _share(deleting, step.top))
        await _repoint(deleting, step.children, step.base)


async def _merged_live(deleting: Deleting, step: MergeDown) -> bool:
    """Merge in the QEMU that runs, if it has the images open; else say that it has not."""
    if not _is_alive(deleting):
        return False
    async with deleting.controlling() as monitor:
        found = await live_merge.look(monitor)
        if not found.has(step.top.path):
            await _resume(monitor, step)
            return found.has(step.base.path)
        if found.chain(step.top.path):
            _record_active(deleting, step, step.top)
        if await live_merge.status(monitor, step.job) is None:
            if not found.is_below_a_device(step.top.path):
                await live_merge.close(monitor, step.top)
                await _resume(monitor, step)
                return True
            await live_merge.begin(monitor, step.job, step.top, step.base)
        await _carry_on(deleting, monitor, step)
    return True


async def _carry_on(deleting: Deleting, monitor: Monitor, step: MergeDown) -> None:
    """See a job through that was begun, by us or by one who died since."""
    share = _share(deleting, step.top)
    if _is_switch(step):
        if await live_merge.reached(monitor, step.job, "ready", share) == "ready":
            await _switch(deleting, monitor, step)
        _record_active(deleting, step, step.base)
    await live_merge.end(monitor, step.job, step.top, share)
    await _resume(monitor, step)


def _is_switch(step: MergeDown) -> bool:
    """Whether the guest writes to the top image, and to the one below afterwards."""
    return step.active == step.base.path


async def _switch(deleting: Deleting, monitor: Monitor, step: MergeDown) -> None:
    """Let the guest go over to the base: stopped, so that the record is right at every moment."""
    is_running = (await monitor.execute("query-status"))["running"]
    if is_running:
        await monitor.execute("stop")
    try:
        await live_merge.caught_up(monitor, step.job)
        _record_active(deleting, step, step.base)
        try:
            await monitor.execute("job-complete", id=step.job)
            await live_merge.reached(monitor, step.job, "concluded", _unheard)
        except BaseException:
            if (await live_merge.look(monitor)).chain(step.top.path):
                _record_active(deleting, step, step.top)
            raise
    finally:
        if is_running:
            await monitor.execute("cont")


async def _resume(monitor: Monitor, step: MergeDown) -> None:
    """Let a guest run that one who died in the switch has left stopped."""
    if _is_switch(step) and step.was_running:
        status = (await monitor.execute("query-status"))["status"]
        if status == "paused":
            await monitor.execute("cont")


def _record_active(deleting: Deleting, step: MergeDown, image: Image) -> None:
    """Record that a disk's newest content is in *image*, if it is in one of the step's two."""
    if not _is_switch(step):
        return
    record = deleting.store.record(deleting.record.id)
    disks = tuple(
        replace(disk, active=image)
        if disk.index == step.disk and disk.active in (step.top, step.base)
        else disk
        for disk in record.disks
    )
    if disks != record.disks:
        deleting.store.save(replace(record, disks=disks))


def _is_recorded(deleting: Deleting, step: MergeDown) -> bool:
    """Whether the base is the newest by now: then the top is old, and must not be merged again."""
    if not _is_switch(step):
        return False
    record = deleting.store.record(deleting.record.id)
    return any(disk.index == step.disk and disk.active == step.base for disk in record.disks)


async def _merge_up(deleting: Deleting, step: MergeUp) -> None:
    await _must_be_closed(deleting, step.children)
    with _writable(step.children, {step.active}):
        for child in step.children:
            if _backing(child) != step.onto:
                below = filter(None, (_backing(child),))
                await offline_merge.rebase(child, step.onto, _share(deleting, *below))
            _require_stands(child, step.onto)


async def _repoint(deleting: Deleting, children: Iterable[Image], base: Image) -> None:
    """Put onto *base* what QEMU has not put there itself."""
    for child in children:
        if _backing(child) != base:
            await _must_be_closed(deleting, (child,))
            await offline_merge.repoint(child, base)
        _require_stands(child, base)


async def _must_be_closed(deleting: Deleting, closed: Iterable[Image]) -> None:
    if not _is_alive(deleting):
        return
    async with deleting.controlling() as monitor:
        found = await live_merge.look(monitor)
    for image in closed:
        if found.has(image.path):
            raise ConflictError(
                f"the VM has {image.path} open", f"`calotype stop {deleting.record.name}` first"
            )


def _is_alive(deleting: Deleting) -> bool:
    return deleting.qemu is not None and process.is_alive(deleting.qemu)


def _share(deleting: Deleting, *copied: Image) -> offline_merge.Share:
    """Tell how many bytes of these images are merged."""
    whole = sum(images.allocated_bytes(Path(image.path)) for image in copied)
    return lambda share: deleting.progress("merging", round(share * whole), whole)


def _unheard(_: float) -> None:
    pass


def _backing(image: Image) -> Image | None:
    """What an image stands on, as its header says."""
    below = images.backing_chain(Path(image.path), image.format)[1:2]
    return Image(str(below[0][0]), below[0][1]) if below else None


def _require_stands(image: Image, onto: Image | None) -> None:
    found = _backing(image)
    if found != onto:
        raise StoreError(
            f"{image.path} stands on {found.path if found else 'nothing'},"
            f" not on {onto.path if onto else 'nothing'}",
            "somebody else changes these images; the merge was not gone on with",
            path=image.path,
        )


@contextlib.contextmanager
def _writable(changed: Iterable[Image], active: Collection[str]) -> Iterator[None]:
    """Thaw images for the length of a block; all but those *active* are frozen in the end."""
    paths = [Path(image.path) for image in changed if Path(image.path).exists()]
    for path in paths:
        mode = images.mode(path)
        images.thaw(path, images.Frozen(mode | 0o600, immutable=True))
    yield
    for path in paths:
        if str(path) not in active:
            images.freeze(path)


# --- inside, and the user's path -----------------------------------------------------------------


async def _delete_inside(deleting: Deleting, step: DeleteInside) -> None:
    """Delete one internal snapshot by its id, and see that it was that one."""
    path = Path(step.image.path)
    before = _inside(path)
    if (step.internal_id, step.internal_name) not in before:
        return
    with _writable((step.image,), {step.active}):
        if not await _deleted_live(deleting, step):
            if [name for _, name in before].count(step.internal_name) > 1:
                raise HostError(
                    f"{path} holds more than one snapshot called {step.internal_name!r}",
                    "qemu-img deletes by name: rename or delete the other one first",
                )
            await image_tool.delete_inside(step.image, step.internal_name)
    before.remove((step.internal_id, step.internal_name))
    if _inside(path) != before:
        raise StoreError(f"{path}: another snapshot than {step.internal_name!r} was deleted")


async def _deleted_live(deleting: Deleting, step: DeleteInside) -> bool:
    if not _is_alive(deleting):
        return False
    async with deleting.controlling() as monitor:
        if not (await live_merge.look(monitor)).has(step.image.path):
            return False
        await live_merge.delete_inside(monitor, step.image, step.internal_id, step.internal_name)
    return True


def _inside(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        return []
    return [(entry.id, entry.name) for entry in images.read_metadata(path).snapshots]


async def _remove_image(deleting: Deleting, step: RemoveImage) -> None:
    path = Path(step.path)
    if path.exists():
        await _must_be_closed(deleting, (Image(step.path, "qcow2"),))
        images.thaw(path, images.Frozen(images.mode(path), immutable=True))
        path.unlink()
        files.sync_directory(path.parent)


async def _take_path(deleting: Deleting, step: TakePath) -> None:
    """Give the copy the origin's path as a second name, so that both are right for a while."""
    copy, origin = Path(step.copy), Path(step.origin)
    if not copy.exists() or (origin.exists() and copy.samefile(origin)):
        return
    await _must_be_closed(deleting, (Image(step.copy, "qcow2"), Image(step.origin, "qcow2")))
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
    MergeDown: Effect(_merge_down),
    MergeUp: Effect(_merge_up),
    DeleteInside: Effect(_delete_inside),
    Retarget: Effect(_retarget),
    RecordMerged: Effect(_record_merged),
    RemoveImage: Effect(_remove_image),
    TakePath: Effect(_take_path),
}

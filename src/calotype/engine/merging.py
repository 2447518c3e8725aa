"""Merge images in the course of a delete: in the QEMU that runs, or with qemu-img.

Each effect looks at what is there, the files, the record and the QEMU that runs now, and leaves
alone what is done already: a merge that was cut off is begun again, perhaps with the VM off that
ran before, or running that was off.

The one dangerous moment, when a running guest goes over from the top image to the one below, is in
`switching.py`.
"""

import contextlib
import shlex
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from calotype.engine import switching
from calotype.engine.world import World
from calotype.errors import CalotypeError, ConflictError, StoreError
from calotype.model.vm import Image
from calotype.plan.steps import MergeDown, MergeUp
from calotype.qemu import image_tool, live_merge, offline_merge
from calotype.qemu.monitor import Monitor
from calotype.store import images


async def merge_down(world: World, step: MergeDown) -> None:
    """Merge the top image into its base, and put what stands on it onto the base."""
    if not Path(step.top.path).exists():
        return
    recorded = {step.top.path, step.base.path} if _is_switch(step) else {step.active}
    with writable((step.top, step.base, *step.children), recorded):
        if not await _merged_live(world, step) and not _is_recorded(world, step):
            _require_stands(step.top, step.base)
            await offline_merge.commit(step.top, step.base, _share(world, step.top))
        await _repoint(world, step.children, step.base)


async def _merged_live(world: World, step: MergeDown) -> bool:
    """Merge in the QEMU that runs, if it has the images open; else say that it has not."""
    if world.qemu is None:
        return False
    async with world.controlling() as monitor:
        found = await live_merge.look(monitor)
        if not found.has(step.top.path):
            await _resume(monitor, step)
            return found.has(step.base.path)
        if found.chain(step.top.path):
            _record_active(world, step, step.top)
        if await live_merge.status(monitor, step.job) is None:
            if not found.is_below_a_device(step.top.path):
                await live_merge.close(monitor, step.top)
                await _resume(monitor, step)
                return True
            await live_merge.begin(monitor, step.job, step.top, step.base)
        await _carry_on(world, monitor, step)
    return True


async def _carry_on(world: World, monitor: Monitor, step: MergeDown) -> None:
    """See a job through that was begun, by us or by one who died since."""
    share = _share(world, step.top)
    if _is_switch(step):
        if await live_merge.reached(monitor, step.job, "ready", share) == "ready":
            await switching.switch(world, monitor, step.job, step.top, step.base)
        _record_active(world, step, step.base)
    await live_merge.end(monitor, step.job, step.top, share)
    await _resume(monitor, step)


def _is_switch(step: MergeDown) -> bool:
    """Whether the guest writes to the top image, and to the one below afterwards."""
    return step.active == step.base.path


async def _resume(monitor: Monitor, step: MergeDown) -> None:
    """Let a guest run that one who died in the switch has left stopped."""
    if _is_switch(step) and step.was_running:
        status = (await monitor.execute("query-status"))["status"]
        if status == "paused":
            await monitor.execute("cont")


def _record_active(world: World, step: MergeDown, image: Image) -> None:
    """Record that the disk's newest content is in *image*, if it is in one of the step's two."""
    if _is_switch(step):
        switching.record_newest(world, image, {step.top, step.base})


def _is_recorded(world: World, step: MergeDown) -> bool:
    """Whether the base is the newest by now: then the top is old, and must not be merged again."""
    if not _is_switch(step):
        return False
    record = world.store.record(world.record.id)
    return any(disk.index == step.disk and disk.active == step.base for disk in record.disks)


async def merge_up(world: World, step: MergeUp) -> None:
    """Put images onto another one, each keeping its content."""
    await must_be_closed(world, step.children)
    with writable(step.children, {step.active}):
        for child in step.children:
            if _backing(child) != step.onto:
                below = filter(None, (_backing(child),))
                await offline_merge.rebase(child, step.onto, _share(world, *below))
            _require_stands(child, step.onto)


async def _repoint(world: World, children: Iterable[Image], base: Image) -> None:
    """Put onto *base* what QEMU has not put there itself."""
    for child in children:
        if _backing(child) != base:
            await must_be_closed(world, (child,))
            await offline_merge.repoint(child, base)
        _require_stands(child, base)


async def must_be_closed(world: World, closed: Iterable[Image]) -> None:
    """Refuse to go on while the VM has one of these images open.

    Raises:
        ConflictError: It has.
    """
    if world.qemu is None:
        return
    async with world.controlling() as monitor:
        found = await live_merge.look(monitor)
    for image in closed:
        if found.has(image.path):
            raise ConflictError(
                f"the VM has {image.path} open",
                f"`calotype stop {shlex.quote(world.record.name)}` first",
            )


def _share(world: World, *copied: Image) -> image_tool.Share:
    """Tell how many bytes of these images are merged."""
    whole = sum(images.allocated_bytes(Path(image.path)) for image in copied)
    return lambda share: world.progress("merging", round(share * whole), whole)


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
def writable(changed: Iterable[Image], active: Collection[str]) -> Iterator[None]:
    """Thaw images for the length of a block; all but those *active* are frozen in the end.

    If the block fails they are frozen too, as far as that goes: its error is the one that is told.
    """
    paths = [Path(image.path) for image in changed if Path(image.path).exists()]
    try:
        for path in paths:
            mode = images.mode(path)
            images.thaw(path, images.Frozen(mode | 0o600, immutable=True))
        yield
    except BaseException:
        with contextlib.suppress(CalotypeError):
            _freeze(paths, active)
        raise
    _freeze(paths, active)


def _freeze(paths: Iterable[Path], active: Collection[str]) -> None:
    for path in paths:
        if str(path) not in active and path.exists():
            images.freeze(path)

"""Let a running guest go over from an overlay to the image below: the end of a merge.

A job has copied the overlay into the image below while the guest wrote on. At every moment the
record must name the image with the newest content, for QEMU may die at any: but which of the two
that is changes when QEMU switches, and a write that comes after one and before the other would be
lost. So the guest stands still: both images are made the same, the record names the one below, QEMU
switches, and the guest runs. Whenever we die, either image will do.

A guard stands by, as in every pause. It lets the guest run when we cannot, and has QEMU switch
first if the record says that it has. So the record is changed only while the guard still waits:
changed later, by one who was stopped meanwhile, it would not name what the guest has written since.
Once begun the switch is seen through: being cancelled ends what follows, not the switch.
"""

import asyncio
import contextlib

from msgspec.structs import replace

from calotype.engine import launch
from calotype.engine.world import World
from calotype.errors import CalotypeError, HostError, QemuError, StoreError
from calotype.model.vm import Image
from calotype.qemu import image_tool, live_merge
from calotype.qemu.cancelling import seen_through
from calotype.qemu.guarding import Switch
from calotype.qemu.monitor import Monitor

LIMIT_S = 5.0
"""How long the guest may stand still; 12 to 58 ms were measured."""

_RECORD_SHARE = 0.75
"""After which share of that the record is not changed any more: the guard may soon act."""


async def switch(world: World, monitor: Monitor, job: str, top: Image, base: Image) -> None:
    """Let the guest go over from *top* to *base*; the job that merges them is ready.

    Raises:
        QemuError: QEMU failed, or took too long; the guest runs, on the image that is recorded,
            and the job is given up: *base* may be frozen.
        HostError: No guard can stand by, or the record cannot be written; likewise.
    """
    try:
        await _switch(world, monitor, job, top, base)
    except CalotypeError:
        with contextlib.suppress(CalotypeError):  # the first error is the error
            await live_merge.give_up(monitor, job)
        raise


async def _switch(world: World, monitor: Monitor, job: str, top: Image, base: Image) -> None:
    if not (await monitor.execute("query-status"))["running"]:
        await seen_through(go_over(world, monitor, job, top, base, _in_time(LIMIT_S)))
        return
    folder = world.store.folder(world.record.id)
    async with launch.guarded(world.store, world.record, monitor) as guard:
        until = _in_time(LIMIT_S * _RECORD_SHARE)
        await guard.arm(LIMIT_S, Switch(str(folder / "record.json"), base.path, job))
        await seen_through(paused(world, monitor, job, top, base, until))
        if not await guard.stand_down():
            raise QemuError(
                f"the switch from {top.path} took too long, and the guard has ended it",
                "`calotype recover` sees it through",
            )


def _in_time(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def paused(
    world: World, monitor: Monitor, job: str, top: Image, base: Image, until: float
) -> None:
    """Let the guest go over while it stands still, and run in any case."""
    await monitor.execute("stop")
    try:
        await go_over(world, monitor, job, top, base, until)
    finally:
        await monitor.execute("cont")


async def go_over(
    world: World, monitor: Monitor, job: str, top: Image, base: Image, until: float
) -> None:
    """The guest stands still: make both the same, record the one below, have QEMU switch.

    All is given up if it is later than *until* before the record is changed.
    """
    try:
        async with asyncio.timeout_at(until):
            await live_merge.caught_up(monitor, job)
    except TimeoutError as error:
        raise _too_late(top) from error
    if asyncio.get_running_loop().time() > until:
        raise _too_late(top)
    try:
        record_newest(world, base, {top, base})
        await monitor.execute("job-complete", id=job)
        await live_merge.reached(monitor, job, "concluded", image_tool.unheard)
    except CalotypeError:
        if (await live_merge.look(monitor)).chain(top.path):
            with contextlib.suppress(HostError, StoreError):  # it is written before its picture
                record_newest(world, top, {top, base})
            raise


def _too_late(top: Image) -> QemuError:
    return QemuError(
        f"the last of {top.path} could not be merged in {LIMIT_S:g} s",
        "`calotype recover` tries again",
    )


def record_newest(world: World, newest: Image, of: set[Image]) -> None:
    """Record that the newest content of a disk is in *newest*, if it is in one *of* those."""
    record = world.store.record(world.record.id)
    disks = tuple(
        replace(disk, active=newest) if disk.active in of else disk for disk in record.disks
    )
    if disks != record.disks:
        world.store.save(replace(record, disks=disks))

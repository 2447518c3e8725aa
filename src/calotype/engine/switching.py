"""Let a running guest go over from an overlay to the image below: the end of a merge.

A job has copied the overlay into the image below while the guest wrote on. At every moment the
record must name the image with the newest content, for QEMU may die at any: but which of the two
that is changes when QEMU switches, and a write that comes after one and before the other would be
lost. So the guest stands still: both images are made the same, the record names the one below, QEMU
switches, and the guest runs. Whenever we die, either image will do.

A guard stands by, as in every pause. It lets the guest run when we cannot, and has QEMU switch
first if the record says that it has. Once begun the switch is seen through: being cancelled ends
what follows, not the switch.
"""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from msgspec.structs import replace

from calotype.engine import launch
from calotype.engine.world import World
from calotype.errors import CalotypeError, QemuError
from calotype.model.vm import Image
from calotype.qemu import live_merge
from calotype.qemu.guarding import Switch
from calotype.qemu.monitor import Monitor

LIMIT_S = 5.0
"""How long the guest may stand still; 12 to 58 ms were measured."""


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
        await _seen_through(_go_over(world, monitor, job, top, base))
        return
    folder = world.store.folder(world.record.id)
    async with launch.guarded(world.store, world.record, monitor) as guard:
        await guard.arm(LIMIT_S, Switch(str(folder / "record.json"), base.path, job))
        await _seen_through(_paused(world, monitor, job, top, base))
        if not await guard.stand_down():
            raise QemuError(
                f"the switch from {top.path} took too long, and the guard has ended it",
                "`calotype recover` sees it through",
            )


async def _paused(world: World, monitor: Monitor, job: str, top: Image, base: Image) -> None:
    await monitor.execute("stop")
    try:
        await _go_over(world, monitor, job, top, base)
    finally:
        await monitor.execute("cont")


async def _go_over(world: World, monitor: Monitor, job: str, top: Image, base: Image) -> None:
    """The guest stands still: make both the same, record the one below, have QEMU switch."""
    try:
        async with asyncio.timeout(LIMIT_S):
            await live_merge.caught_up(monitor, job)
    except TimeoutError as error:
        raise QemuError(
            f"the last of {top.path} could not be merged in {LIMIT_S:g} s",
            "`calotype recover` tries again",
        ) from error
    record_newest(world, base, {top, base})
    try:
        await monitor.execute("job-complete", id=job)
        await live_merge.reached(monitor, job, "concluded", unheard)
    except QemuError:
        if (await live_merge.look(monitor)).chain(top.path):
            record_newest(world, top, {top, base})
        raise


def record_newest(world: World, newest: Image, of: set[Image]) -> None:
    """Record that the newest content of a disk is in *newest*, if it is in one *of* those."""
    record = world.store.record(world.record.id)
    disks = tuple(
        replace(disk, active=newest) if disk.active in of else disk for disk in record.disks
    )
    if disks != record.disks:
        world.store.save(replace(record, disks=disks))


def unheard(_: float) -> None:
    """Hear how far a merge is, and tell nobody."""


async def _seen_through(work: Coroutine[Any, Any, None]) -> None:
    """Do *work* to its end, however often we are cancelled meanwhile, and be cancelled then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled

"""Undoing the instant of a take: what was written since is merged back, the guest running on.

`plan.abandon` says what has to be done by what is found here. Each step may be run again: a save
that is cancelled, an overlay that is merged and a snapshot that is deleted are no errors.
"""

import asyncio
import contextlib
from collections.abc import Iterable
from pathlib import Path

from calotype.engine.agent_effects import thaw
from calotype.engine.disk_effects import delete_inside
from calotype.engine.switching import record_newest, switch
from calotype.engine.world import Effect, Effects, World
from calotype.errors import QemuError
from calotype.guard import AT_REST
from calotype.model.vm import Image
from calotype.plan.abandon import OverlaySight, Qemu, plan_abandon
from calotype.plan.steps import (
    DeleteMade,
    EndPause,
    MergeBack,
    MergeBackOffline,
    PassInstant,
    SwitchToOverlay,
    TakeBack,
    ThawFileSystems,
)
from calotype.qemu import image_tool, live_merge, migration, process
from calotype.qemu.monitor import CommandRefused, Monitor
from calotype.store import images


async def abandon_instant(world: World, step: PassInstant) -> None:
    """Undo what a paused window did, as far as it did anything.

    Raises:
        QemuError: Something could not be undone; every other part was.
        HostError: Likewise.
    """
    overlays = [each.overlay for each in step.actions if isinstance(each, SwitchToOverlay)]
    plan = plan_abandon(step, _who_runs(world), _look_at(world, overlays), settled=world.is_settled)
    failures: list[Exception] = []
    for part in plan:
        try:
            await ABANDON_EFFECTS[type(part)].apply(world, part)
        except Exception as failure:  # noqa: BLE001 - one disk must not keep another from its undo
            failures.append(failure)
    if failures:
        for other in failures[1:]:
            failures[0].add_note(str(other))
        raise failures[0]


def _who_runs(world: World) -> Qemu:
    if world.qemu is None:
        return "gone"
    return "same" if world.qemu == world.began_with else "other"


def _look_at(world: World, overlays: Iterable[str]) -> dict[str, OverlaySight]:
    record = world.store.record(world.record.id)
    newest = {disk.active.path for disk in record.disks}
    return {
        path: OverlaySight(is_newest=path in newest) for path in overlays if Path(path).exists()
    }


async def _end_pause(world: World, step: EndPause) -> None:
    """Let the guest run as soon as can be; that the save is taken down is waited for afterwards."""
    _unprotect(world, step)  # first: a QEMU whose main loop waits for it answers nothing
    async with world.controlling() as monitor:
        await monitor.execute("migrate_cancel")
        status = (await monitor.execute("query-status"))["status"]
        if step.let_run and status in AT_REST:
            await monitor.execute("cont")
        await migration.torn_down(monitor)
        _unprotect(world, step)  # and for good, now that no save can protect it any more
        if step.let_run:
            await _let_run(monitor)
        elif status == "postmigrate":
            await monitor.execute("blockdev-set-active", active=True)


def _unprotect(world: World, step: EndPause) -> None:
    if step.unprotect and world.qemu is not None:
        process.unprotect_memory(world.qemu.pid)


async def _let_run(monitor: Monitor) -> None:
    """Once more: an ordinary migration that was just completing may have stopped it again."""
    if (await monitor.execute("query-status"))["status"] in AT_REST:
        await monitor.execute("cont")


async def _merge_back(world: World, step: MergeBack) -> None:
    """Merge an overlay that a device is on into its base, which takes its place."""
    overlay = Image(step.overlay, "qcow2")
    async with world.controlling() as monitor:
        is_in_use = bool((await live_merge.look(monitor)).chain(step.overlay))
        is_begun = await live_merge.status(monitor, step.job) is not None
        if not is_begun and not is_in_use:
            return
        await asyncio.to_thread(_thaw, step)
        if not is_begun:
            await live_merge.begin(monitor, step.job, overlay, step.base)
        try:
            reached = await live_merge.reached(monitor, step.job, "ready", image_tool.unheard)
        except QemuError:  # it failed, perhaps when it was to go over: the record may be ahead
            if (await live_merge.look(monitor)).chain(step.overlay):
                record_newest(world, overlay, {overlay, step.base})
            raise
        if reached == "ready":
            await switch(world, monitor, step.job, overlay, step.base)
        record_newest(world, step.base, {overlay, step.base})
        await live_merge.end(monitor, step.job, overlay, image_tool.unheard)


def _thaw(step: MergeBack | MergeBackOffline) -> None:
    """Let the base be written again; an undo that could not merge earlier has frozen it."""
    images.thaw(Path(step.base.path), images.Frozen(step.base_mode, immutable=True))


async def _merge_back_offline(_: World, step: MergeBackOffline) -> None:
    await asyncio.to_thread(_thaw, step)
    await image_tool.commit(step.overlay)


async def _take_back(world: World, step: TakeBack) -> None:
    """What the action had not done, for the transaction never happened, QEMU does not find."""
    async with world.controlling() as monitor:
        with contextlib.suppress(CommandRefused):
            await monitor.send(step.command, step.arguments)


async def _delete_made(world: World, step: DeleteMade) -> None:
    if world.qemu is None and Path(step.image.path).exists():
        await image_tool.mend(step.image)  # QEMU may have died in the midst of making it
    await delete_inside(world, step.image, step.name)


ABANDON_EFFECTS: Effects = {
    EndPause: Effect(_end_pause),
    ThawFileSystems: Effect(thaw),
    MergeBack: Effect(_merge_back),
    MergeBackOffline: Effect(_merge_back_offline),
    TakeBack: Effect(_take_back),
    DeleteMade: Effect(_delete_made),
}

"""Undoing the instant of a take: what was written since is merged back, the guest running on.

`plan.abandon` says what has to be done by what is found here. Each step may be run again: a save
that is cancelled, an overlay that is merged and a snapshot that is deleted are no errors.
"""

import asyncio
import contextlib
from collections.abc import Iterable
from pathlib import Path

from calotype.engine.disk_effects import delete_inside, paths_in_use
from calotype.engine.world import Effect, Effects, World
from calotype.errors import QemuError
from calotype.plan.abandon import OverlaySight, Qemu, plan_abandon
from calotype.plan.steps import (
    DeleteMade,
    EndPause,
    MergeBack,
    MergeBackOffline,
    PassInstant,
    SwitchToOverlay,
)
from calotype.qemu import image_tool, migration, observe
from calotype.qemu.monitor import CommandRefused, Monitor
from calotype.store import images

_POLL_S = 0.02
_STALLED_S = 60.0
_AT_REST = ("paused", "postmigrate", "finish-migrate")


async def abandon_instant(world: World, step: PassInstant) -> None:
    """Undo what a paused window did, as far as it did anything.

    Raises:
        QemuError: Something could not be undone; every other part was.
        HostError: Likewise.
    """
    overlays = [each.overlay for each in step.actions if isinstance(each, SwitchToOverlay)]
    plan = plan_abandon(
        step, _who_runs(world), await _look_at(world, overlays), settled=world.is_settled
    )
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


async def _look_at(world: World, overlays: Iterable[str]) -> dict[str, OverlaySight]:
    in_use = await paths_in_use(world)
    return {path: OverlaySight(in_use=path in in_use) for path in overlays if Path(path).exists()}


async def _end_pause(world: World, step: EndPause) -> None:
    """Let the guest run as soon as can be; that the save is taken down is waited for afterwards."""
    async with world.controlling() as monitor:
        await monitor.execute("migrate_cancel")
        status = (await monitor.execute("query-status"))["status"]
        if step.let_run and status in _AT_REST:
            await monitor.execute("cont")
        await migration.torn_down(monitor)
        if step.let_run:
            await _let_run(monitor)
        elif status == "postmigrate":
            await monitor.execute("blockdev-set-active", active=True)


async def _let_run(monitor: Monitor) -> None:
    """Once more: an ordinary migration that was just completing may have stopped it again."""
    if (await monitor.execute("query-status"))["status"] in _AT_REST:
        await monitor.execute("cont")


async def _merge_back(world: World, step: MergeBack) -> None:
    """Commit an overlay that a device is on into its base, which takes its place (block-commit)."""
    async with world.controlling() as monitor:
        await _finish_earlier(monitor, step.job)
        standing = await observe.find_standing(monitor, step.overlay)
        if standing is None:
            return
        await asyncio.to_thread(_thaw, step)
        await monitor.execute(
            "block-commit",
            job_id=step.job,
            device=standing.node,
            base_node=standing.below,
            auto_dismiss=False,
        )
        await _job_state(monitor, step.job, "ready")
        await monitor.execute("job-complete", id=step.job)
        await _job_state(monitor, step.job, "concluded")
        await monitor.execute("job-dismiss", id=step.job)


async def _finish_earlier(monitor: Monitor, job_id: str) -> None:
    """End a job that somebody who died had begun: completed if it is ready, else cancelled."""
    jobs = {job["id"]: job for job in await monitor.execute("query-jobs")}
    if job_id not in jobs:
        return
    if jobs[job_id]["status"] != "concluded":
        with contextlib.suppress(CommandRefused):  # it may have concluded in this moment
            await monitor.execute("block-job-cancel", device=job_id, force=True)
    with contextlib.suppress(QemuError):  # that it failed is told by what it left undone
        await _job_state(monitor, job_id, "concluded")
        await monitor.execute("job-dismiss", id=job_id)


async def _job_state(monitor: Monitor, job_id: str, wanted: str) -> None:
    """Wait until a job is in the state *wanted*; one that concludes with an error has failed."""
    done_bytes, moved = -1, asyncio.get_running_loop().time()
    while True:
        jobs = {job["id"]: job for job in await monitor.execute("query-jobs")}
        job, now = jobs[job_id], asyncio.get_running_loop().time()
        if job["current-progress"] != done_bytes:
            done_bytes, moved = job["current-progress"], now
        elif now - moved > _STALLED_S:
            raise QemuError(
                f"the job {job_id} has not moved for {_STALLED_S:g} s",
                "`calotype recover` tries again",
            )
        if "error" in job and job["status"] == "concluded":
            await monitor.execute("job-dismiss", id=job_id)
            raise QemuError(
                f"what the guest wrote cannot be merged back: {job['error']}",
                "free some space; then `calotype recover`",
                qemu=job["error"],
            )
        if job["status"] == wanted:
            return
        await asyncio.sleep(_POLL_S)


def _thaw(step: MergeBack | MergeBackOffline) -> None:
    """Let the base be written again; an undo that could not merge earlier has frozen it."""
    images.thaw(Path(step.base.path), images.Frozen(step.base_mode, immutable=True))


async def _merge_back_offline(_: World, step: MergeBackOffline) -> None:
    await asyncio.to_thread(_thaw, step)
    await image_tool.commit(step.overlay)


async def _delete_made(world: World, step: DeleteMade) -> None:
    await delete_inside(world, step.image, step.name)


ABANDON_EFFECTS: Effects = {
    EndPause: Effect(_end_pause),
    MergeBack: Effect(_merge_back),
    MergeBackOffline: Effect(_merge_back_offline),
    DeleteMade: Effect(_delete_made),
}

"""The operations, each from beginning to end: READ THIS FIRST.

`take` is the pattern of all of them: observe what is there, let a pure function plan, refuse what
has blockers, and have `execute` run the plan's steps, which undoes what it began if any fails.

    observe -> plan -> prepare -> instant -> finish -> commit

`changing` lets one operation at a time at a VM, and brings to an end first what an earlier one left
half done; `carry_out` journals the steps. What a step does stands in the tables that `effects.py`
joins; what the steps are and in which order, in `calotype.plan`.
"""

import contextlib
import secrets
import shlex
from datetime import UTC, datetime
from typing import NamedTuple

from msgspec.structs import replace

from calotype.engine import agents, finding, launch
from calotype.engine.changing import carry_out, changing
from calotype.engine.lifecycle import finish, must_run
from calotype.engine.progress import Progress, silent
from calotype.engine.recover import Recovered
from calotype.engine.recover import recover as recover_vm
from calotype.engine.restore_effects import Restoring
from calotype.engine.take_effects import Taking
from calotype.errors import (
    BlockedError,
    CalotypeError,
    QemuError,
)
from calotype.formats import argv as command_line
from calotype.formats.argv import CommandLine
from calotype.model import names
from calotype.model.snapshot import Manifest
from calotype.model.vm import Facts, Process, VmRecord
from calotype.plan.preflight import as_error as mismatched
from calotype.plan.restore import plan_restore
from calotype.plan.restore_plan import Definition, RestorePlan, RestoreRequest
from calotype.plan.take import plan_take
from calotype.plan.take_plan import TakePlan, TakeRequest, as_error
from calotype.qemu import observe
from calotype.qemu.cancelling import seen_through, shielded
from calotype.qemu.monitor import Monitor
from calotype.store.store import Store

# --- take ----------------------------------------------------------------------------------------


async def plan_only(
    store: Store, name: str, request: TakeRequest, *, patience_s: float = 5.0
) -> TakePlan:
    """Say what `take` would do; nothing is changed, and its monitor not waited for any longer."""
    record = store.find(name)
    qemu = must_run(store, record)
    launch.refuse_limited(store, record, "take")
    async with launch.looking(store, record, patience_s) as monitor:
        _, plan = await _observe_and_plan(store, record, qemu, monitor, request)
    return plan


async def take(
    store: Store,
    name: str,
    request: TakeRequest,
    *,
    tag: str = "",
    description: str = "",
    progress: Progress = silent,
) -> Manifest:
    """Take a system snapshot of a running VM.

    Args:
        store: Where it is kept.
        name: The VM.
        request: What is to be part of it, and how.
        tag: The user's name for it; need not be unique.
        description: Free text.
        progress: Told how far it is.

    Returns:
        The manifest of the snapshot, which is durable by then.

    Raises:
        NotFoundError: There is no such VM.
        ConflictError: The VM does not run, or somebody else is changing it.
        BlockedError: The plan has blockers; nothing was changed.
        PauseLimitError: The pause grew too long; all was undone.
        QemuError: QEMU refused or failed; all was undone.
        HostError: A file could not be made or read; all was undone.
    """
    async with changing(store, name, "take", progress=progress) as record:
        qemu = must_run(store, record)
        launch.refuse_limited(store, record, "take")
        async with launch.controlling(store, record) as monitor:
            facts, plan = await _observe_and_plan(store, record, qemu, monitor, request)
            if plan.blockers:
                raise as_error(name, plan)
            definition = _definition(record)
            taking = Taking(
                store, record, monitor, qemu, facts, plan, definition, tag, description, progress
            )
            await carry_out(taking, "take", plan.snapshot, plan.snapshot, plan.steps)
    assert taking.manifest is not None
    return taking.manifest


async def _observe_and_plan(
    store: Store, record: VmRecord, qemu: Process, monitor: Monitor, request: TakeRequest
) -> tuple[Facts, TakePlan]:
    facts = await observe.observe(monitor, record, qemu, store.root)
    if request.quiesce and facts.run_state == "running":
        facts = replace(facts, agent=await agents.look(record))
    return facts, plan_take(facts, record, request, secrets.token_hex(names.ID_LENGTH // 2))


# --- restore -------------------------------------------------------------------------------------


class Restored(NamedTuple):
    """What a restore did."""

    manifest: Manifest
    plan: RestorePlan
    restore_ms: float
    pause_ms: float | None
    """How long the going over took, of a VM that ran; None where it did not run."""
    clock_behind_s: float | None
    """By how much the guest's clock was behind when it was let run; None where it boots."""
    is_clock_set: bool
    warnings: tuple[str, ...]


async def restore_plan_only(
    store: Store, name: str, snapshot: str, request: RestoreRequest, *, stop_first: bool = False
) -> RestorePlan:
    """Say what `restore` would do, or what it would when the VM is stopped; nothing is changed."""
    record = store.find(name)
    async with contextlib.AsyncExitStack() as stack:
        monitor = None
        if launch.is_running(store, record) and not stop_first:
            monitor = await stack.enter_async_context(launch.looking(store, record))
        return await _plan_restore(store, record, monitor, snapshot, request)


async def restore(
    store: Store,
    name: str,
    snapshot: str,
    request: RestoreRequest,
    *,
    progress: Progress = silent,
) -> Restored:
    """Put a VM back to a snapshot, and let it run if it did then.

    A VM that runs goes over from its QEMU to a new one that was prepared beside it.

    Args:
        store: Where it is kept.
        name: The VM.
        snapshot: The snapshot's whole id.
        request: The run state wanted, and what is kept of the present state.
        progress: Told how far it is.

    Raises:
        NotFoundError: There is no such VM.
        ConflictError: Somebody else is changing it.
        MismatchError: What is there is not what was recorded; nothing was changed.
        BlockedError: The VM runs, and a second QEMU cannot take its place; nothing was changed.
        BlockedError: The guest's clock could not be set afterwards; nothing was changed.
        QemuError: QEMU did not start or could not load the state; all was undone.
    """
    async with changing(store, name, "restore", progress=progress) as record:
        return await _restore(store, record, snapshot, request, progress)


async def _restore(
    store: Store, record: VmRecord, snapshot: str, request: RestoreRequest, progress: Progress
) -> Restored:
    old = launch.is_running(store, record)
    async with contextlib.AsyncExitStack() as stack:
        monitor = None
        if old is not None:
            monitor = await stack.enter_async_context(launch.controlling(store, record))
        plan = await _plan_restore(store, record, monitor, snapshot, request)
    manifest = store.manifest(record.id, snapshot)
    if error := in_the_way(record.name, plan):
        raise error
    restoring = Restoring(store, record, manifest, plan, progress, old)
    await carry_out(restoring, "restore", plan.left_behind, manifest.id, plan.steps)
    phases = restoring.phases_ms
    prepared = [spent for name, spent in phases.items() if name not in _AFTERWARDS]
    return Restored(
        manifest,
        plan,
        sum(prepared),
        phases.get("HandOver"),
        _clock_behind_s(manifest, restoring.let_run_at),
        request.sync_time and not restoring.warnings,
        tuple(restoring.warnings),
    )


_AFTERWARDS = frozenset({"SaveLeftBehind", "EndOld", "SetClock"})
"""What happens when the restored guest runs already."""


def _clock_behind_s(manifest: Manifest, let_run_at: datetime | None) -> float | None:
    """For how long a guest's clock stood still: from the instant until it ran again, or now."""
    if manifest.machine_state is None:
        return None
    stood_still = (let_run_at or datetime.now(UTC)) - datetime.fromisoformat(manifest.instant)
    return round(stood_still.total_seconds(), 3)


async def _plan_restore(
    store: Store,
    record: VmRecord,
    monitor: Monitor | None,
    snapshot: str,
    request: RestoreRequest,
) -> RestorePlan:
    launch.require_startable(store, record)
    manifest = store.manifest(record.id, snapshot)
    found = finding.find(store, record, manifest, _definition(record))
    running = None if monitor is None else await finding.find_running(store, record, monitor)
    left_behind = secrets.token_hex(names.ID_LENGTH // 2)
    return plan_restore(manifest, record, found, request, left_behind, running)


def in_the_way(name: str, plan: RestorePlan) -> CalotypeError | None:
    """Why a restore of the VM *name* is refused; None where it is not."""
    if plan.mismatches:
        return mismatched(f"{name!r} cannot be restored to {plan.snapshot}", plan.mismatches)
    return _blocked(name, plan) if plan.blockers else None


def _blocked(name: str, plan: RestorePlan) -> BlockedError:
    first, more = plan.blockers[0], len(plan.blockers) - 1
    also = f" (and {more} more: see --plan)" if more else ""
    return BlockedError(
        f"{name!r} cannot go to {plan.snapshot}: {first.problem}{also}",
        first.remedy,
        blockers=[[blocker.problem, blocker.remedy] for blocker in plan.blockers],
    )


async def restore_stopping_first(
    store: Store,
    name: str,
    snapshot: str,
    request: RestoreRequest,
    *,
    progress: Progress = silent,
) -> tuple[Restored, str]:
    """Save a VM that runs, end it, and put it back to a snapshot; what fails brings it back.

    For a VM that cannot go over while it runs. The guest stands still from the save on.

    Returns:
        What was done, and the snapshot that is the way back.

    Raises:
        CalotypeError: As `take` and `restore`; the VM is what it was, or its way back is named.
    """
    async with changing(store, name, "restore", progress=progress) as record:
        qemu = must_run(store, record)
        launch.refuse_limited(store, record, "take")
        plan = await _plan_restore(store, record, None, snapshot, request)
        if error := in_the_way(record.name, plan):
            raise error
        way_back, was_running = await _save_and_end(store, record, qemu, snapshot, progress)
        ended = store.record(record.id)
        discarding = replace(request, discard_current=True)  # nothing was written since
        try:
            done = await _restore(store, ended, snapshot, discarding, progress)
        except BaseException as error:
            asked = RestoreRequest("running" if was_running else "paused", discard_current=True)
            back = _restore(store, store.record(record.id), way_back.id, asked, progress)
            try:
                await shielded(back)
            except Exception as failure:  # noqa: BLE001 - the first error is the error
                error.add_note(f"the way back failed too: {failure}")
                again = f"calotype restore {shlex.quote(name)} --id {way_back.id}"
                error.add_note(f"`{again}` tries it again")
            raise
    return done, way_back.id


async def _save_and_end(
    store: Store, record: VmRecord, qemu: Process, snapshot: str, progress: Progress
) -> tuple[Manifest, bool]:
    """Save a VM that runs as the way back, and end it; also say whether its guest ran.

    It stands still from before the save until it has ended. A guard stands by for all of that time:
    if we die, or anything fails, the guest runs again.
    """
    async with launch.controlling(store, record) as monitor, contextlib.AsyncExitStack() as stack:
        was_running = (await monitor.execute("query-status"))["running"]
        guard = None
        try:
            if was_running:
                guard = await stack.enter_async_context(launch.guarded(store, record, monitor))
                await guard.arm(_WAY_BACK_LIMIT_S)
                await monitor.execute("stop")
            way_back = await _take_way_back(
                store, record, qemu, monitor, was_running, snapshot, progress
            )
        except BaseException:
            if guard is not None:  # which does the same, but not before we have hung up
                with contextlib.suppress(CalotypeError):
                    await shielded(monitor.execute("cont"))
            raise
        with contextlib.suppress(QemuError):  # it does not answer, or hangs up without one
            await monitor.execute("quit")
        await finish(qemu)
        if guard is not None:
            await guard.stand_down()
    return way_back, was_running


_NO_LIMIT_MS = 1e9
"""The guest stands still already, and does until it is ended."""
_WAY_BACK_LIMIT_S = 600.0
"""...or for that long, while its RAM is saved: then it is let run, and all of it undone."""


async def _take_way_back(
    store: Store,
    record: VmRecord,
    qemu: Process,
    monitor: Monitor,
    was_running: bool,
    snapshot: str,
    progress: Progress,
) -> Manifest:
    request = TakeRequest(method="paused", pause_limit_ms=_NO_LIMIT_MS)
    facts, plan = await _observe_and_plan(store, record, qemu, monitor, request)
    if plan.blockers:
        raise as_error(record.name, plan)
    if was_running:  # it was stopped for this, and runs when it is brought back
        facts = replace(facts, run_state="running")
    description = f"left behind by the restore of {snapshot}"
    taking = Taking(
        store, record, monitor, qemu, facts, plan, _definition(record), "", description, progress
    )
    await carry_out(taking, "take", plan.snapshot, plan.snapshot, plan.steps)
    assert taking.manifest is not None
    return taking.manifest


# --- recover -------------------------------------------------------------------------------------


async def recover(store: Store, name: str, *, progress: Progress = silent) -> list[Recovered]:
    """Bring to an end what was cut off on a VM: finish it, or undo it.

    Returns:
        What was finished or undone, oldest first.

    Raises:
        NotFoundError: There is no such VM.
        ConflictError: Somebody is at it, or something cannot be brought to an end now.
        StoreError: A journal was altered.
    """
    record = store.find(name)
    with store.locked(record, "recover"):
        return await seen_through(recover_vm(store, record, progress))


def _definition(record: VmRecord) -> Definition:
    return command_line.definition(CommandLine.parse(record.argv), record.cwd)

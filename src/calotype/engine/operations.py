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
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from calotype.engine import defining, finding, launch
from calotype.engine.changing import carry_out, changing
from calotype.engine.execute import seen_through, shielded
from calotype.engine.progress import Progress, silent
from calotype.engine.recover import Recovered
from calotype.engine.recover import recover as recover_vm
from calotype.engine.restore_effects import Restoring
from calotype.engine.take_effects import Taking
from calotype.engine.world import World
from calotype.errors import (
    BlockedError,
    CalotypeError,
    ConflictError,
    HostError,
    MismatchError,
    QemuError,
)
from calotype.formats import argv as command_line
from calotype.formats.argv import CommandLine
from calotype.model import names
from calotype.model.snapshot import Manifest
from calotype.model.vm import Facts, Process, VmRecord
from calotype.plan.restore import Definition, RestorePlan, RestoreRequest, plan_restore
from calotype.plan.steps import Define, LetRun, RecordStarted, StartQemu, Step
from calotype.plan.take import plan_take
from calotype.plan.take_plan import TakePlan, TakeRequest, as_error
from calotype.qemu import observe, process
from calotype.qemu.monitor import Monitor
from calotype.store.store import Store

# --- take ----------------------------------------------------------------------------------------


async def plan_only(store: Store, name: str, request: TakeRequest) -> TakePlan:
    """Say what `take` would do; nothing is changed."""
    record = store.find(name)
    qemu = _must_run(store, record)
    launch.refuse_limited(store, record, "take")
    async with launch.looking(store, record) as monitor:
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
        qemu = _must_run(store, record)
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
    return facts, plan_take(facts, record, request, secrets.token_hex(names.ID_LENGTH // 2))


def _must_run(store: Store, record: VmRecord) -> Process:
    qemu = launch.is_running(store, record)
    if qemu is None:
        launch.refuse_restarted(record)
        raise ConflictError(
            f"the VM {record.name!r} does not run", f"`calotype start {shlex.quote(record.name)}`"
        )
    return qemu


# --- restore -------------------------------------------------------------------------------------


class Restored(NamedTuple):
    """What a restore did."""

    manifest: Manifest
    plan: RestorePlan
    restore_ms: float
    pause_ms: float | None
    """How long the going over took, of a VM that ran; None where it did not run."""


async def restore_plan_only(
    store: Store, name: str, snapshot: str, request: RestoreRequest
) -> RestorePlan:
    """Say what `restore` would do; nothing is changed."""
    record = store.find(name)
    async with contextlib.AsyncExitStack() as stack:
        monitor = None
        if launch.is_running(store, record):
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
    if plan.mismatches:
        raise _mismatched(manifest, plan)
    if plan.blockers:
        raise _blocked(record, plan)
    restoring = Restoring(store, record, manifest, plan, progress, old)
    await carry_out(restoring, "restore", plan.left_behind, manifest.id, plan.steps)
    phases = restoring.phases_ms
    prepared = [spent for name, spent in phases.items() if name not in _AFTERWARDS]
    return Restored(manifest, plan, sum(prepared), phases.get("HandOver"))


_AFTERWARDS = frozenset({"SaveLeftBehind", "EndOld"})
"""What happens when the restored guest runs already."""


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


def _blocked(record: VmRecord, plan: RestorePlan) -> BlockedError:
    first, more = plan.blockers[0], len(plan.blockers) - 1
    also = f" (and {more} more: see --plan)" if more else ""
    return BlockedError(
        f"{record.name!r} runs, and cannot go over to {plan.snapshot}: {first.problem}{also}",
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
        qemu = _must_run(store, record)
        launch.refuse_limited(store, record, "take")
        plan = await _plan_restore(store, record, None, snapshot, request)
        if plan.mismatches:
            raise _mismatched(store.manifest(record.id, snapshot), plan)
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
            except CalotypeError as failure:
                error.add_note(f"the way back failed too: {failure}")
                again = f"calotype restore {shlex.quote(name)} --id {way_back.id}"
                error.add_note(f"`{again}` tries it again")
            raise
    return done, way_back.id


async def _save_and_end(
    store: Store, record: VmRecord, qemu: Process, snapshot: str, progress: Progress
) -> tuple[Manifest, bool]:
    """Save a VM that runs as the way back, and end it; also say whether its guest ran."""
    async with launch.controlling(store, record) as monitor:
        was_running = (await monitor.execute("query-status"))["running"]
        await monitor.execute("stop")
        try:
            way_back = await _take_way_back(
                store, record, qemu, monitor, was_running, snapshot, progress
            )
        except BaseException:
            if was_running:
                await shielded(monitor.execute("cont"))
            raise
    await _end(store, record, qemu)
    return way_back, was_running


_NO_LIMIT_MS = 1e9
"""The guest stands still already, and does until it is ended."""


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


def _mismatched(manifest: Manifest, plan: RestorePlan) -> MismatchError:
    is_touched = all(mismatch.kind == "touched" for mismatch in plan.mismatches)
    return MismatchError(
        f"{manifest.vm_name!r} cannot be restored to {manifest.id}: "
        + "; ".join(mismatch.text for mismatch in plan.mismatches),
        "if that was you, and you wrote nothing to it, give --accept-touched"
        if is_touched
        else "put back what is named here; nothing was changed",
        mismatches=[
            {"kind": mismatch.kind, "subject": mismatch.subject, "text": mismatch.text}
            for mismatch in plan.mismatches
        ],
    )


def _must_not_run(store: Store, record: VmRecord) -> None:
    if launch.is_running(store, record):
        raise ConflictError(
            f"the VM {record.name!r} runs", f"`calotype stop {shlex.quote(record.name)}` first"
        )


# --- run, start, stop, forget --------------------------------------------------------------------


async def run(store: Store, name: str, argv: tuple[str, ...], cwd: str) -> VmRecord:
    """Define a VM by QEMU's command line, and start it.

    A VM of that name that does not run is defined anew; a disk that it has, or once had, keeps its
    newest content, whatever image the command line names for it.

    Raises:
        CommandLineError: The command line holds something that cannot be stood for.
        ConflictError: A VM of that name runs, or an image belongs to another VM.
        HostError: An image is missing.
        QemuError: QEMU did not start.
    """
    is_new = defining.define_new(store, name, argv, cwd)
    try:
        async with changing(store, name, "run", whole=False) as record:
            _must_not_run(store, record)
            again = defining.define_again(store, record, argv, cwd)
            await _start(store, again, Define(again, record))
    except BaseException:
        if is_new and launch.is_running(store, store.find(name)) is None:  # or another started it
            store.drop(store.find(name))
        raise
    return store.find(name)


async def start(store: Store, name: str) -> VmRecord:
    """Start a VM from the images with its newest content; or let one run that is paused.

    Raises:
        ConflictError: It runs already.
        QemuError: QEMU did not start.
    """
    async with changing(store, name, "start", whole=False) as record:
        if launch.is_running(store, record) is None:
            launch.require_startable(store, record)
            await _start(store, record)
        else:
            await _let_run(store, record)
    return store.record(record.id)


async def _start(store: Store, record: VmRecord, *first: Step) -> None:
    """Start QEMU, look at what it built, and let the guest run unless its user wants it stopped."""
    active = {disk.index: disk.active for disk in record.disks}
    for image in active.values():
        if not Path(image.path).exists():
            raise HostError(f"{image.path} is missing", "put the image back", path=image.path)
    steps: list[Step] = [
        *first,
        StartQemu(active, incoming=False, machine=""),
        RecordStarted(record.disks, record.topology),
    ]
    if not CommandLine.parse(record.argv).has("S"):
        steps.append(LetRun())
    operation_id = secrets.token_hex(names.ID_LENGTH // 2)
    await carry_out(World(store, record), "start", operation_id, "", steps)


async def _let_run(store: Store, record: VmRecord) -> None:
    """Let a guest run that stands still."""
    async with launch.controlling(store, record) as monitor:
        status = await monitor.execute("query-status")
        if status["running"]:
            raise ConflictError(f"the VM {record.name!r} runs already", "nothing is to be done")
        await monitor.execute("cont")


async def stop(store: Store, name: str, *, now: bool = False, timeout_s: float = 60.0) -> None:
    """Stop a VM: press its power button and wait, or end it at once.

    Args:
        store: Where it is kept.
        name: The VM.
        now: Do not ask the guest; QEMU flushes its images and ends.
        timeout_s: How long the guest may take.

    Raises:
        ConflictError: It does not run, or the guest did not power off in time.
    """
    async with changing(store, name, "stop", whole=False) as record:
        qemu = _must_run(store, record)
        if now:
            await _end(store, record, qemu)
            return
        async with launch.controlling(store, record) as monitor:
            await monitor.execute("system_powerdown")
        if not await process.ended(qemu, timeout_s):
            raise ConflictError(
                f"the guest of {name!r} did not power off within {timeout_s:g} s",
                f"`calotype stop --now {shlex.quote(name)}` ends it at once",
            )


async def _end(store: Store, record: VmRecord, qemu: Process) -> None:
    """End QEMU: by its monitor, and one that does not answer by its pid."""
    try:
        async with launch.controlling(store, record) as monitor:
            await monitor.execute("quit")
    except (QemuError, ConflictError):
        if qemu.monitor:  # perhaps its user is at the monitor: QEMU flushes its images and ends
            process.terminate(qemu)
        else:
            process.kill(qemu)
    if not await process.ended(qemu, 30.0):
        process.kill(qemu)
        await process.ended(qemu, 10.0)


async def forget(store: Store, name: str) -> tuple[VmRecord, Path, list[Manifest]]:
    """Take a VM that does not run, or that was adopted, out of the catalogue; all its files stay.

    Returns:
        The record, the folder that its files are in now, and the snapshots in it.

    Raises:
        ConflictError: It runs.
    """
    async with changing(store, name, "forget") as record:
        qemu = launch.is_running(store, record)
        if qemu is None or not qemu.monitor:  # one that is not ours runs on
            _must_not_run(store, record)
        manifests, _ = store.sound_manifests(record.id)
        return record, store.forget(record), manifests


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

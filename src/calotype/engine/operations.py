"""The operations, each from beginning to end: READ THIS FIRST.

`take` is the pattern of all of them: observe what is there, let a pure function plan, refuse what
has blockers, and have `execute` run the plan's steps, which undoes what it began if any fails.

    observe -> plan -> prepare -> instant -> finish -> commit

`changing` lets one operation at a time at a VM, and brings to an end first what an earlier one left
half done; `carry_out` journals the steps. What a step does stands in the tables that `effects.py`
joins; what the steps are and in which order, in `calotype.plan`.
"""

import secrets
import shlex
from pathlib import Path
from typing import NamedTuple

from calotype.engine import defining, finding, launch
from calotype.engine.changing import carry_out, changing
from calotype.engine.execute import shielded
from calotype.engine.progress import Progress, silent
from calotype.engine.recover import Recovered
from calotype.engine.recover import recover as recover_vm
from calotype.engine.restore_effects import Restoring
from calotype.engine.take_effects import Taking
from calotype.engine.world import World
from calotype.errors import (
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


async def restore(
    store: Store,
    name: str,
    snapshot: str,
    request: RestoreRequest,
    *,
    progress: Progress = silent,
) -> Restored:
    """Put a VM that does not run back to a snapshot, and let it run if it did then.

    Args:
        store: Where it is kept.
        name: The VM.
        snapshot: The snapshot's whole id.
        request: The run state wanted, and whether the present disks are kept.
        progress: Told how far it is.

    Raises:
        NotFoundError: There is no such VM.
        ConflictError: The VM runs, or somebody else is changing it.
        MismatchError: What is there is not what was recorded; nothing was changed.
        QemuError: QEMU did not start or could not load the state; all was undone.
    """
    async with changing(store, name, "restore", progress=progress) as record:
        _must_not_run(store, record)
        launch.require_startable(store, record)
        manifest = store.manifest(record.id, snapshot)
        definition = _definition(record)
        found = finding.find(store, record, manifest, definition)
        left_behind = secrets.token_hex(names.ID_LENGTH // 2)
        plan = plan_restore(manifest, record, found, request, left_behind)
        if plan.mismatches:
            raise _mismatched(manifest, plan)
        restoring = Restoring(store, record, manifest, plan, definition, progress)
        await carry_out(restoring, "restore", left_behind, manifest.id, plan.steps)
    return Restored(manifest, plan, sum(restoring.phases_ms.values()))


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
        if is_new:
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
        return await shielded(recover_vm(store, record, progress))


def _definition(record: VmRecord) -> Definition:
    return command_line.definition(CommandLine.parse(record.argv), record.cwd)

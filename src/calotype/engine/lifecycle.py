"""From a command line to a QEMU that runs, and to its end: run, start, stop, forget."""

import contextlib
import secrets
import shlex
from pathlib import Path

from calotype.engine import defining, launch
from calotype.engine.changing import carry_out, changing
from calotype.engine.world import World
from calotype.errors import ConflictError, HostError, QemuError
from calotype.formats.argv import CommandLine
from calotype.model import names
from calotype.model.snapshot import Manifest
from calotype.model.vm import Process, VmRecord
from calotype.plan.steps import Define, LetRun, RecordStarted, StartQemu, Step
from calotype.qemu import process
from calotype.store.store import Store


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
    new = defining.define_new(store, name, argv, cwd)
    try:
        async with changing(store, name, "run", whole=False) as record:
            _must_not_run(store, record)
            again = defining.define_again(store, record, argv, cwd)
            await _start(store, again, Define(again, record))
    except BaseException:
        if new is not None:
            _drop(store, new)
        raise
    return store.find(name)


def _drop(store: Store, new: VmRecord) -> None:
    """Remove what could not be started the first time, unless somebody else has taken it up."""
    with contextlib.suppress(ConflictError), store.locked(new, "run"):
        if store.record(new.id) == new and launch.is_running(store, new) is None:
            store.drop(new)


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
        qemu = must_run(store, record)
        if now:
            await end(store, record, qemu)
            return
        async with launch.controlling(store, record) as monitor:
            await monitor.execute("system_powerdown")
        if not await process.ended(qemu, timeout_s):
            raise ConflictError(
                f"the guest of {name!r} did not power off within {timeout_s:g} s",
                f"`calotype stop --now {shlex.quote(name)}` ends it at once",
            )


async def end(store: Store, record: VmRecord, qemu: Process) -> None:
    """End QEMU: by its monitor, and one that does not answer by its pid."""
    try:
        async with launch.controlling(store, record) as monitor:
            await monitor.execute("quit")
    except (QemuError, ConflictError):
        if qemu.monitor:  # perhaps its user is at the monitor: QEMU flushes its images and ends
            process.terminate(qemu)
        else:
            process.kill(qemu)
    await finish(qemu)


async def finish(qemu: Process) -> None:
    """Wait until a QEMU that was told to has ended; end one that does not.

    Raises:
        HostError: It does not end.
    """
    if not await process.ended(qemu, 30.0):
        await process.end(qemu)


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


def must_run(store: Store, record: VmRecord) -> Process:
    """The QEMU of a VM.

    Raises:
        ConflictError: It does not run.
    """
    qemu = launch.is_running(store, record)
    if qemu is None:
        launch.refuse_restarted(record)
        raise ConflictError(
            f"the VM {record.name!r} does not run", f"`calotype start {shlex.quote(record.name)}`"
        )
    return qemu


def _must_not_run(store: Store, record: VmRecord) -> None:
    if launch.is_running(store, record):
        raise ConflictError(
            f"the VM {record.name!r} runs", f"`calotype stop {shlex.quote(record.name)}` first"
        )

"""Start QEMU for a VM: sockets made first, then the process, then its greeting.

The listening sockets are ours and are inherited: they answer from the first moment on, their paths
may be of any length, and QEMU needs no right to the folder they are in.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

from calotype.errors import QemuError
from calotype.formats import argv as command_line
from calotype.formats.argv import Argument, CommandLine, Endpoints
from calotype.formats.secrets import redacted_log
from calotype.model.acts import NEXT
from calotype.model.vm import Image, Process, VmRecord
from calotype.qemu import monitor as qmp
from calotype.qemu import process
from calotype.qemu.monitor import Monitor
from calotype.store.store import Store

CONTROL, QUERY, GUARD = "control.sock", "query.sock", "guard.sock"
CONSOLE = "console.sock"
SOCKETS = (CONTROL, QUERY, GUARD, CONSOLE)
QEMU_LOG, CONSOLE_LOG = "qemu.log", "console.log"

MARK = "CALOTYPE_VM"
"""In QEMU's environment: the id of its VM, so that one which nobody wrote down can be found."""

START_TIMEOUT_S = 30.0
_LAST_WORDS_BYTES = 4000


def compose_argv(
    record: VmRecord,
    active: Mapping[int, Image],
    endpoints: Endpoints,
    *,
    machine: str = "",
    incoming: bool = False,
    aside: str | None = None,
) -> list[str]:
    """The command line to start a VM with: the user's, on its active images, under supervision.

    The guest does not run until it is let: what QEMU built is looked at first.

    Args:
        record: The VM.
        active: The image for each disk, by disk index.
        endpoints: The sockets and the log that it is supervised through.
        machine: The versioned machine type to insist on; "" keeps the user's.
        incoming: Wait for a machine state.
        aside: It is started beside another that runs the VM; a folder for its sockets.
    """
    command = CommandLine.parse(record.argv)
    if aside is not None:
        command = command_line.sharing(command, record.cwd, aside).command
    command = command_line.with_images(command, active)
    if machine:
        command = command_line.with_machine(command, machine)
    command = command_line.supervised(command, endpoints)
    if incoming:
        return command_line.for_restore(command).argv()
    return command.argv() if command.has("S") else command.having({}, Argument("S")).argv()


async def start(
    store: Store,
    record: VmRecord,
    active: Mapping[int, Image],
    *,
    machine: str = "",
    incoming: bool = False,
    beside: bool = False,
) -> Process:
    """Start QEMU, its guest not yet running, and wait until its monitor answers.

    One that is started beside another listens beside its sockets, and is not written down: it is
    found by its mark.

    Raises:
        HostError: The program cannot be started.
        QemuError: QEMU ended before it answered; its last words are in the error.
    """
    folder = store.folder(record.id)
    suffix = NEXT if beside else ""
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_log(folder / QEMU_LOG))
        stack.enter_context(_log(folder / CONSOLE_LOG))
        sockets = [
            stack.enter_context(qmp.listen_socket(folder / f"{name}{suffix}")) for name in SOCKETS
        ]
        descriptors = [each.fileno() for each in sockets]
        control, query, guard, console = descriptors
        endpoints = Endpoints(control, query, guard, console, str(folder / CONSOLE_LOG))
        argv = compose_argv(
            record,
            active,
            endpoints,
            machine=machine,
            incoming=incoming,
            aside=str(folder) if beside else None,
        )
        mark = os.fstat(log).st_size
        qemu = process.spawn(argv, record.cwd, descriptors, log, (MARK, record.id))
    try:
        if not beside:
            store.save_process(record.id, qemu)
        await _greeted(folder / f"{CONTROL}{suffix}", qemu, mark, record)
    except BaseException:
        process.kill(qemu)
        raise
    return qemu


@contextlib.contextmanager
def _log(path: Path) -> Iterator[int]:
    """An open log, for its owner alone, that grows at its end."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


async def _greeted(control: Path, qemu: Process, mark: int, record: VmRecord) -> None:
    """Wait for the greeting; a QEMU that ends first says why."""
    greeting = asyncio.ensure_future(_greeting(control))
    ending = asyncio.ensure_future(process.ended(qemu, START_TIMEOUT_S))
    await asyncio.wait({greeting, ending}, return_when=asyncio.FIRST_COMPLETED)
    if greeting.done() and greeting.exception() is None:
        ending.cancel()
        return
    await process.ended(qemu, 1.0)
    greeting.cancel()
    with contextlib.suppress(asyncio.CancelledError, QemuError):
        await greeting
    said = last_words(control.parent, record, mark)
    raise QemuError(
        f"QEMU did not start: {said or 'it said nothing'}",
        "mend what it names, on its command line or on the host",
        qemu=said,
    )


async def _greeting(control: Path) -> None:
    async with qmp.connect(control, timeout_s=START_TIMEOUT_S):
        pass


def last_words(folder: Path, record: VmRecord, mark: int = 0) -> str:
    """What QEMU said at the end of its log, after byte *mark*; no secret of its command line."""
    with (folder / QEMU_LOG).open("rb") as log:
        log.seek(max(mark, os.fstat(log.fileno()).st_size - _LAST_WORDS_BYTES))
        said = log.read().decode(errors="replace").strip()
    return redacted_log(said, record.argv)


def log_size(folder: Path) -> int:
    """The present end of QEMU's log; what it says later begins here."""
    path = folder / QEMU_LOG
    return path.stat().st_size if path.exists() else 0


def is_running(store: Store, record: VmRecord) -> Process | None:
    """The QEMU that runs this VM, if one does."""
    qemu = store.process(record.id)
    return qemu if qemu is not None and process.is_alive(qemu) else None


def successor(record: VmRecord, old: Process | None) -> Process | None:
    """The QEMU that was started beside *old*, which runs the VM or ran it."""
    found = [each for each in process.find(MARK, record.id) if each != old]
    return found[0] if found else None


@contextlib.asynccontextmanager
async def controlling(
    store: Store, record: VmRecord, *, beside: bool = False
) -> AsyncIterator[Monitor]:
    """The monitor for the one who holds the VM's lock; *beside*: of the QEMU beside."""
    name = f"{CONTROL}{NEXT}" if beside else CONTROL
    async with qmp.connect(store.folder(record.id) / name) as monitor:
        yield monitor


@contextlib.asynccontextmanager
async def looking(store: Store, record: VmRecord, timeout_s: float = 5.0) -> AsyncIterator[Monitor]:
    """The monitor for those who only look."""
    async with qmp.connect(store.folder(record.id) / QUERY, timeout_s=timeout_s) as monitor:
        yield monitor

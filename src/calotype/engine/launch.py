"""Start QEMU for a VM: sockets made first, then the process, then its greeting.

The listening sockets are ours and are inherited: they answer from the first moment on, their paths
may be of any length, and QEMU needs no right to the folder they are in.
"""

import asyncio
import contextlib
import os
import shlex
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

from calotype.errors import BlockedError, ConflictError, QemuError
from calotype.formats import argv as command_line
from calotype.formats.argv import Argument, CommandLine, Endpoints
from calotype.formats.secrets import redacted_log
from calotype.model.acts import NEXT
from calotype.model.vm import Image, Limit, Process, VmRecord
from calotype.plan.adopt import STARTING
from calotype.qemu import guarding, process, strangers
from calotype.qemu import monitor as qmp
from calotype.qemu.guarding import Post, Successor
from calotype.qemu.monitor import Monitor
from calotype.store.store import Store

CONTROL, QUERY, GUARD, SERVICE = "control.sock", "query.sock", "guard.sock", "service.sock"
CONSOLE = "console.sock"
SOCKETS = (CONTROL, QUERY, GUARD, SERVICE, CONSOLE)
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
        control, query, guard, service, console = descriptors
        log_path = str(folder / CONSOLE_LOG)
        endpoints = Endpoints(control, query, guard, service, console, log_path)
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


def limits(store: Store, record: VmRecord) -> tuple[Limit, ...]:
    """The commands that do not work with a VM that was adopted, as things are now."""
    if record.adopted is None:
        return ()
    qemu = is_running(store, record)
    if qemu is None:
        return tuple(limit for limit in record.adopted.limits if limit.command in STARTING)
    if not qemu.monitor:
        return ()
    console = () if console_socket(store, record, qemu) else ("console",)
    own = "what it says goes where its own command line sends it"
    remedy = "Calotype keeps it once it starts the VM itself"
    return (*(Limit(each, own, remedy) for each in (*console, "logs")), *record.adopted.limits)


def console_socket(store: Store, record: VmRecord, qemu: Process) -> Path | None:
    """Where the console of a running VM is; of one that was adopted, its own serial port's socket.

    None where that is no socket that one can connect to.
    """
    if qemu.monitor and record.adopted is not None:
        ran = CommandLine.parse(record.adopted.argv)
        return Path(path) if (path := command_line.console_path(ran, record.cwd)) else None
    has_console = command_line.has_console(CommandLine.parse(record.argv))
    return store.folder(record.id) / CONSOLE if has_console else None


def require_startable(store: Store, record: VmRecord) -> None:
    """Refuse to start a VM, now or once it has ended, where that cannot succeed.

    Raises:
        BlockedError: The VM was adopted, and its command line cannot be started by us.
        ConflictError: It does not run, and its user has started it meanwhile.
    """
    if is_running(store, record) is None:
        refuse_restarted(record)
    refuse_limited(store, record, *STARTING)


def refuse_limited(store: Store, record: VmRecord, *commands: str) -> None:
    """Refuse one of *commands* where it does not work with this VM.

    Raises:
        BlockedError: It was adopted, and that is not possible with it.
    """
    found = [limit for limit in limits(store, record) if limit.command in commands]
    if found:
        raise BlockedError(
            f"the VM {record.name!r} was adopted, and {found[0].command} does not work with it:"
            f" {found[0].problem}",
            found[0].remedy,
            blockers=list(dict.fromkeys((limit.problem, limit.remedy) for limit in found)),
        )


def refuse_restarted(record: VmRecord) -> None:
    """Refuse to go on with an adopted VM, whose process has ended, if its user has started another.

    Raises:
        ConflictError: Somebody answers at its monitor.
    """
    if record.adopted is None:
        return
    pid = strangers.listener(Path(record.adopted.qmp))
    if pid is not None:
        words = ("calotype", "adopt", record.name, "--qmp", record.adopted.qmp)
        raise ConflictError(
            f"the VM {record.name!r} was started by somebody else: process {pid} answers at its"
            " monitor",
            f"`{shlex.join(words)}` binds it to that process",
            pid=pid,
        )


@contextlib.asynccontextmanager
async def controlling(
    store: Store, record: VmRecord, *, beside: bool = False
) -> AsyncIterator[Monitor]:
    """The monitor for the one who holds the VM's lock; *beside*: of the QEMU beside."""
    if beside:  # that one is ours, whoever started the other
        path = store.folder(record.id) / f"{CONTROL}{NEXT}"
        connected = qmp.connect(path, cwd=record.cwd)
    else:
        connected = _connected(store, record, CONTROL, qmp.GREETING_TIMEOUT_S)
    async with connected as monitor:
        yield monitor


@contextlib.asynccontextmanager
async def looking(store: Store, record: VmRecord, timeout_s: float = 5.0) -> AsyncIterator[Monitor]:
    """The monitor for those who only look; of an adopted VM it may be in use by who acts."""
    async with _connected(store, record, QUERY, timeout_s) as monitor:
        yield monitor


@contextlib.asynccontextmanager
async def guarded(
    store: Store, record: VmRecord, monitor: Monitor, *, new: Process | None = None
) -> AsyncIterator[Post]:
    """A guard that stands by, on a monitor of its own where the VM has one; see `guarding.posted`.

    Args:
        store: Where the VM is kept.
        record: The VM.
        monitor: The owner's connection.
        new: In a handover, the QEMU beside, which is to take the place of the one that runs.
    """
    folder, qemu = store.folder(record.id), store.process(record.id)
    shared = monitor if qemu is not None and qemu.monitor else None
    successor = None if new is None else Successor(folder / f"{GUARD}{NEXT}", new.pid)
    async with guarding.posted(folder / GUARD, shared=shared, successor=successor) as guard:
        yield guard


@contextlib.asynccontextmanager
async def _connected(
    store: Store, record: VmRecord, name: str, timeout_s: float
) -> AsyncIterator[Monitor]:
    """Our own socket *name*; of a QEMU that was adopted, the one that its user gave."""
    qemu = store.process(record.id)
    if qemu is not None and qemu.monitor:
        path, pid = Path(qemu.monitor), qemu.pid
    else:
        path, pid = store.folder(record.id) / name, 0
    async with qmp.connect(path, timeout_s, cwd=record.cwd, pid=pid) as monitor:
        yield monitor

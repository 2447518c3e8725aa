"""One QMP connection to one QEMU, with our errors and with a tap on the wire.

`Monitor` is qemu.qmp's client plus two things it lacks: an error type of ours, raised here once
and nowhere else, and a *tap* that sees replies and events in the order in which QEMU sent them.
qemu.qmp hands events and replies to different queues, which is right for most uses and loses the
one thing that the paused window depends on.

A QEMU monitor serves one client; a second one connects and waits for a greeting for ever. So every
connection has a deadline, and a VM that we start gets sockets of its own: *control* for the
operation that holds the VM's lock, *query* for everybody who only looks. A VM that was adopted has
the one socket that its user gave, for all of them in turn.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, ExecuteError, Message, QMPClient, QMPError

from calotype.errors import ConflictError, HostError, QemuError
from calotype.qemu.peers import clients

GREETING_TIMEOUT_S = 3.0
REPLY_TIMEOUT_S = 60.0
"""How long QEMU may be silent: a drain and flush of slow storage fits in, a hang does not."""
HANG_UP_TIMEOUT_S = 2.0
_IN_LINE_POLL_S = 0.02
SILENT_TIMEOUT_S = 0.5
"""How long it may be once it was silent for that long."""

LAST_WORDS = "`calotype logs NAME --qemu` has what QEMU said last"
"""The remedy where QEMU alone knows more; which VM it is, who holds a monitor does not know."""

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

Tap = Callable[[Message | None], None]
"""Called with each message, and with None when the connection is gone."""


class CommandRefused(QemuError):  # noqa: N818 - QEMU's answer to a command is no fault of a caller's
    """QEMU answered a command with an error; its text is in `data`."""


class _Client(QMPClient):
    """qemu.qmp's client, with a tap that sees each message before it is sorted."""

    tap: Tap | None = None

    async def _on_message(self, msg: Message) -> None:
        if self.tap is not None:
            self.tap(msg)
        await super()._on_message(msg)

    async def post(self, message: Message) -> None:
        """Send a message that has an id and drop the answer: the tap has seen it."""
        await self._raw(message, assign_id=False)

    def leave(self) -> None:
        """Read and write no more, from this moment on."""
        if self._writer is not None:
            self._writer.transport.abort()


class Monitor:
    """An open QMP connection; made by `connect`."""

    def __init__(self, client: _Client, connection: socket.socket, cwd: str = "") -> None:
        self._client = client
        self._connection = connection
        self._posted = 0
        self.cwd = cwd
        """The folder that QEMU's relative file names start from; "" where nobody asks for files."""
        self.is_silent = False
        """It let us wait in vain; what is asked now is not waited for as long."""
        self.is_handed_over = False
        """The connection is another's now; nothing more can be asked through this end."""

    def fileno(self) -> int:
        """The descriptor of the connection, for a process that shares it."""
        return self._connection.fileno()

    def hand_over(self) -> None:
        """Leave the connection to the process that shares it, at once and without a word to QEMU.

        Closing this end hangs up nothing while the other holds the same socket.
        """
        if self.is_handed_over:
            return
        self.is_handed_over = True
        self._client.leave()
        if self._client.tap is not None:
            self._client.tap(None)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Send a command and wait for its answer; `_` in argument names stands for `-`.

        Raises:
            CommandRefused: QEMU answered with an error.
            QemuError: The connection is gone, or QEMU does not answer.
        """
        spelled = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self.send(command, spelled)

    async def send(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """Send a command with its arguments spelled as QEMU spells them; see `execute`."""
        try:
            async with asyncio.timeout(SILENT_TIMEOUT_S if self.is_silent else REPLY_TIMEOUT_S):
                return await self._client.execute(command, dict(arguments))
        except ExecuteError as error:
            text = str(error)
            raise CommandRefused(
                f"QEMU refused {command}: {text}", LAST_WORDS, qemu=text
            ) from error
        except TimeoutError as error:
            self.is_silent = True
            raise QemuError(
                f"QEMU does not answer {command}",
                f"{LAST_WORDS}; a QEMU that hangs is ended by `calotype stop --now NAME`",
            ) from error
        except (QMPError, OSError) as error:  # interrupted, or the connection was gone already
            raise QemuError(f"QEMU went away during {command}", LAST_WORDS) from error

    def post(self, command: str, arguments: Mapping[str, Any]) -> str:
        """Send a command without waiting; return its id, by which a tap knows the answer."""
        self._posted += 1
        message = QMPClient.make_execute_msg(command, dict(arguments))
        message["id"] = f"window-{self._posted}"
        asyncio.ensure_future(self._client.post(message)).add_done_callback(self._settle)
        return str(message["id"])

    def _settle(self, posted: "asyncio.Future[None]") -> None:
        """A connection that is gone ends the tap's stream, as a message of None."""
        if posted.exception() is not None and self._client.tap is not None:
            self._client.tap(None)

    async def add_file(self, descriptor: int, fdset: int, opaque: str) -> None:
        """Give QEMU an open file as `/dev/fdset/`*fdset* (qapi/misc.json, add-fd)."""
        self._pass(descriptor)
        await self.execute("add-fd", fdset_id=fdset, opaque=opaque)

    async def get_file(self, descriptor: int, name: str) -> None:
        """Give QEMU an open file under a *name*, as `fd:`*name* (qapi/misc.json, getfd)."""
        self._pass(descriptor)
        await self.execute("getfd", fdname=name)

    def _pass(self, descriptor: int) -> None:
        try:
            self._client.send_fd_scm(descriptor)
        except (QMPError, OSError) as error:
            raise QemuError("QEMU went away", LAST_WORDS) from error

    @contextlib.contextmanager
    def tapped(self, tap: Tap) -> Iterator[None]:
        """While this lasts, *tap* is called with each message, in the order of the wire."""
        self._client.tap = tap
        try:
            yield
        finally:
            self._client.tap = None

    async def close(self) -> None:
        """Hang up; a QEMU that has gone already is what many callers wait for, and no error.

        It is seen through when we are cancelled meanwhile: half of it would be told of by asyncio.
        """
        ending = asyncio.ensure_future(self._client.disconnect())
        cancelled: asyncio.CancelledError | None = None
        until = asyncio.get_running_loop().time() + HANG_UP_TIMEOUT_S
        while not ending.done() and (left := until - asyncio.get_running_loop().time()) > 0:
            try:
                await asyncio.wait({ending}, timeout=left)
            except asyncio.CancelledError as error:
                cancelled = error
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        if cancelled is not None:
            raise cancelled


def open_socket(path: Path) -> socket.socket:
    """Connect to the unix socket *path*, however long it is, and at once or not at all.

    A socket's address holds 107 bytes; a folder held open gives every path a short name. QEMU lets
    one wait in line (it listens with a backlog of 1), and where it hangs the line does not move:
    who connected as others do would wait in the kernel, where no deadline of asyncio's reaches.

    Raises:
        BlockingIOError: The line is full.
        OSError: Nobody listens there, or we may not connect.
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.connect(f"/proc/self/fd/{folder}/{path.name}")
            connection.setblocking(True)
        except BaseException:
            connection.close()
            raise
    finally:
        os.close(folder)
    return connection


async def opened(path: Path) -> socket.socket:
    """Connect to *path* as `open_socket` does, as soon as the line is not full."""
    while True:
        try:
            return open_socket(path)
        except BlockingIOError:
            await asyncio.sleep(_IN_LINE_POLL_S)


def listen_socket(path: Path) -> socket.socket:
    """Listen on the unix socket *path*, however long it is; a dead one in its place is removed."""
    path.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        path.chmod(0o600)
        listener.listen(8)
    except OSError as error:
        listener.close()
        raise HostError(
            f"cannot listen on {path}: {error.strerror or error}",
            "name a --store, or another path, on a file system that has sockets and some space; a"
            " socket's own name may have some 80 letters",
        ) from error
    finally:
        os.close(folder)
    return listener


@contextlib.asynccontextmanager
async def connect(
    path: Path, timeout_s: float = GREETING_TIMEOUT_S, *, cwd: str = "", pid: int = 0
) -> AsyncIterator[Monitor]:
    """Open the QMP connection at *path* for the length of a `with` block.

    Args:
        path: The socket.
        timeout_s: How long to wait for QEMU's greeting.
        cwd: The folder that QEMU's relative file names start from.
        pid: The process that must have made the socket; 0 where that is of no matter.

    Raises:
        ConflictError: Somebody else is connected to this monitor, or it is another process's.
        QemuError: There is no QEMU behind it, or it hung up.
    """
    client = _Client(path.name)
    try:
        async with asyncio.timeout(timeout_s):
            connection = await opened(path)
            if pid and (other := peer_pid(connection)) != pid:
                connection.close()
                raise _anothers(path, other, pid)
            await client.connect(connection)
    except TimeoutError as error:
        raise silent(path, timeout_s) from error
    except (OSError, ConnectError) as error:
        raise QemuError(f"no QEMU answers on {path}: {error}", LAST_WORDS) from error
    monitor = Monitor(client, connection, cwd)
    try:
        yield monitor
    finally:
        await monitor.close()


_CREDENTIALS = struct.Struct("=iII")
"""ucred: pid, uid, gid (unix(7), SO_PEERCRED)."""


def peer_pid(connection: socket.socket) -> int:
    """The process that listens at the other end, or that did when it handed the socket on.

    0 where it is in a pid namespace that cannot be seen from here.
    """
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(told)[0])


def _anothers(path: Path, found: int, recorded: int) -> ConflictError:
    return ConflictError(
        f"process {found} answers on {path}, not the QEMU {recorded} that was adopted there",
        "`calotype adopt` with the same name and socket takes the new one in",
        pid=found,
    )


def silent(path: Path, timeout_s: float) -> ConflictError:
    """Why a monitor gives no greeting: it serves another, or its QEMU hangs."""
    waited = f"the monitor {path} gave no greeting in {timeout_s:g} s"
    holders = clients(path)
    if not holders:
        return ConflictError(waited, "a QEMU that hangs is ended by `calotype stop --now NAME`")
    named = ", ".join(map(str, holders))
    return ConflictError(
        f"{waited}: process {named} is connected to it",
        "wait until that one is done, or end it",
        holders=holders,
    )

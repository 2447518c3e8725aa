"""A QEMU that somebody else started: who is behind a socket, and what /proc shows of him.

The pid comes from the kernel (SO_PEERCRED, unix(7)): it is that of the process that called
listen(2) last, and QEMU does so even on a socket that was handed to it (util/qemu-sockets.c,
socket_listen). The rest is in /proc/PID (proc(5)).
"""

import asyncio
import contextlib
import errno
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from calotype.errors import ConflictError, HostError, QemuError, RequestError
from calotype.model.names import is_text
from calotype.plan.adopt import Stranger
from calotype.qemu import monitor as qmp
from calotype.qemu import process
from calotype.qemu.process import start_ticks

_GREETING = b'{"QMP"'
_ADDRESS = re.compile(r"(tcp:|telnet:|unix:|vsock:)|.*:\d+$")
_SAID = 60


async def reach(path: Path) -> int:
    """The pid of the process that listens on the unix socket at *path*.

    Raises:
        RequestError: It is no unix socket.
        HostError: It is not there, or may not be connected to.
        QemuError: Nobody listens there.
        ConflictError: It does not answer, or its process cannot be seen from here.
    """
    _require_socket(path)
    try:
        async with asyncio.timeout(qmp.GREETING_TIMEOUT_S):
            connection = await qmp.opened(path)
    except TimeoutError as error:
        raise qmp.silent(path, qmp.GREETING_TIMEOUT_S) from error
    except ConnectionRefusedError as error:
        raise QemuError(
            f"nobody listens on {path}", "its QEMU has ended: start it, then adopt it"
        ) from error
    except OSError as error:
        if error.errno in (errno.EPROTOTYPE, errno.EPROTONOSUPPORT):
            raise _no_monitor(path, "is a socket of another kind") from error
        raise HostError(
            f"cannot connect to {path}: {error.strerror}", "run calotype as QEMU's user, or as root"
        ) from error
    with connection:
        pid = qmp.peer_pid(connection)
    if pid:
        return pid
    raise ConflictError(
        f"the process behind {path} is on another host, or outside of this container",
        "run calotype where QEMU runs",
    )


def _require_socket(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if _ADDRESS.match(path.name) and error.errno == errno.ENOENT:
            raise RequestError(
                f"{path.name} is no path: over TCP nobody can tell whose QEMU answers",
                "give QEMU a monitor on a unix socket: -qmp unix:PATH,server=on,wait=off",
            ) from error
        raise HostError(f"{path}: {error.strerror}", "name the socket of -qmp unix:...") from error
    if not stat.S_ISSOCK(mode):
        raise _no_monitor(path, "is no socket")


async def require_monitor(path: Path) -> None:
    """Have QEMU greet once at *path*.

    Raises:
        RequestError: It is another thing than a QMP monitor.
        ConflictError: Somebody else is connected to it.
        QemuError: It hung up.
    """
    loop = asyncio.get_running_loop()
    said = b""
    try:
        with await qmp.opened(path) as connection:
            connection.setblocking(False)
            async with asyncio.timeout(qmp.GREETING_TIMEOUT_S):
                while len(said) < len(_GREETING):
                    if not (piece := await loop.sock_recv(connection, 1 << 12)):
                        break
                    said += piece
    except TimeoutError as error:
        silent = qmp.silent(path, qmp.GREETING_TIMEOUT_S)
        if silent.data.get("holders"):
            raise silent from error
        raise _no_monitor(
            path, "says nothing, where a QMP monitor greets (or its QEMU hangs)"
        ) from error
    except OSError as error:
        raise QemuError(f"{path}: {error.strerror}", qmp.LAST_WORDS) from error
    if not said.startswith(_GREETING):
        words = said[:_SAID].decode(errors="replace").strip()
        raise _no_monitor(path, f"says {words!r}")


def _no_monitor(path: Path, found: str) -> RequestError:
    return RequestError(
        f"{path} {found}: it is no QMP monitor",
        "name the socket of -qmp, or of a -mon with mode=control",
        path=str(path),
    )


def look(pid: int, mark: str) -> Stranger:
    """What /proc shows of a process.

    Args:
        pid: The process.
        mark: The variable of its environment by which Calotype knows its own.

    Raises:
        HostError: It may not be looked at, or its folder or its words cannot be told.
        ConflictError: It ended meanwhile.
    """
    home = Path(f"/proc/{pid}")
    ticks = start_ticks(pid)
    if ticks is None:
        raise ConflictError(
            f"process {pid}, which listened on the socket, has ended",
            "start QEMU anew, then adopt it",
            pid=pid,
        )
    try:
        uid = home.stat().st_uid
        words = (home / "cmdline").read_bytes().split(b"\0")[:-1]
    except OSError as error:
        raise _unseen(pid, error) from error
    argv = tuple(os.fsdecode(word) for word in words)
    seen = _private(pid, uid)
    # -daemonize leaves for the root folder (os-posix.c, os_setup_post); the shell has noted where
    # QEMU was started
    cwd = seen.environment.get("PWD", seen.cwd) if "-daemonize" in argv else seen.cwd
    _require_told(pid, cwd, argv)
    return Stranger(
        pid=pid,
        start_ticks=ticks,
        uid=uid,
        argv=argv,
        cwd=cwd,
        has_moved=cwd != seen.cwd,
        program=seen.program,
        cgroup=_cgroup(home),
        vm_id=seen.environment.get(mark, ""),
        shares_files=seen.shares_files,
    )


class _Private(NamedTuple):
    """What /proc shows to a process's own user and to root alone."""

    cwd: str
    program: str
    environment: dict[str, str]
    shares_files: bool


def _private(pid: int, uid: int) -> _Private:
    """See it, or nothing where it is another user's; that is refused in words of its own."""
    home = Path(f"/proc/{pid}")
    try:
        words = (home / "environ").read_bytes().split(b"\0")
        pairs = (os.fsdecode(word).partition("=") for word in words)
        return _Private(
            cwd=str((home / "cwd").readlink()),
            program=str((home / "exe").readlink()),
            environment={name: value for name, _, value in pairs},
            shares_files=_shares_files(home),
        )
    except OSError as error:
        if uid == os.geteuid():
            raise _unseen(pid, error) from error
        return _Private("/", "", {}, shares_files=True)


def _unseen(pid: int, error: OSError) -> HostError:
    return HostError(
        f"process {pid} may not be looked at: {error.strerror}",
        "run calotype as QEMU's user, or as root",
        pid=pid,
    )


def _shares_files(home: Path) -> bool:
    own = Path("/proc/self")
    spaces = [(each / "ns" / "mnt").readlink() for each in (own, home)]
    roots = [(each / "root").stat() for each in (own, home)]
    return spaces[0] == spaces[1] and os.path.samestat(*roots)


def _cgroup(home: Path) -> tuple[str, ...]:
    with contextlib.suppress(OSError):
        return tuple((home / "cgroup").read_text(errors="replace").splitlines())
    return ()


def _require_told(pid: int, cwd: str, argv: tuple[str, ...]) -> None:
    if not Path(cwd).is_dir():
        raise HostError(
            f"the folder that process {pid} runs in is gone: {cwd}",
            "its relative paths mean nothing any more: start QEMU anew",
        )
    for word in (cwd, *argv):
        if not is_text(word):
            raise HostError(f"{word!r} is not UTF-8", "give the file another name")


def open_files(pid: int) -> frozenset[tuple[int, int]]:
    """Device and inode of each file that a process has open.

    Raises:
        HostError: It may not be looked at.
    """
    try:
        return process.open_files(pid)
    except OSError as error:
        raise _unseen(pid, error) from error


def listener(path: Path) -> int | None:
    """The pid of the process that listens on *path* now, if one does."""
    try:
        with qmp.open_socket(path) as connection:
            return qmp.peer_pid(connection) or None
    except OSError:
        return None

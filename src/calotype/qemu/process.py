"""QEMU as a process of the host: started apart from us, known by pid and start time.

Source of the fields: proc(5).
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from calotype.errors import ConflictError, HostError
from calotype.guard import borrow, unprotect
from calotype.model.vm import Process

_CAP_SYS_PTRACE = 19
_USERFAULTFD = Path("/dev/userfaultfd")
_STANDARD_OUTPUT = 1
"""The log that `spawn` gave it: a file that every process of ours has open."""


class Memory(NamedTuple):
    """Resident memory of a process, in bytes, and how much of it is on huge pages."""

    resident_bytes: int
    huge_bytes: int


def spawn(
    argv: Sequence[str], cwd: str, descriptors: Sequence[int], log: int, mark: tuple[str, str]
) -> Process:
    """Start QEMU in a session of its own, without a terminal.

    Args:
        argv: Program and arguments.
        cwd: The folder that relative paths in them start from.
        descriptors: Open files that it inherits, under the same numbers.
        log: An open file for what it says on standard output and error.
        mark: A variable for its environment, and its value, by which `find` knows it.

    Raises:
        HostError: The program cannot be started.
    """
    try:
        child = subprocess.Popen(
            argv,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=descriptors,
            env={**os.environ, mark[0]: mark[1]},
            start_new_session=True,
        )
    except OSError as error:
        raise HostError(
            f"cannot start {argv[0]}: {error.strerror}",
            "is QEMU installed, and is the folder there?",
        ) from error
    child.returncode = 0  # it outlives us on purpose; do not warn that nobody waits for it
    return Process(child.pid, start_ticks(child.pid) or 0)


def find(variable: str, value: str) -> list[Process]:
    """The processes that `spawn` started with this mark, and not what they started in turn.

    Each leads a session of its own; what it started inherits the mark but not that.
    """
    mark = f"{variable}={value}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0") and os.getsid(pid) == pid:
                found.append(Process(pid, start_ticks(pid) or 0))
    return [each for each in found if each.start_ticks]


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None where it is gone or a zombie.

    A zombie whose other threads still end is not gone: they hold its files, and the locks on them.
    """
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        threads, ticks = int(fields[16]), int(fields[18])
        return None if state in "ZX" and threads <= 1 else ticks
    return None


def this() -> Process:
    """This very process."""
    return Process(os.getpid(), start_ticks(os.getpid()) or 0)


def is_alive(qemu: Process) -> bool:
    """Whether it still is the process that we started."""
    _reap(qemu.pid)
    return start_ticks(qemu.pid) == qemu.start_ticks


def _reap(pid: int) -> None:
    """Take a child of ours that has ended off the process table."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def kill(qemu: Process) -> None:
    """End it at once; one that is gone is no error."""
    _signal(qemu, signal.SIGKILL)


def terminate(qemu: Process) -> None:
    """Have it end as `quit` does: so a QEMU answers SIGTERM (system/runstate.c)."""
    _signal(qemu, signal.SIGTERM)


def _signal(qemu: Process, number: signal.Signals) -> None:
    if is_alive(qemu):
        with contextlib.suppress(ProcessLookupError):
            os.kill(qemu.pid, number)


async def ended(qemu: Process, timeout_s: float) -> bool:
    """Wait until it has ended; False where it has not within *timeout_s*."""
    deadline = time.monotonic() + timeout_s
    while is_alive(qemu):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


async def end(qemu: Process) -> None:
    """End it at once, and wait until it has: until then it has its ports and locks.

    Raises:
        HostError: It does not end; what it has must not be given to another.
    """
    kill(qemu)
    if not await ended(qemu, 10.0):
        raise HostError(
            f"process {qemu.pid} does not end", "see the kernel log; `calotype recover` tries again"
        )


def open_files(pid: int) -> frozenset[tuple[int, int]]:
    """Device and inode of each file that a process has open.

    Raises:
        OSError: It may not be looked at.
    """
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = link.stat()
            found.add((status.st_dev, status.st_ino))
    return frozenset(found)


def require_open(path: str, opened: frozenset[tuple[int, int]]) -> None:
    """Refuse a path that leads to another file than the one that QEMU has open.

    QEMU opens images by path again: it would go on with the other one, the guest on it.

    Raises:
        ConflictError: It does.
    """
    status = Path(path).stat() if Path(path).exists() else None
    if status is None or (status.st_dev, status.st_ino) not in opened:
        raise ConflictError(
            f"{path} is not the file that QEMU has open: it was moved, replaced or removed",
            "put the file that it was started with back, or start QEMU anew",
            path=path,
        )


def memory(pid: int) -> Memory:
    """How much memory it holds; zeros where the kernel does not tell."""
    fields: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, kib, *_ = line.split()
            fields[name.rstrip(":")] = int(kib) * 1024
    return Memory(fields.get("Rss", 0), fields.get("AnonHugePages", 0))


def unprotect_memory(pid: int) -> None:
    """Take all write protection off its memory; one that is gone has none.

    A QEMU before 8.1 needs it when a live save has ended badly: see `calotype.guard`.
    """
    with contextlib.suppress(OSError):  # the plan has seen to it that we may
        unprotect(pid)


def may_unprotect_memory(pid: int) -> bool:
    """Whether we may look into it: then we may also take protection off that it forgot."""
    with contextlib.suppress(OSError):
        os.close(borrow(pid, _STANDARD_OUTPUT))
        return True
    return False


def may_protect_memory(pid: int) -> bool:
    """Whether it may write-protect its own memory with userfaultfd.

    Source: Documentation/admin-guide/mm/userfaultfd.rst, and QEMU's util/userfaultfd.c, which tries
    /dev/userfaultfd first.
    """
    return _has_ptrace(pid) or _everybody_may() or _can_open(pid, _USERFAULTFD)


def _has_ptrace(pid: int) -> bool:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_SYS_PTRACE & 1)
    return False


def _everybody_may() -> bool:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
    return False


def _can_open(pid: int, device: Path) -> bool:
    """Whether the process's user may open *device*; its groups count, access lists do not."""
    with contextlib.suppress(OSError):
        owner, access = Path(f"/proc/{pid}").stat(), device.stat()
        status = Path(f"/proc/{pid}/status").read_text()
        groups = next(line for line in status.splitlines() if line.startswith("Groups:"))
        if owner.st_uid == access.st_uid:
            return access.st_mode & 0o600 == 0o600  # noqa: PLR2004 - read and write, for the owner
        if str(access.st_gid) in (*groups.split()[1:], str(owner.st_gid)):
            return access.st_mode & 0o060 == 0o060  # noqa: PLR2004 - for the group
        return access.st_mode & 0o006 == 0o006  # noqa: PLR2004 - for the others
    return False

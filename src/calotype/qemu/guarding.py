"""Posting a guard before a pause or a freeze; what it does is in `calotype.guard`."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from calotype import guard
from calotype.errors import HostError, QemuError
from calotype.qemu.monitor import LAST_WORDS, open_socket

_POSTING_S = 10.0


class Switch(NamedTuple):
    """A guest goes over from an overlay to the image below."""

    record: str
    """The file of the VM's record, which says which of the two is the newest."""
    newest: str
    """The path of the image below."""
    job: str
    """QEMU's job that switches."""


class Handover(NamedTuple):
    """Another QEMU takes a VM's place."""

    record: str
    """The file of the VM's record, which says whose guest is to run."""
    newest: str
    """The path of an image that only the new one has."""
    let_run: bool
    """Whether the guest of the new one is to run."""
    back: list[dict[str, Any]]
    """The acts that hand back what was handed over, as plain data, pids in them."""


class Post:
    """A guard that stands by."""

    def __init__(self, pid: int, line: socket.socket) -> None:
        self.pid = pid
        self._line = line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Hang up: a guard that was not told to stand down acts."""
        self._line.close()

    async def ready(self) -> None:
        """Wait until it has greeted QEMU.

        Raises:
            HostError: It does not answer.
        """
        await self._hear(guard.READY)

    async def arm(
        self,
        limit_s: float,
        change: Switch | Handover | None = None,
        *,
        forgetful: int | None = None,
    ) -> None:
        """Begin its watch; returns when it has begun.

        Args:
            limit_s: After how long it acts.
            change: What is changed in the pause besides, so that another guest or image is newest.
            forgetful: The process whose memory a save that is ended leaves protected.

        Raises:
            HostError: It does not answer: then the guest must not be stopped.
        """
        orders: dict[str, Any] = {
            "seconds": limit_s, "switch": None, "handover": None, "forgetful": forgetful,
        }  # fmt: skip
        if change is not None:
            orders[type(change).__name__.lower()] = change._asdict()
        await self._say(guard.ARM + json.dumps(orders).encode() + b"\n")
        await self._hear(guard.ARMED)

    async def stand_down(self) -> None:
        """End its watch: the guest runs. One that is gone, or that has acted, is no error."""
        with contextlib.suppress(HostError):
            await self._say(guard.STAND_DOWN)

    async def act(self, patience_s: float) -> bool:
        """Have it act now, and wait until it has; whether it has ended within *patience_s*."""
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_WR)
        try:
            async with asyncio.timeout(patience_s):
                while await asyncio.get_running_loop().sock_recv(self._line, 64):
                    pass
        except OSError:  # TimeoutError is one
            return False
        return True

    async def _say(self, word: bytes) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(self._line, word)
        except OSError as error:
            raise HostError("the guard of the pause is gone", "try again") from error

    async def _hear(self, word: bytes) -> None:
        try:
            async with asyncio.timeout(_POSTING_S):
                heard = await asyncio.get_running_loop().sock_recv(self._line, 64)
        except (TimeoutError, OSError) as error:
            raise HostError("the guard of the pause does not answer", "try again") from error
        if heard != word:
            raise HostError("the guard of the pause ended before the pause", "try again")


@contextlib.asynccontextmanager
async def posted(
    monitor_path: Path, new_path: Path | None = None, new_pid: int = 0
) -> AsyncIterator[Post]:
    """Have a guard stand by for the length of a `with` block; without a word it acts at the end.

    Args:
        monitor_path: A QMP socket of the VM that nobody else uses.
        new_path: In a handover, one of the QEMU that is to take its place.
        new_pid: ...and its pid.

    Raises:
        HostError: It cannot be started, or does not answer.
        QemuError: QEMU does not answer it.
    """
    with contextlib.ExitStack() as stack:
        line = stack.enter_context(_reached(monitor_path)).fileno()
        also = []
        if new_path is not None:
            also = [stack.enter_context(_reached(new_path)).fileno(), _pidfd(new_pid)]
            stack.callback(os.close, also[-1])
        post = _posted(line, also)
    with post:
        await post.ready()
        yield post


@contextlib.asynccontextmanager
async def posted_at_agent(descriptor: int) -> AsyncIterator[Post]:
    """Have a guard stand by that thaws the guest's file systems; as `posted`.

    Args:
        descriptor: The connection to the guest's agent, which it shares with us.

    Raises:
        HostError: It cannot be started, or does not answer.
    """
    with _posted(descriptor, duty=(guard.THAW,)) as post:
        await post.ready()
        yield post


def _posted(line: int, also: Sequence[int] = (), duty: Sequence[str] = ()) -> Post:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        with theirs:
            process = _spawn((line, theirs.fileno(), *also), duty)
    except BaseException:
        ours.close()
        raise
    process.returncode = 0  # it ends by itself; do not warn that nobody waits for it
    return Post(process.pid, ours)


def _reached(path: Path) -> socket.socket:
    try:
        return open_socket(path)
    except OSError as error:
        raise QemuError(f"no QEMU answers on {path}: {error.strerror}", LAST_WORDS) from error


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise QemuError("the QEMU that was prepared is gone", LAST_WORDS) from error


def _spawn(descriptors: Sequence[int], duty: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Start the guard by its file: nothing of the package needs to be found or imported."""
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, *duty, *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,
            cwd="/",
        )
    except OSError as error:
        raise HostError(
            f"the guard cannot be started: {error.strerror}", "is Python there, and memory free?"
        ) from error

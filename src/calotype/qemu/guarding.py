"""Posting a guard before a pause or a freeze; what it does is in `calotype.guard`.

A QEMU that we started has a monitor for the guard alone. One that was adopted has a single monitor,
which serves a single client: there the guard inherits the very connection of its owner. Two who
read one socket would take each other's words away, so there is always one: the owner, until the
guard says that it acts. Then the owner hangs up its end at once, and lets the guard finish before
it connects again. What the owner accepts in between would be worth nothing, for the guard may have
read the RESUME event that says so: hence `Post.stand_down` says whether the guard stood by to the
end, and only then anything is accepted.
"""

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
from calotype.qemu.cancelling import seen_through
from calotype.qemu.monitor import LAST_WORDS, Monitor, open_socket

_POSTING_S = 10.0
_HELP = b"HELP\n"
"""Any word but STAND DOWN has the guard act."""


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


class Successor(NamedTuple):
    """The QEMU that is to take a VM's place in a handover; the guard may have to end it."""

    monitor_path: Path
    """A QMP socket of it that nobody else uses."""
    pid: int


class Post:
    """A guard that stands by.

    Args:
        pid: Its process.
        line: The socket to it.
        shared: The owner's own connection to QEMU, where the guard has none of its own.
    """

    def __init__(self, pid: int, line: socket.socket, shared: Monitor | None) -> None:
        self.pid = pid
        self._line = line
        self._shared = shared
        self._listening: asyncio.Task[bool] | None = None
        self._is_over = False

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
        if self._shared is not None:
            self._listening = asyncio.create_task(self._listen(self._shared))

    async def stand_down(self) -> bool:
        """End its watch: the guest runs. One that is gone is no error.

        Returns:
            Whether nobody but the owner can have ended the pause, as far as the owner might have
            missed it: with a connection of its own it misses nothing.
        """
        with contextlib.suppress(HostError):
            await self._say(guard.STAND_DOWN)
        if self._listening is None:
            return True
        done, _ = await asyncio.wait({self._listening}, timeout=_POSTING_S)
        self._is_over = bool(done) and not self._listening.result()
        return self._is_over

    async def finished(self) -> None:
        """Have it act if it was not stood down, and wait until a shared connection is free.

        With a connection of its own it sees that we hang up, and is not waited for.
        """
        if self._shared is None or self._listening is None or self._is_over:
            return
        self._shared.hand_over()
        with contextlib.suppress(HostError):
            await self._say(_HELP)
        await seen_through(self._let_go(self._listening))

    async def _let_go(self, listening: "asyncio.Task[bool]") -> None:
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(guard.RESCUE_S + _POSTING_S):
                await asyncio.wait({listening})
                while await asyncio.get_running_loop().sock_recv(self._line, 64):
                    continue

    async def _listen(self, shared: Monitor) -> bool:
        """Hear whether it acts, and give the connection up to it at once; False where it ended."""
        heard = b""
        with contextlib.suppress(OSError):
            while piece := await asyncio.get_running_loop().sock_recv(self._line, 64):
                heard += piece
                if guard.ACTING in heard:
                    shared.hand_over()
                    return True
                if guard.STOOD_DOWN in heard:
                    return False
        return False

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
                heard = await asyncio.get_running_loop().sock_recv(self._line, len(word))
        except (TimeoutError, OSError) as error:
            raise HostError("the guard of the pause does not answer", "try again") from error
        if heard != word:
            raise HostError("the guard of the pause ended before the pause", "try again")


@contextlib.asynccontextmanager
async def posted(
    monitor_path: Path, *, shared: Monitor | None = None, successor: Successor | None = None
) -> AsyncIterator[Post]:
    """Have a guard stand by for the length of a `with` block; without a word it acts at the end.

    Args:
        monitor_path: A QMP socket of the VM that nobody else uses.
        shared: The owner's own connection, where there is no such socket; it is of no use to the
            owner any more if the guard acted.
        successor: In a handover, the QEMU that is to take the place of the VM's.

    Raises:
        HostError: It cannot be started, or does not answer.
        QemuError: QEMU does not answer it.
    """
    with contextlib.ExitStack() as stack:
        qemu = stack.enter_context(_reached(monitor_path)) if shared is None else shared
        also = []
        if successor is not None:
            reached = stack.enter_context(_reached(successor.monitor_path))
            also = [reached.fileno(), _pidfd(successor.pid)]
            stack.callback(os.close, also[-1])
        post = _posted(qemu.fileno(), also, shared=shared)
    with post:
        await post.ready()
        try:
            yield post
        finally:
            await post.finished()


@contextlib.asynccontextmanager
async def posted_at_agent(descriptor: int) -> AsyncIterator[Post]:
    """Have a guard stand by that thaws the guest's file systems; as `posted`.

    Args:
        descriptor: The connection to the guest's agent, which it shares with us.

    Raises:
        HostError: It cannot be started, or does not answer.
    """
    with _posted(descriptor, duty=guard.THAW) as post:
        await post.ready()
        yield post


def _posted(
    line: int, also: Sequence[int] = (), *, shared: Monitor | None = None, duty: str = ""
) -> Post:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        with theirs:
            how = duty or (guard.SHARED if shared is not None else "")
            process = _spawn((line, theirs.fileno(), *also), how)
    except BaseException:
        ours.close()
        raise
    process.returncode = 0  # it ends by itself; do not warn that nobody waits for it
    return Post(process.pid, ours, shared)


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


def _spawn(descriptors: Sequence[int], how: str) -> "subprocess.Popen[bytes]":
    """Start the guard by its file: nothing of the package needs to be found or imported."""
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, *map(str, descriptors), *how.split()],
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

"""A connection to the agent in the guest, every wait of which ends.

The agent is a program of the guest's: it may be missing, hang, die or lie, and none of that may
hurt. It is reached through a socket that the user's own command line names and that serves one
client at a time: another one connects, and waits in vain. So a connection that was never answered
says whose the socket is, if the kernel tells.

While file systems are frozen the agent answers only `guest-sync`, `-ping`, `-info`,
`-fsfreeze-status` and `-fsfreeze-thaw` (qga/main.c, ga_freeze_allowlist).
"""

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

from calotype.errors import ConflictError, QemuError
from calotype.formats.guest_agent import Answer, Answers, request, sync
from calotype.qemu.monitor import open_socket
from calotype.qemu.peers import clients

ANSWER_TIMEOUT_S = 5.0
"""How long the agent may be silent where it has nothing to wait for."""

_START_IT = "is qemu-guest-agent installed in the guest, and does it run?"
_BYTES = 1 << 16


class AgentSilent(QemuError):  # noqa: N818 - what it is, not whose fault
    """The agent does not answer."""


class AgentGone(AgentSilent):
    """QEMU hung up, and the agent with it."""


class AgentRefused(QemuError):  # noqa: N818 - the agent's answer to a command is no fault of ours
    """The agent answered a command with an error; its text is in `data`."""


class AgentTaken(ConflictError):  # noqa: N818 - what it is, not whose fault
    """The agent's socket serves another client."""


class Info(NamedTuple):
    """What an agent says of itself."""

    version: str
    commands: tuple[str, ...]
    """Those that it carries out; others it knows but was told not to."""
    is_frozen: bool


class Agent:
    """An open connection to an agent; made by `connect`."""

    def __init__(self, connection: socket.socket, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._answers = Answers()
        self._pending: list[Answer] = []
        self._is_in_step = False
        """The next answer that comes is that to the next command."""
        self._was_heard = False

    def fileno(self) -> int:
        """The connection's descriptor: who inherits it goes on where we stop."""
        return self._connection.fileno()

    async def ask(self, command: str, timeout_s: float = ANSWER_TIMEOUT_S, **arguments: Any) -> Any:
        """Send a command and wait for its answer; `_` in argument names stands for `-`.

        Raises:
            AgentSilent: It does not answer in time.
            AgentGone: QEMU hung up.
            AgentRefused: It answered with an error.
            AgentTaken: The socket serves another client.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if not self._is_in_step:
                    await self._get_in_step()
                self._is_in_step = False
                answer = await self._answer(request(command, **arguments))
        except TimeoutError as error:
            raise self._silent(command, timeout_s) from error
        except OSError as error:
            raise AgentGone(f"QEMU closed {self._path} during {command}", _START_IT) from error
        self._is_in_step = True
        if answer.error:
            raise AgentRefused(
                f"the guest agent refused {command}: {answer.error}",
                "its log in the guest may tell more",
                agent=answer.error,
            )
        return answer.value

    async def _get_in_step(self) -> None:
        """Leave behind what an earlier client, or a wait that was given up, did not read."""
        number = secrets.randbits(31)
        self._pending.clear()
        self._answers.await_sync(number)
        await self._answer(sync(number))
        self._was_heard = True

    async def _answer(self, said: bytes) -> Answer:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._connection, said)
        while not self._pending:
            heard = await loop.sock_recv(self._connection, _BYTES)
            if not heard:
                raise ConnectionResetError
            self._pending += self._answers.feed(heard)
        return self._pending.pop(0)

    def _silent(self, command: str, timeout_s: float) -> QemuError | ConflictError:
        if not self._was_heard and (holders := clients(self._path)):
            return _taken(self._path, holders)
        what = f"{command} in {timeout_s:g} s" if self._was_heard else f"on {self._path}"
        return AgentSilent(f"the guest agent does not answer {what}", _START_IT)

    # --- what it is asked ------------------------------------------------------------------------

    async def info(self) -> Info:
        """What it says of itself.

        Raises:
            AgentSilent: It does not answer, or with what is no answer to that; or see `ask`.
        """
        told = await self.ask("guest-info")
        status = await self.ask("guest-fsfreeze-status")
        try:
            commands = [each["name"] for each in told["supported_commands"] if each["enabled"]]
            return Info(str(told["version"]), tuple(map(str, commands)), status == "frozen")
        except (LookupError, TypeError) as error:
            raise AgentSilent("the guest agent answers nonsense", _START_IT) from error

    async def freeze(self, timeout_s: float) -> int:
        """Freeze the guest's file systems; how many were frozen.

        Raises:
            AgentRefused: One cannot be frozen; the agent has thawed the others by then.
        """
        return _count(await self.ask("guest-fsfreeze-freeze", timeout_s))

    async def thaw(self, timeout_s: float) -> int:
        """Thaw the guest's file systems; how many were frozen until then, 0 if none was."""
        return _count(await self.ask("guest-fsfreeze-thaw", timeout_s))

    async def thaw_surely(self, timeout_s: float) -> None:
        """Thaw what is frozen, and see that nothing is any more; that nothing was is no error.

        Raises:
            AgentRefused: Something is frozen still.
        """
        with contextlib.suppress(AgentRefused):  # the status says what came of it
            await self.thaw(timeout_s)
        if await self.ask("guest-fsfreeze-status", timeout_s) != "thawed":
            raise AgentRefused(
                "the guest's file systems are still frozen",
                "thaw them in the guest (fsfreeze --unfreeze), or start it anew",
            )

    async def set_time(self, now_ns: int, timeout_s: float = 2 * ANSWER_TIMEOUT_S) -> None:
        """Set the guest's clock, that of its hardware too, to *now_ns* since 1970, UTC."""
        await self.ask("guest-set-time", timeout_s, time=now_ns)


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _taken(path: Path, holders: list[int]) -> AgentTaken:
    named = ", ".join(map(str, holders)) or "another one"
    return AgentTaken(
        f"the guest agent's socket {path} serves process {named}",
        "it serves one at a time: wait until that one is done, or end it",
        holders=holders,
    )


@contextlib.asynccontextmanager
async def connect(path: Path) -> AsyncIterator[Agent]:
    """Open the connection at *path* for the length of a `with` block.

    Raises:
        AgentSilent: Nobody listens there.
        AgentTaken: Others wait for it already.
    """
    try:
        connection = open_socket(path)
    except BlockingIOError as error:
        raise _taken(path, clients(path)) from error
    except OSError as error:
        raise AgentSilent(
            f"no QEMU answers on {path}: {error.strerror}",
            "the VM's command line names that socket: was it removed, or made elsewhere?",
        ) from error
    with connection:
        connection.setblocking(False)
        yield Agent(connection, path)

"""Serving: listen for clients, be connected to QEMU, and go over when it is replaced.

QEMU is reached by a monitor that nobody else uses while it is served: the one that Calotype gives
to each VM for this, or one that is named (*upstream*). When it hangs up, a VM of the store may go
on in another process, because it was restored; then the service goes on with that one, and no
client is hung up on. Otherwise the clients are told, and the service ends with QEMU.
"""

import asyncio
import contextlib
import shlex
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from calotype import __version__
from calotype.engine import launch
from calotype.errors import ConflictError, QemuError
from calotype.model.vm import Process
from calotype.qemu import monitor as qmp
from calotype.qmp import commands, introspection
from calotype.qmp.client import Client, Greeting, Message, Refused, Returned
from calotype.qmp.server import Command, Refusal
from calotype.qmp.visiting import visit
from calotype.service.channel import Channel
from calotype.service.jobs import Jobs, OneJob, in_use, named_job
from calotype.service.own import Own, is_ours
from calotype.service.relay import Peer, Relay, negotiation
from calotype.service.translating import words
from calotype.service.work import Work
from calotype.store.store import Store

GREETING_TIMEOUT_S = 3.0
CLIENT_READ_BYTES = 1 << 12
"""How much is taken from a client at once: nonsense costs microseconds a byte to read."""
_LOOK_S = 0.02
_GRACE_S = 2.0
"""How long another process of the VM is looked for where nobody holds the VM's lock."""
_NO_ROOM_S = 0.5
"""How long nobody is let in where there is no descriptor left."""
FAREWELL_S = 2.0
"""How long clients are given to read what they are told in the end."""

_NO_VM = "this monitor is served without a VM: `calotype serve NAME` serves one with snapshots"


class Vm:
    """The VM of the store that is served, and its QEMU.

    Raises:
        NotFoundError: There is no such VM.
        ConflictError: It does not run, or has a single monitor.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.record = store.find(name)
        qemu = launch.is_running(store, self.record)
        if qemu is None:
            raise ConflictError(
                f"the VM {name!r} does not run", f"`calotype start {shlex.quote(name)}` first"
            )
        if qemu.monitor:
            raise ConflictError(
                f"the VM {name!r} was adopted and has one monitor: served, nobody else reaches it",
                "serve that alone, by --upstream, where nobody else has to reach it",
            )
        self.qemu: Process = qemu

    @property
    def upstream(self) -> Path:
        """The monitor that QEMU has for the service."""
        return self.store.folder(self.record.id) / launch.SERVICE

    async def successor(self) -> bool:
        """Wait for the QEMU that the VM goes on in; whether there is one."""
        until = time.monotonic() + _GRACE_S
        while True:
            found = launch.is_running(self.store, self.record)
            if found is not None and found != self.qemu and not found.monitor:
                self.qemu = found
                return True
            if self.store.is_held(self.record.id):
                until = time.monotonic() + _GRACE_S
            elif time.monotonic() > until:
                return False
            await asyncio.sleep(_LOOK_S)


class Upstream:
    """A connection to QEMU: first the negotiation, then what the relay makes of it."""

    def __init__(self, connection: socket.socket) -> None:
        self.session = Client()
        self.gone = asyncio.Event()
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self._said: Callable[[bytes], None] = self._negotiating
        self.channel = Channel(
            connection, lambda data, _: self._said(data), self._ended, unsent_bytes=None
        )

    async def negotiate(self) -> tuple[dict[str, Any], frozenset[str]]:
        """Hear the greeting, and ask for QEMU's commands.

        Raises:
            QemuError: It is no QMP monitor, or hangs up.
        """
        greeting = await self._heard(Greeting)
        self.channel.send(negotiation(self.session, greeting.value()))
        await self._heard(Returned)
        self.channel.send(self.session.send("query-commands")[1])
        named = (await self._heard(Returned)).value()
        return greeting.value(), frozenset(each["name"] for each in named)

    def hand_to(self, relay: Relay) -> None:
        """From now on the relay hears what QEMU says."""
        self._said = relay.qemu_said
        relay.qemu_here(self.channel, self.session)

    async def _heard(self, kind: type[Any]) -> Any:
        while (message := await self._messages.get()) is not None:
            if isinstance(message, kind):
                return message
            if isinstance(message, Refused):
                break
        raise QemuError(
            "what answers at the monitor is no QMP, or hung up", "name the socket of -qmp"
        )

    def _negotiating(self, data: bytes) -> None:
        for message in self.session.receive(data):
            self._messages.put_nowait(message)

    def _ended(self) -> None:
        self._messages.put_nowait(None)
        self.gone.set()


async def reach(path: Path) -> tuple[Upstream, dict[str, Any]]:
    """Connect to QEMU's monitor at *path*, and leave the negotiation; also what it said first.

    Raises:
        ConflictError: Somebody else is connected to the monitor, or QEMU has a command of a name of
            ours.
        QemuError: Nobody answers there.
    """
    async with contextlib.AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                upstream = Upstream(await qmp.opened(path))
                stack.callback(upstream.channel.close)
                greeting, named = await upstream.negotiate()
        except TimeoutError as error:
            raise qmp.silent(path, GREETING_TIMEOUT_S) from error
        except OSError as error:
            raise QemuError(
                f"no QEMU answers on {path}: {error.strerror}", qmp.LAST_WORDS
            ) from error
        if rivals := sorted(named & commands.COMMANDS.keys()):
            raise ConflictError(
                f"this QEMU has a command {rivals[0]!r} of its own", "use it without the service"
            )
        stack.pop_all()
    return upstream, greeting


class Service:
    """Clients in front of one QEMU.

    Args:
        upstream: The connection to it.
        greeting: What it said first.
        vm: The VM of the store that it runs; None: only QEMU's own commands are served.
        work: Where operations run.
    """

    def __init__(
        self, upstream: Upstream, greeting: dict[str, Any], vm: Vm | None, work: Work
    ) -> None:
        self._upstream = upstream
        self._vm = vm
        self._relay = Relay(_greeting(greeting), self._is_own, self._merges())
        self._jobs = Jobs(self._tell)
        self._own = (
            None
            if vm is None
            else Own(vm.store, vm.record.name, work, self._jobs, self._tell, self._qemus_jobs)
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._nobody = asyncio.Event()
        """No client is connected."""
        self._nobody.set()
        upstream.hand_to(self._relay)

    def close(self) -> None:
        """Hang up on QEMU."""
        self._upstream.channel.close()

    def join(self, connection: socket.socket) -> None:
        """A client has connected."""
        relay = self._relay

        def heard(data: bytes, descriptors: list[int]) -> None:
            relay.heard(peer, data, descriptors)

        def ended() -> None:
            relay.leave(peer)
            if not relay.peers:
                self._nobody.set()

        def finished() -> None:
            relay.finish(peer)

        peer = relay.join(
            Channel(connection, heard, ended, finished=finished, read_bytes=CLIENT_READ_BYTES)
        )
        relay.greet(peer)
        self._nobody.clear()

    async def run(self) -> None:
        """Serve until there is no QEMU any more."""
        while True:
            await self._upstream.gone.wait()
            self._relay.qemu_gone()
            if self._vm is None or not await self._vm.successor():
                break
            self._upstream, _ = await reach(self._vm.upstream)
            self._upstream.hand_to(self._relay)
            self._relay.ask("query-status", self._tell_run_state)
        if not self._relay.said_shutdown:
            self._tell("SHUTDOWN", {"guest": False, "reason": "host-error"})
        self._relay.hang_up()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self._nobody.wait()

    def _tell_run_state(self, message: Returned | Refused) -> None:
        """Say that the guest runs: the QEMU before has told that it was stopped, for good."""
        if isinstance(message, Returned) and message.value()["running"]:
            self._tell("RESUME", {})

    async def _qemus_jobs(self) -> frozenset[str]:
        """The names of the jobs that QEMU has."""
        told: asyncio.Future[Returned | Refused] = asyncio.get_running_loop().create_future()
        self._relay.ask("query-jobs", told.set_result)
        message = await told
        jobs = message.value() if isinstance(message, Returned) else []
        return frozenset(job["id"] for job in jobs)

    # --- our commands --------------------------------------------------------------------------

    def _is_own(self, peer: Peer, command: Command) -> bool:
        """Take a command that is ours, and answer it when it is done."""
        name = named_job(command.name, command.arguments)
        is_about_ours = name is not None and name in self._jobs
        if not is_ours(command) and not is_about_ours and not self._takes_name(command):
            return False
        task = asyncio.get_running_loop().create_task(self._carry_out(peer, command, name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    def _takes_name(self, command: Command) -> bool:
        """Whether it would give a job of QEMU's the name of one of ours."""
        name = command.arguments.get("job-id")
        return isinstance(name, str) and name in self._jobs

    async def _carry_out(self, peer: Peer, command: Command, job: str | None) -> None:
        try:
            value = await self._value(command, job)
            line = peer.session.answer_raw(command, msgspec.json.encode(value))
        except Refusal as refusal:
            line = peer.session.refuse(command, refusal.kind, str(refusal))
        except Exception as error:  # noqa: BLE001 - a client waits, whatever went wrong
            line = peer.session.refuse(command, "GenericError", words(error))
        self._relay.answer(peer, command, line)

    async def _value(self, command: Command, job: str | None) -> Any:
        if not is_ours(command) and self._takes_name(command):
            raise in_use(command.arguments["job-id"])
        if job is not None:
            self._jobs.apply(command.name, visit(OneJob, command.arguments).id)
            return {}
        if self._own is None:
            raise Refusal(_NO_VM)
        return await self._own.carry_out(command)

    def _merges(self) -> Mapping[str, Callable[[Any], Any]]:
        """What we add to answers of QEMU's."""
        return {
            "query-commands": lambda value: [
                *value,
                *({"name": each} for each in commands.COMMANDS),
            ],
            "query-qmp-schema": introspection.merged,
            "query-version": _version,
            "query-jobs": lambda value: [*value, *self._jobs.infos()],
        }

    def _tell(self, event: str, data: Mapping[str, Any]) -> None:
        self._relay.tell(event, data, time.time_ns() // 1000)


def _greeting(said: dict[str, Any]) -> dict[str, Any]:
    """QEMU's greeting, as a client of ours hears it."""
    told = said["QMP"]
    return {"QMP": {**told, "version": _version(told["version"])}}


def _version(told: dict[str, Any]) -> dict[str, Any]:
    """QEMU's version; the package says whose service this is (qapi/control.json, VersionInfo)."""
    package = f"{told['package']} via calotype {__version__}".strip()
    return {**told, "package": package}


@contextlib.asynccontextmanager
async def serving(
    upstream: Path, vm: Vm | None, listener: socket.socket, work: Work
) -> AsyncIterator["asyncio.Task[None]"]:
    """Serve for the length of a `with` block.

    Args:
        upstream: QEMU's monitor.
        vm: The VM of the store that it is of; None: only QEMU's own commands are served.
        listener: A socket that listens for clients.
        work: Where operations run.

    Yields:
        A task that ends when QEMU has.

    Raises:
        ConflictError: Somebody else is connected to the monitor.
        QemuError: Nobody answers there.
    """
    service = Service(*await reach(upstream), vm, work)
    loop = asyncio.get_running_loop()
    listener.setblocking(False)

    def accept() -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:  # it hung up before it was let in
            return
        except OSError:  # there is no descriptor left: it waits in line
            loop.remove_reader(listener)
            loop.call_later(_NO_ROOM_S, listen)
            return
        service.join(connection)

    def listen() -> None:
        if listener.fileno() >= 0:
            loop.add_reader(listener, accept)

    listen()
    running = loop.create_task(service.run())
    try:
        yield running
    finally:
        loop.remove_reader(listener)
        running.cancel()
        service.close()
        await asyncio.gather(running, return_exceptions=True)

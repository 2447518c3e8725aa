"""The guard: a small process that ends a pause or a freeze whose owner died, hangs or was stopped.

It is started before the pause, with a QMP connection of its own to the VM and a socket to the
owner, and stays out of the way: a session of its own, so that what ends the owner's terminal does
not end it, and nothing but the standard library, so that it starts in a moment.

    owner                                   guard
      <----------------------------- READY    it has greeted QEMU
      ARM {seconds, switch} -------------->   the deadline counts from here
      <----------------------------- ARMED    only now does the owner stop the guest
      ... the pause ...
      STAND DOWN ------------------------->   the guest runs, or need not

If the owner hangs up before it says STAND DOWN, or the deadline passes, the guard cancels the save,
lets the guest run and watches that it does. It asks several times, because what the owner had sent
may still wait inside QEMU: a `stop` that is carried out after our `cont` must not have the last
word. To cancel first is right for every method: an ordinary migration that goes on would stop the
guest again when it completes. What the owner had begun otherwise is undone by `recover`; the
window's tables never accept a snapshot in whose pause somebody else let the guest run.

In a *switch* (the guest goes over from an overlay to the image below, which holds the same by then)
letting it run is right only if QEMU writes to the image that the record names. The record changes
inside that pause, before QEMU switches; so if it names the one below, the guard first has QEMU
complete the job that switches.

A *freeze* of the guest's file systems is guarded the same way, but what ends it is the agent in the
guest. The guard has the owner's own connection to it, not another one: the agent serves one client,
also one that was stopped, and what the owner had sent comes before what the guard sends. An agent
that hangs is asked for minutes, and so is one that died and may be started again: it comes back in
the frozen state (qga/main.c, ga_set_frozen, which leaves a file).

Run as: python -m calotype.guard QMP-FD OWNER-FD
or as:  python -m calotype.guard --thaw AGENT-FD OWNER-FD
"""

import contextlib
import json
import select
import socket
import sys
import time
from typing import Any

READY, ARMED, STAND_DOWN = b"READY\n", b"ARMED\n", b"STAND DOWN\n"
ARM = b"ARM "

RESCUE_S = 30.0
"""How long it is tried to let the guest run."""
STEADY = 8
"""How many looks in a row must find the guest running."""
LOOK_S = 0.02

THAW_S = 600.0
"""How long it is tried to thaw the guest's file systems."""
AGAIN_S = 2.0
"""How long the agent may be silent before it is asked again."""
HEARD_BYTES = 1 << 16
"""How much of what the agent says is kept."""

_AT_REST = frozenset({"paused", "postmigrate", "finish-migrate", "prelaunch"})


class Qemu:
    """A QMP connection, blocking, each wait bounded."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(RESCUE_S)
        self._connection = connection
        self._lines = connection.makefile("rb")

    def greet(self) -> None:
        """Read the greeting and leave the negotiation."""
        self._lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: str) -> Any:
        """Send a command; its value, or None where QEMU refused it."""
        words = {"execute": command, "arguments": arguments}
        self._connection.sendall(json.dumps(words).encode() + b"\n")
        while line := self._lines.readline():
            message = json.loads(line)
            if "return" in message or "error" in message:
                return message.get("return")
        raise ConnectionError("QEMU is gone")


class Agent:
    """The owner's connection to the agent in the guest, each wait bounded."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(AGAIN_S)
        self._connection = connection

    def greet(self) -> None:
        """Do nothing: the connection is the owner's until it is rescued from."""

    def thaw(self) -> None:
        """Ask until the agent says that nothing is frozen."""
        until = time.monotonic() + THAW_S
        while time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                if self._says_thawed():
                    return

    def _says_thawed(self) -> bool:
        number = time.monotonic_ns()
        sync = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        orders = [sync, {"execute": "guest-fsfreeze-thaw"}, {"execute": "guest-fsfreeze-status"}]
        lines = b"".join(json.dumps(order).encode() + b"\n" for order in orders)
        self._connection.sendall(b"\xff" + lines)
        heard = b""
        deadline = time.monotonic() + AGAIN_S
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._connection], [], [], left)[0]:
                heard = (heard + self._hear())[-HEARD_BYTES:]
                answers = [returned(line) for line in heard.rpartition(b"\xff")[2].splitlines()]
                if answers[:1] == [number] and "thawed" in answers:
                    return True
        return False

    def _hear(self) -> bytes:
        try:
            heard = self._connection.recv(HEARD_BYTES)
        except BlockingIOError:  # the owner was quicker
            return b""
        if not heard:
            raise ConnectionError("QEMU is gone")
        return heard


def returned(line: bytes) -> Any:
    """The value that an answer of the agent's returns, None if it is none."""
    try:
        return json.loads(line)["return"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


class Orders:
    """What the owner wants: the deadline, and which switch of images the pause is for, if any."""

    def __init__(self, words: bytes) -> None:
        told = json.loads(words.removeprefix(ARM))
        self.seconds = float(told["seconds"])
        self.switch: dict[str, str] | None = told["switch"]


def watch(owner: socket.socket) -> Orders | None:
    """Wait for the owner's word; what has to be done by us, or None if nothing has."""
    owner.sendall(READY)
    words = owner.makefile("rb").readline()
    if not words.startswith(ARM):
        return None  # it gave up, or died, before the pause began
    orders = Orders(words)
    deadline = time.monotonic() + orders.seconds
    owner.sendall(ARMED)
    while (left := deadline - time.monotonic()) > 0:
        if select.select([owner], [], [], left)[0]:
            return None if owner.recv(64) == STAND_DOWN else orders
    return orders


def rescue(qemu: Qemu, orders: Orders) -> None:
    """Let the guest run, and look until it surely does."""
    until = time.monotonic() + RESCUE_S
    steady = 0
    qemu.ask("migrate_cancel")
    if orders.switch is not None and is_recorded(orders.switch):
        complete(qemu, orders.switch["job"], until)
    while steady < STEADY and time.monotonic() < until:
        status = qemu.ask("query-status") or {}
        steady = steady + 1 if status.get("running") else 0
        if status.get("status") in _AT_REST:
            qemu.ask("migrate_cancel")
            qemu.ask("cont")
        else:
            time.sleep(LOOK_S)


def is_recorded(switch: dict[str, str]) -> bool:
    """Whether the record names the image below as the newest of some disk."""
    try:
        with open(switch["record"], "rb") as file:  # noqa: PTH123 - pathlib takes time to import
            disks = json.load(file)["disks"]
        return any(disk["active"]["path"] == switch["base"] for disk in disks)
    except (OSError, ValueError, LookupError, TypeError):  # a damaged one names nothing
        return False


def complete(qemu: Qemu, job: str, until: float) -> None:
    """Have a job switch the guest over, and wait until it has; one that has already is no error."""
    qemu.ask("job-complete", id=job)
    while time.monotonic() < until:
        states = {each["id"]: each["status"] for each in qemu.ask("query-jobs") or ()}
        if states.get(job, "concluded") == "concluded":
            return
        time.sleep(LOOK_S)


def main() -> None:
    """Guard one pause, or one freeze."""
    *duty, line_fd, owner_fd = sys.argv[1:]
    with (
        socket.socket(fileno=int(line_fd)) as connection,
        socket.socket(fileno=int(owner_fd)) as owner,
    ):
        guarded = Agent(connection) if duty else Qemu(connection)
        with contextlib.suppress(OSError, ValueError):  # one of the two is gone, be it in mid-word
            guarded.greet()
            orders = watch(owner)
            match guarded, orders:
                case Qemu(), Orders():
                    rescue(guarded, orders)
                case Agent(), Orders():
                    guarded.thaw()


if __name__ == "__main__":
    main()

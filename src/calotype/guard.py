"""The guard: a small process that ends a pause whose owner died, hangs or was stopped.

It is started before the pause, with a QMP connection of its own to the VM and a socket to the
owner, and stays out of the way: a session of its own, so that what ends the owner's terminal does
not end it, and nothing but the standard library, so that it starts in a moment.

    owner                                   guard
      <----------------------------- READY    it has greeted QEMU
      ARM seconds ------------------------>   the deadline counts from here
      <----------------------------- ARMED    only now does the owner stop the guest
      ... the pause ...
      STAND_DOWN ------------------------->   the guest runs, or need not

If the owner hangs up before it says STAND_DOWN, or the deadline passes, the guard cancels the save,
lets the guest run and watches that it does. It asks several times, because what the owner had sent
may still wait inside QEMU: a `stop` that is carried out after our `cont` must not have the last
word. To cancel first is right for every method: an ordinary migration that goes on would stop the
guest again when it completes. What the owner had begun otherwise is undone by `recover`; the
window's tables never accept a snapshot in whose pause somebody else let the guest run.

Run as: python -m calotype.guard QMP-FD OWNER-FD
"""

import contextlib
import json
import select
import socket
import sys
import time
from typing import Any

READY, ARMED, STAND_DOWN = b"READY\n", b"ARMED\n", b"STAND DOWN\n"
ARM = "ARM {seconds:.3f}\n"

RESCUE_S = 30.0
"""How long it is tried to let the guest run."""
STEADY = 8
"""How many looks in a row must find the guest running."""
LOOK_S = 0.02

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

    def ask(self, command: str) -> Any:
        """Send a command; its value, or None where QEMU refused it."""
        self._connection.sendall(json.dumps({"execute": command}).encode() + b"\n")
        while line := self._lines.readline():
            message = json.loads(line)
            if "return" in message or "error" in message:
                return message.get("return")
        raise ConnectionError("QEMU is gone")


def watch(owner: socket.socket) -> bool:
    """Wait for the owner's word; whether the guest must be let run by us."""
    owner.sendall(READY)
    words = owner.recv(64)
    if not words.startswith(b"ARM "):
        return False  # it gave up, or died, before the pause began
    deadline = time.monotonic() + float(words.split()[1])
    owner.sendall(ARMED)
    while (left := deadline - time.monotonic()) > 0:
        if select.select([owner], [], [], left)[0]:
            return owner.recv(64) != STAND_DOWN
    return True


def rescue(qemu: Qemu) -> None:
    """Let the guest run, and look until it surely does."""
    until = time.monotonic() + RESCUE_S
    steady = 0
    qemu.ask("migrate_cancel")
    while steady < STEADY and time.monotonic() < until:
        status = qemu.ask("query-status") or {}
        steady = steady + 1 if status.get("running") else 0
        if status.get("status") in _AT_REST:
            qemu.ask("migrate_cancel")
            qemu.ask("cont")
        else:
            time.sleep(LOOK_S)


def main() -> None:
    """Guard one pause."""
    qmp_fd, owner_fd = map(int, sys.argv[1:])
    with socket.socket(fileno=qmp_fd) as connection, socket.socket(fileno=owner_fd) as owner:
        qemu = Qemu(connection)
        with contextlib.suppress(OSError, ValueError):  # one of the two is gone, be it in mid-word
            qemu.greet()
            if watch(owner):
                rescue(qemu)


if __name__ == "__main__":
    main()

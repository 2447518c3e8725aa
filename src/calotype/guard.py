"""The guard: a small process that ends a pause whose owner died, hangs or was stopped.

It is started before the pause, with a QMP connection to the VM and a socket to the owner, and stays
out of the way: a session of its own, so that what ends the owner's terminal does not end it, and
nothing but the standard library, so that it starts in a moment.

    owner                                   guard
      <----------------------------- READY    it has greeted QEMU
      ARM {seconds, switch} -------------->   the deadline counts from here
      <----------------------------- ARMED    only now does the owner stop the guest
      ... the pause ...
      STAND DOWN ------------------------->   the guest runs, or need not
      <------------------------ STOOD DOWN    it has let go of QEMU; or, at any time before:
      <---------------------------- ACTING    it is about to let the guest run

If the owner hangs up before it says STAND DOWN, or the deadline passes, the guard says ACTING,
cancels the save, lets the guest run and watches that it does. It asks several times, because what
the owner had sent may still wait inside QEMU: a `stop` that is carried out after our `cont` must
not have the last word. To cancel first is right for every method: an ordinary migration that goes
on would stop the guest again when it completes. What the owner had begun otherwise is undone by
`recover`; the window's tables never accept a snapshot in whose pause somebody else let the guest
run.

In a *switch* (the guest goes over from an overlay to the image below, which holds the same by then)
letting it run is right only if QEMU writes to the image that the record names. The record changes
inside that pause, before QEMU switches; so if it names the one below, the guard first has QEMU
complete the job that switches.

The connection is one of the guard's own, or, where QEMU has a single monitor, the *owner's*: both
hold the same socket then, and the guard neither reads nor writes before it acts. Then it may find
the owner's half-said words on the wire, and the owner's answers, and an owner that still reads may
take an answer away. So it first makes QEMU's parser forget what was begun (a byte 0xFF:
docs/interop/qmp-spec.rst, "Forcing the JSON parser into known-good state"), knows its answers by
their ids, and asks again for one that does not come. In turn the owner can miss that the guest was
let run, so it accepts nothing before it has heard STOOD DOWN; see `calotype.qemu.guarding`.

Run as: python -m calotype.guard QMP-FD OWNER-FD [shared]
"""

import contextlib
import json
import os
import select
import socket
import sys
import time
from typing import Any

READY, ARMED, STAND_DOWN = b"READY\n", b"ARMED\n", b"STAND DOWN\n"
STOOD_DOWN, ACTING = b"STOOD DOWN\n", b"ACTING\n"
ARM = b"ARM "
SHARED = "shared"

RESCUE_S = 30.0
"""How long it is tried to let the guest run."""
STEADY = 8
"""How many looks in a row must find the guest running."""
LOOK_S = 0.02
LOST_S = 1.0
"""After how long an answer is held for lost that the owner may have read."""

FORGET = b"\xff\n"
_AT_REST = frozenset({"paused", "postmigrate", "finish-migrate", "prelaunch"})


class Qemu:
    """A QMP connection, blocking, each wait bounded by *patience_s*."""

    def __init__(self, connection: socket.socket, patience_s: float) -> None:
        connection.settimeout(RESCUE_S)
        self._connection = connection
        self._patience_s = patience_s
        self._asked = 0
        self._unread = b""

    def greet(self) -> None:
        """Read the greeting and leave the negotiation."""
        self._line(time.monotonic() + RESCUE_S)
        self.ask("qmp_capabilities")

    def take_over(self) -> None:
        """Go on with a connection that another may have left in mid-word."""
        self._connection.sendall(FORGET)

    def ask(self, command: str, **arguments: str) -> Any:
        """Send a command; its value, or None where QEMU refused it, or no answer came in time."""
        self._asked += 1
        name = f"guard-{self._asked}"
        words = {"execute": command, "arguments": arguments, "id": name}
        self._connection.sendall(json.dumps(words).encode() + b"\n")
        until = time.monotonic() + self._patience_s
        while line := self._line(until):
            message = _read(line)
            if message.get("id") == name:
                return message.get("return")
        return None

    def _line(self, until: float) -> bytes:
        """The next line; nothing where none came in time."""
        while b"\n" not in self._unread:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._connection], [], [], left)[0]:
                return b""
            with contextlib.suppress(BlockingIOError):  # the owner was quicker
                self._unread += self._heard()
        line, _, self._unread = self._unread.partition(b"\n")
        return line + b"\n"

    def _heard(self) -> bytes:
        heard = os.read(self._connection.fileno(), 1 << 16)  # `recv` would wait once more
        if not heard:
            raise ConnectionError("QEMU is gone")
        return heard


def _read(line: bytes) -> dict[str, Any]:
    """A message; one that is cut, for its beginning or end was read by the owner, holds nothing."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


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
        jobs = qemu.ask("query-jobs")
        if jobs is not None:
            states = {each["id"]: each["status"] for each in jobs}
            if states.get(job, "concluded") == "concluded":
                return
        time.sleep(LOOK_S)


def main() -> None:
    """Guard one pause."""
    qmp_fd, owner_fd, *how = sys.argv[1:]
    is_shared = SHARED in how
    owner = socket.socket(fileno=int(owner_fd))
    with (
        owner,
        contextlib.suppress(OSError, ValueError),
    ):  # one of the two is gone, even in mid-word
        with socket.socket(fileno=int(qmp_fd)) as connection:
            qemu = Qemu(connection, LOST_S if is_shared else RESCUE_S)
            if not is_shared:
                qemu.greet()
            orders = watch(owner)
            if orders is not None:
                act(qemu, owner, orders, is_shared=is_shared)
                return
        owner.sendall(STOOD_DOWN)


def act(qemu: Qemu, owner: socket.socket, orders: Orders, *, is_shared: bool) -> None:
    """Tell the owner, if there still is one, and let the guest run."""
    with contextlib.suppress(OSError):
        owner.sendall(ACTING)
    if is_shared:
        qemu.take_over()
    rescue(qemu, orders)


if __name__ == "__main__":
    main()

"""The guard: a small process that ends a pause whose owner died, hangs or was stopped.

It is started before the pause, with a QMP connection of its own to the VM and a socket to the
owner, and stays out of the way: a session of its own, so that what ends the owner's terminal does
not end it, and nothing but the standard library, so that it starts in a moment.

    owner                                   guard
      <----------------------------- READY    it has greeted QEMU
      ARM {seconds, switch, handover} ---->   the deadline counts from here
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

In a *handover* (another QEMU takes the VM's place) it is the record again that says whose guest is
to run. If it names the images of the new one, the guard lets that run; else it ends it, hands back
what had been handed over (acts of `model.acts`, as JSON), and lets the old one run.

Run as: python -m calotype.guard QMP-FD OWNER-FD [NEW-QMP-FD NEW-PID-FD]
"""

import contextlib
import json
import os
import select
import signal
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

    def ask(self, command: str, **arguments: Any) -> Any:
        """Send a command; its value, or None where QEMU refused it."""
        words = {"execute": command, "arguments": arguments}
        self._connection.sendall(json.dumps(words).encode() + b"\n")
        while line := self._lines.readline():
            message = json.loads(line)
            if "return" in message or "error" in message:
                return message.get("return")
        raise ConnectionError("QEMU is gone")


class Orders:
    """What the owner wants: the deadline, and which switch of images the pause is for, if any."""

    def __init__(self, words: bytes) -> None:
        told = json.loads(words.removeprefix(ARM))
        self.seconds = float(told["seconds"])
        self.switch: dict[str, str] | None = told["switch"]
        self.handover: dict[str, Any] | None = told["handover"]


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


def rescue(qemu: Qemu, switch: dict[str, str] | None = None) -> None:
    """Let the guest run, and look until it surely does."""
    until = time.monotonic() + RESCUE_S
    steady = 0
    qemu.ask("migrate_cancel")
    if switch is not None and is_recorded(switch):
        complete(qemu, switch["job"], until)
    while steady < STEADY and time.monotonic() < until:
        status = qemu.ask("query-status") or {}
        steady = steady + 1 if status.get("running") else 0
        if status.get("status") in _AT_REST:
            qemu.ask("migrate_cancel")
            qemu.ask("cont")
        else:
            time.sleep(LOOK_S)


def take_side(old: Qemu, new: Qemu, new_pid_fd: int, handover: dict[str, Any]) -> None:
    """Let the guest of the one QEMU run whose images the record names."""
    if is_recorded(handover):
        if handover["let_run"]:
            rescue(new)
        return
    signal.pidfd_send_signal(new_pid_fd, signal.SIGKILL)
    select.select([new_pid_fd], [], [], RESCUE_S)  # until it is gone it has its ports
    for act in handover["back"]:
        with contextlib.suppress(OSError):  # it had not been handed over
            hand_back(old, act)
    rescue(old)


def hand_back(old: Qemu, act: dict[str, Any]) -> None:
    """Carry out one act of those that hand the host's things back."""
    if act["type"] == "Tell":
        old.ask(act["command"], **act["arguments"])
    elif act["type"] == "Move":
        os.rename(act["source"], act["target"])  # noqa: PTH104 - pathlib takes time to import
        os.unlink(act["source"])  # noqa: PTH108 - two names of one file are both left, rename(2)
    elif act["type"] == "Drop":
        os.unlink(act["path"])  # noqa: PTH108
    elif act["type"] == "WritePid":
        with open(act["path"], "w") as file:  # noqa: PTH123
            file.write(f"{act['pid']}\n")


def is_recorded(change: dict[str, Any]) -> bool:
    """Whether the record names the image that the guest is to go over to as the newest."""
    try:
        with open(change["record"], "rb") as file:  # noqa: PTH123 - pathlib takes time to import
            disks = json.load(file)["disks"]
        return any(disk["active"]["path"] == change["newest"] for disk in disks)
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
    """Guard one pause."""
    qmp_fd, owner_fd, *new_fds = map(int, sys.argv[1:])
    with socket.socket(fileno=qmp_fd) as connection, socket.socket(fileno=owner_fd) as owner:
        qemu = Qemu(connection)
        with contextlib.suppress(OSError, ValueError):  # one of them is gone, be it in mid-word
            qemu.greet()
            if new_fds:
                new = Qemu(socket.socket(fileno=new_fds[0]))
                new.greet()
            orders = watch(owner)
            if orders is not None and orders.handover is not None:
                take_side(qemu, new, new_fds[1], orders.handover)
            elif orders is not None:
                rescue(qemu, orders.switch)


if __name__ == "__main__":
    main()

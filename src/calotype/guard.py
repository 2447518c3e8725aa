"""The guard: a small process that ends a pause or a freeze whose owner died, hangs or was stopped.

It is started before the pause, with a QMP connection to the VM and a socket to the owner, and stays
out of the way: a session of its own, so that what ends the owner's terminal does not end it, and
nothing but the standard library, so that it starts in a moment.

    owner                                   guard
      <----------------------------- READY    it has greeted QEMU
      ARM {seconds, what} ---------------->   the deadline counts from here
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

In a *handover* (another QEMU takes the VM's place) it is the record again that says whose guest is
to run. If it names the images of the new one, the guard lets that run; else it ends it, hands back
what had been handed over (acts of `model.acts`, as JSON), and lets the old one run.

To end a live save of QEMU before 8.1 takes one thing more. A save that is cancelled or fails leaves
the guest's memory write-protected there (mended in 8.1 by "migration: stop tracking ram writes when
cancelling background migration"): the next write to a page that was not saved yet stands still for
ever, the guest with it, and soon the monitor. The userfaultfd that the protection hangs on is left
open in QEMU, so it can be borrowed from outside and the protection be taken off. A save that is
still under way fails by that, because QEMU cannot un-protect what is not protected; so none whose
pages changed too early is ever complete.

A *freeze* of the guest's file systems is guarded the same way, but what ends it is the agent in the
guest. The guard has the owner's own connection to it, not another one: the agent serves one client,
also one that was stopped, and what the owner had sent comes before what the guard sends. An agent
that hangs is asked for minutes, and so is one that died and may be started again: it comes back in
the frozen state (qga/main.c, ga_set_frozen, which leaves a file).

The connection is one of the guard's own, or, where QEMU has a single monitor, the *owner's*: both
hold the same socket then, and the guard neither reads nor writes before it acts. Then it may find
the owner's half-said words on the wire, and the owner's answers, and an owner that still reads may
take an answer away. So it first makes QEMU's parser forget what was begun (a byte 0xFF:
docs/interop/qmp-spec.rst, "Forcing the JSON parser into known-good state"), knows its answers by
their ids, and asks again for one that does not come. In turn the owner can miss that the guest was
let run, so it accepts nothing before it has heard STOOD DOWN; see `calotype.qemu.guarding`.

Run as: python -m calotype.guard QMP-FD OWNER-FD [shared | NEW-QMP-FD NEW-PID-FD]
or as:  python -m calotype.guard AGENT-FD OWNER-FD thaw
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

READY, ARMED, STAND_DOWN = b"READY\n", b"ARMED\n", b"STAND DOWN\n"
STOOD_DOWN, ACTING = b"STOOD DOWN\n", b"ACTING\n"
ARM = b"ARM "
SHARED, THAW = "shared", "thaw"

RESCUE_S = 120.0
"""How long it is tried to let the guest run, and how long QEMU may be silent: twice as long as its
owner waits for an answer (`qemu/monitor.py`, `REPLY_TIMEOUT_S`)."""
STEADY = 8
"""How many looks in a row must find the guest running."""
LOOK_S = 0.02
LOST_S = 1.0
"""After how long an answer is held for lost that the owner may have read."""

THAW_S = 600.0
"""How long it is tried to thaw the guest's file systems."""
AGAIN_S = 2.0
"""How long the agent may be silent before it is asked again."""
HEARD_BYTES = 1 << 16
"""How much of what the agent says is kept."""

FORGET = b"\xff\n"
AT_REST = frozenset({"paused", "postmigrate", "finish-migrate", "prelaunch"})
"""The run states in which a guest stands still and `cont` lets it run."""

_PIDFD_GETFD = 438
"""The system call's number, on every architecture that has one."""
_UFFDIO_UNREGISTER, _UFFDIO_WAKE = 0x8010AA01, 0x8010AA02
"""Source: linux/userfaultfd.h, _IOR(0xAA, 1 and 2, struct uffdio_range)."""


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

    def ask(self, command: str, **arguments: Any) -> Any:
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


class Successor:
    """The QEMU that is to take the other's place in a handover; it is greeted at once."""

    def __init__(self, qmp_fd: int, pid_fd: int) -> None:
        self.qemu = Qemu(socket.socket(fileno=qmp_fd), RESCUE_S)
        self._pid_fd = pid_fd
        self.qemu.greet()

    def end(self) -> None:
        """End its process and wait: until it is gone it has its ports."""
        signal.pidfd_send_signal(self._pid_fd, signal.SIGKILL)
        select.select([self._pid_fd], [], [], RESCUE_S)


class Agent:
    """The owner's connection to the agent in the guest, each wait bounded."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(AGAIN_S)
        self._connection = connection

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
    """What the owner wants, and when.

    The deadline; which switch of images or which handover the pause is for, if any; the process
    whose memory a save that is ended leaves protected, if one does.
    """

    def __init__(self, words: bytes) -> None:
        told = json.loads(words.removeprefix(ARM))
        self.seconds = float(told["seconds"])
        self.switch: dict[str, str] | None = told["switch"]
        self.handover: dict[str, Any] | None = told["handover"]
        self.forgetful: int | None = told["forgetful"]


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


def rescue(qemu: Qemu, switch: dict[str, str] | None = None, forgetful: int | None = None) -> None:
    """Let the guest run, and look until it surely does."""
    until = time.monotonic() + RESCUE_S
    steady = 0
    mend(forgetful)
    qemu.ask("migrate_cancel")
    if switch is not None and is_recorded(switch):
        complete(qemu, switch["job"], until)
    while steady < STEADY and time.monotonic() < until:
        mend(forgetful)
        status = qemu.ask("query-status") or {}
        steady = steady + 1 if status.get("running") else 0
        if status.get("status") in AT_REST:
            qemu.ask("migrate_cancel")
            qemu.ask("cont")
        else:
            time.sleep(LOOK_S)


def take_side(old: Qemu, new: Successor, handover: dict[str, Any]) -> None:
    """Let the guest of the one QEMU run whose images the record names."""
    if is_recorded(handover):
        if handover["let_run"]:
            rescue(new.qemu)
        return
    new.end()
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


def mend(forgetful: int | None) -> None:
    """Take the protection off that an ended save has left; without the right to, it stays."""
    if forgetful is not None:
        with contextlib.suppress(OSError):
            unprotect(forgetful)


def unprotect(pid: int) -> None:
    """Take all write protection off a process's memory, and wake who waits for it.

    Raises:
        OSError: We may not look into that process, or it is gone.
    """
    ranges = [struct.pack("QQ", start, end - start) for start, end in protected(pid)]
    for descriptor in userfaultfds(pid):
        borrowed = borrow(pid, descriptor)
        try:
            for each in ranges:
                with contextlib.suppress(OSError):  # it is another userfaultfd's
                    fcntl.ioctl(borrowed, _UFFDIO_UNREGISTER, each)
                    fcntl.ioctl(borrowed, _UFFDIO_WAKE, each)
        finally:
            os.close(borrowed)


def protected(pid: int) -> Iterator[tuple[int, int]]:
    """Start and end of each mapping that is watched for writes (proc(5), smaps, `uw`)."""
    start, end = 0, 0
    with open(f"/proc/{pid}/smaps", encoding="ascii", errors="replace") as lines:  # noqa: PTH123
        for line in lines:
            first, *others = line.split()
            if first == "VmFlags:" and "uw" in others:
                yield start, end
            elif "-" in first and not first.endswith(":"):
                start, end = (int(bound, 16) for bound in first.split("-"))


def userfaultfds(pid: int) -> list[int]:
    """The userfaultfds that a process has open."""
    folder = f"/proc/{pid}/fd"
    found = []
    for name in os.listdir(folder):  # noqa: PTH208 - as above
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(f"{folder}/{name}") == "anon_inode:[userfaultfd]":  # noqa: PTH115
                found.append(int(name))
    return found


def borrow(pid: int, descriptor: int) -> int:
    """Have a process's open file as one of ours (pidfd_getfd(2)).

    Raises:
        OSError: It takes the right to trace that process, and we do not have it.
    """
    import ctypes  # noqa: PLC0415 - it takes time to import, and is hardly ever needed

    process = os.pidfd_open(pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        borrowed = int(libc.syscall(_PIDFD_GETFD, process, descriptor, 0))
        if borrowed < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(process)
    return borrowed


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
        jobs = qemu.ask("query-jobs")
        if jobs is not None:
            states = {each["id"]: each["status"] for each in jobs}
            if states.get(job, "concluded") == "concluded":
                return
        time.sleep(LOOK_S)


def main() -> None:
    """Guard one pause, or one freeze."""
    words = sys.argv[1:]
    line_fd, owner_fd, *new_fds = (int(word) for word in words if word.isdigit())
    with (
        socket.socket(fileno=owner_fd) as owner,
        contextlib.suppress(OSError, ValueError),  # one of them is gone, be it in mid-word
    ):
        with socket.socket(fileno=line_fd) as connection:
            if THAW in words:
                acted = guard_freeze(Agent(connection), owner)
            else:
                acted = guard_pause(connection, owner, new_fds, is_shared=SHARED in words)
        if not acted:
            owner.sendall(STOOD_DOWN)


def guard_freeze(agent: Agent, owner: socket.socket) -> bool:
    """Thaw if the owner does not; whether it did not."""
    if watch(owner) is None:
        return False
    agent.thaw()
    return True


def guard_pause(
    connection: socket.socket, owner: socket.socket, new_fds: Sequence[int], *, is_shared: bool
) -> bool:
    """Let the right guest run if the owner does not; whether it did not."""
    qemu = Qemu(connection, LOST_S if is_shared else RESCUE_S)
    if not is_shared:
        qemu.greet()
    new = Successor(*new_fds) if new_fds else None
    orders = watch(owner)
    if orders is None:
        return False
    with contextlib.suppress(OSError):  # there may be nobody left to tell
        owner.sendall(ACTING)
    if is_shared:
        qemu.take_over()
    if new is not None and orders.handover is not None:
        take_side(qemu, new, orders.handover)
    else:
        rescue(qemu, orders.switch, orders.forgetful)
    return True


if __name__ == "__main__":
    main()

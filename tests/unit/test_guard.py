"""The guard, as the real process, between a QEMU that is played here and an owner that is too."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from calotype import guard
from calotype.formats.guest_agent import request
from calotype.guard import ARMED, READY, STAND_DOWN, STEADY
from calotype.qemu.monitor import open_socket
from fake_agent import FakeAgent

pytestmark = pytest.mark.timeout(60)

GREETING = {"QMP": {"version": {}, "capabilities": ["oob"]}}
EVENT = {"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}
PATIENCE_S = 20.0
NEGOTIATED = ["qmp_capabilities"]


class Qemu:
    """A monitor with a guest behind it, which stands still.

    Args:
        status: The run state at first.
        late_stops: After how many looks in all a `stop` that was sent earlier takes effect.
        refused: How many times `cont` is refused.
    """

    def __init__(
        self, *, status: str = "paused", late_stops: Sequence[int] = (), refused: int = 0
    ) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(PATIENCE_S)
        self.status = status
        self.late_stops = late_stops
        self.refused = refused
        self.greeting: dict[str, Any] | None = GREETING
        self.jobs: list[str] = []
        """The status of the only job, look by look; then it is gone."""
        self.asked: list[str] = []
        self.statuses: list[str] = []
        self.dies_at = ""
        self.lost: list[str] = []
        """Commands whose next answer never comes: the owner has read it."""
        self.noise = b""
        """What the owner has left on the wire, half-read."""
        self.said_forget = False
        self.last_words = b""
        self._serving = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> None:
        self._serving.start()

    def end(self) -> None:
        """Wait until the guard has hung up."""
        self._serving.join(PATIENCE_S)
        assert not self._serving.is_alive()

    def _serve(self) -> None:
        with self.ours, suppress(OSError):
            if self.greeting is not None:
                self._say(self.greeting)
            self.ours.sendall(self.noise)
            for line in self.ours.makefile("rb"):
                if line == guard.FORGET:
                    self.said_forget = True
                    self._say({"error": {"class": "GenericError", "desc": "JSON parse error"}})
                    continue
                asked = json.loads(line)
                command = asked["execute"]
                self.asked.append(command)
                if command == self.dies_at:
                    self.ours.sendall(self.last_words)
                    return
                self._say(EVENT)
                if self.lost and self.lost[0] == command:
                    del self.lost[0]
                    self._answer(command)
                    continue
                self._say({**self._answer(command), "id": asked["id"]})

    def _say(self, message: Any) -> None:
        self.ours.sendall(json.dumps(message).encode() + b"\r\n")

    def _answer(self, command: str) -> dict[str, Any]:
        if command == "cont" and self.refused:
            self.refused -= 1
            return {"error": {"class": "GenericError", "desc": "not now"}}
        if command == "cont":
            self.status = "running"
        if command == "query-status":
            if len(self.statuses) in self.late_stops:
                self.status = "paused"
            self.statuses.append(self.status)
            return {"return": {"status": self.status, "running": self.status == "running"}}
        if command == "query-jobs":
            found = [{"id": "merge", "status": self.jobs.pop(0)}] if self.jobs else []
            return {"return": found}
        return {"return": {}}


class New(Qemu):
    """A QEMU that is to take the place of the other; a process stands for it."""

    def __init__(self) -> None:
        super().__init__()
        self.process = subprocess.Popen(["sleep", "60"])
        self.pid = self.process.pid


class Owner:
    """The one who takes the snapshot, and the guard that it has posted."""

    def __init__(self, qemu: Qemu, *how: str, new: "New | None" = None) -> None:
        self.line, theirs = socket.socketpair()
        self.line.settimeout(PATIENCE_S)
        descriptors = [qemu.theirs.fileno(), theirs.fileno()]
        if new is not None:
            descriptors += [new.theirs.fileno(), os.pidfd_open(new.pid)]
        self.guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, *map(str, descriptors), *how],
            pass_fds=descriptors,
            stderr=subprocess.PIPE,
        )
        theirs.close()
        qemu.theirs.close()
        if new is not None:
            new.theirs.close()
            os.close(descriptors[-1])

    def arm(
        self,
        limit_s: float = PATIENCE_S,
        switch: dict[str, str] | None = None,
        handover: dict[str, Any] | None = None,
        forgetful: int | None = None,
    ) -> None:
        assert self.line.recv(64) == READY
        orders = {
            "seconds": limit_s, "switch": switch, "handover": handover, "forgetful": forgetful,
        }  # fmt: skip
        self.line.sendall(guard.ARM + json.dumps(orders).encode() + b"\n")
        assert self.line.recv(len(ARMED)) == ARMED

    def hang_up(self) -> None:
        self.line.close()


Posted = Callable[..., Owner]


@pytest.fixture
def posted() -> Iterator[Posted]:
    """Post a guard before a QEMU; both are ended in the end."""
    owners = []

    def post(qemu: Qemu, *how: str, new: New | None = None) -> Owner:
        owner = Owner(qemu, *how, new=new)
        owners.append(owner)
        qemu.start()
        if new is not None:
            new.start()
        return owner

    yield post
    for owner in owners:
        owner.hang_up()
        owner.guard.kill()
        owner.guard.communicate(timeout=PATIENCE_S)


def assert_quiet_end(owner: Owner, qemu: Qemu) -> None:
    """The guard has ended, and had nothing to complain of."""
    assert owner.guard.stderr
    assert owner.guard.wait(PATIENCE_S) == 0, owner.guard.stderr.read()
    assert owner.guard.stderr.read() == b""
    qemu.end()


def assert_rescued(qemu: Qemu) -> None:
    """The save was cancelled first, and the guest was seen to run several times in a row."""
    assert qemu.asked[: len(NEGOTIATED) + 1] == [*NEGOTIATED, "migrate_cancel"]
    assert qemu.statuses[-STEADY:] == ["running"] * STEADY
    assert qemu.status == "running"


# --- it stays out of the way ---------------------------------------------------------------------


def test_an_owner_that_is_gone_before_the_pause_leaves_nothing_to_do(posted: Posted) -> None:
    qemu = Qemu(status="running")
    owner = posted(qemu)
    assert owner.line.recv(64) == READY
    owner.hang_up()
    assert_quiet_end(owner, qemu)
    assert qemu.asked == NEGOTIATED


def test_who_says_anything_else_arms_nothing(posted: Posted) -> None:
    qemu = Qemu(status="running")
    owner = posted(qemu)
    owner.line.sendall(b"HELLO\n")
    assert_quiet_end(owner, qemu)
    assert qemu.asked == NEGOTIATED


def test_who_is_told_to_stand_down_does(posted: Posted) -> None:
    qemu = Qemu()
    owner = posted(qemu)
    owner.arm()
    owner.line.sendall(STAND_DOWN)
    assert_quiet_end(owner, qemu)
    assert qemu.asked == NEGOTIATED


def test_an_owner_that_hangs_up_after_it_stood_the_guard_down_is_no_alarm(posted: Posted) -> None:
    qemu = Qemu()
    owner = posted(qemu)
    owner.arm()
    owner.line.sendall(STAND_DOWN)
    owner.hang_up()
    assert_quiet_end(owner, qemu)
    assert qemu.asked == NEGOTIATED


def test_a_guard_that_is_armed_asks_nothing_before_its_time(posted: Posted) -> None:
    qemu = Qemu()
    owner = posted(qemu)
    owner.arm()
    time.sleep(0.1)
    assert qemu.asked == NEGOTIATED
    assert owner.guard.poll() is None


# --- it acts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["paused", "postmigrate", "finish-migrate", "prelaunch"])
def test_the_guest_of_an_owner_that_is_gone_is_let_run(posted: Posted, status: str) -> None:
    qemu = Qemu(status=status)
    owner = posted(qemu)
    owner.arm()
    owner.hang_up()
    assert_quiet_end(owner, qemu)
    assert_rescued(qemu)
    assert qemu.asked.count("cont") == 1


def test_an_owner_that_is_killed_is_gone(posted: Posted) -> None:
    qemu = Qemu()
    owner = posted(qemu)
    child = subprocess.Popen(["sleep", "60"], pass_fds=[owner.line.fileno()])
    owner.arm()
    owner.hang_up()
    time.sleep(0.1)
    assert qemu.asked == NEGOTIATED, "somebody still holds the line"
    child.kill()
    child.wait(PATIENCE_S)
    assert_quiet_end(owner, qemu)
    assert_rescued(qemu)


def test_a_deadline_that_passes_ends_the_pause_of_an_owner_that_hangs(posted: Posted) -> None:
    qemu = Qemu()
    owner = posted(qemu)
    owner.arm(0.05)
    assert_quiet_end(owner, qemu)
    assert_rescued(qemu)


def test_a_word_that_is_no_order_to_stand_down_is_an_alarm(posted: Posted) -> None:
    qemu = Qemu()
    owner = posted(qemu)
    owner.arm()
    owner.line.sendall(b"STAND\n")
    assert_quiet_end(owner, qemu)
    assert_rescued(qemu)


def test_a_guest_that_runs_is_watched_and_not_touched_but_for_its_save(posted: Posted) -> None:
    qemu = Qemu(status="running")
    owner = posted(qemu)
    owner.arm(0.05)
    assert_quiet_end(owner, qemu)
    assert qemu.asked == [*NEGOTIATED, "migrate_cancel", *["query-status"] * STEADY]


@pytest.mark.parametrize("late_stops", [(1,), (2,), (STEADY,), (1, 2, 3), (2, 4 + STEADY)])
def test_a_stop_that_takes_effect_late_does_not_have_the_last_word(
    posted: Posted, late_stops: Sequence[int]
) -> None:
    qemu = Qemu(late_stops=late_stops)
    owner = posted(qemu)
    owner.arm()
    owner.hang_up()
    assert_quiet_end(owner, qemu)
    assert_rescued(qemu)
    assert qemu.asked.count("cont") == 1 + len([at for at in late_stops if at < len(qemu.statuses)])


def test_a_save_is_cancelled_before_each_time_that_the_guest_is_let_run(posted: Posted) -> None:
    qemu = Qemu(late_stops=(2, 4))
    owner = posted(qemu)
    owner.arm(0.05)
    assert_quiet_end(owner, qemu)
    before = [qemu.asked[at - 1] for at, command in enumerate(qemu.asked) if command == "cont"]
    assert before == ["migrate_cancel"] * 3


def test_it_asks_again_where_qemu_refuses(posted: Posted) -> None:
    qemu = Qemu(refused=3)
    owner = posted(qemu)
    owner.arm(0.05)
    assert_quiet_end(owner, qemu)
    assert_rescued(qemu)
    assert qemu.asked.count("cont") == 4


def test_a_guest_that_does_not_stand_still_for_our_sake_is_left_alone(posted: Posted) -> None:
    qemu = Qemu(status="io-error")
    owner = posted(qemu)
    owner.arm(0.01)
    time.sleep(0.4)
    looks = len(qemu.statuses)
    qemu.ours.shutdown(socket.SHUT_RDWR)
    assert_quiet_end(owner, qemu)
    assert "cont" not in qemu.asked
    assert 0 < looks < 100, "it did nothing but ask"


# --- a switch -----------------------------------------------------------------------------------


def record(folder: Path, newest: str) -> dict[str, str]:
    """The switch from `top` to `base`, where the record names *newest* by now."""
    path = folder / "record.json"
    path.write_text(json.dumps({"disks": [{"active": {"path": newest}}]}))
    return {"record": str(path), "newest": "base", "job": "merge"}


def test_a_switch_that_is_recorded_is_completed_before_the_guest_runs(
    posted: Posted, tmp_path: Path
) -> None:
    qemu = Qemu()
    qemu.jobs = ["ready", "waiting", "concluded"]
    owner = posted(qemu)
    owner.arm(switch=record(tmp_path, "base"))
    owner.hang_up()
    assert_quiet_end(owner, qemu)
    completed = ["job-complete", *["query-jobs"] * 3]
    assert qemu.asked[1:7] == ["migrate_cancel", *completed, "query-status"]
    assert_rescued(qemu)


def test_a_switch_that_qemu_has_made_by_itself_is_no_reason_to_wait(
    posted: Posted, tmp_path: Path
) -> None:
    qemu = Qemu()
    owner = posted(qemu)
    owner.arm(switch=record(tmp_path, "base"))
    owner.hang_up()
    assert_quiet_end(owner, qemu)
    assert qemu.asked.count("query-jobs") == 1
    assert_rescued(qemu)


@pytest.mark.parametrize("words", ["", "{", "[]", "{}"])
def test_a_switch_that_is_not_recorded_is_not_made(
    posted: Posted, tmp_path: Path, words: str
) -> None:
    qemu = Qemu()
    qemu.jobs = ["ready"]
    owner = posted(qemu)
    switch = record(tmp_path, "top")
    if words:
        Path(switch["record"]).write_text(words)
    owner.arm(switch=switch)
    owner.hang_up()
    assert_quiet_end(owner, qemu)
    assert "job-complete" not in qemu.asked
    assert_rescued(qemu)


# --- a handover ---------------------------------------------------------------------------------


@pytest.fixture
def new() -> Iterator[New]:
    made = New()
    yield made
    made.process.kill()
    made.process.wait(PATIENCE_S)
    made.ours.close()
    made.theirs.close()


def handover(folder: Path, newest: str) -> dict[str, Any]:
    """The handover to images of which `base` is one, where the record names *newest* by now."""
    (folder / "sock").write_text("new")
    (folder / "sock.prev").write_text("old")
    (folder / "sock.next").write_text("dead")
    back = [
        {"type": "Move", "source": str(folder / "gone.prev"), "target": str(folder / "gone")},
        {"type": "Tell", "command": "hostfwd_add", "arguments": {"a-b": 1}},
        {"type": "WritePid", "path": str(folder / "pid"), "pid": 77},
        {"type": "Move", "source": str(folder / "sock.prev"), "target": str(folder / "sock")},
        {"type": "Drop", "path": str(folder / "sock.next")},
    ]
    return {**record(folder, newest), "let_run": True, "back": back}


def test_a_handover_that_is_not_recorded_is_handed_back(
    posted: Posted, new: New, tmp_path: Path
) -> None:
    qemu = Qemu()
    owner = posted(qemu, new=new)
    owner.arm(handover=handover(tmp_path, "top"))
    owner.hang_up()
    assert_quiet_end(owner, qemu)
    assert new.process.wait(PATIENCE_S) == -signal.SIGKILL
    assert "cont" not in new.asked
    assert qemu.asked[1:3] == ["hostfwd_add", "migrate_cancel"]
    assert qemu.statuses[-STEADY:] == ["running"] * STEADY
    assert (tmp_path / "pid").read_text() == "77\n"
    assert (tmp_path / "sock").read_text() == "old"
    assert not (tmp_path / "sock.prev").exists()
    assert not (tmp_path / "sock.next").exists()


@pytest.mark.parametrize("let_run", [True, False])
def test_a_handover_that_is_recorded_is_the_new_ones_to_run(
    posted: Posted, new: New, tmp_path: Path, let_run: bool
) -> None:
    qemu = Qemu()
    owner = posted(qemu, new=new)
    owner.arm(handover=handover(tmp_path, "base") | {"let_run": let_run})
    owner.hang_up()
    assert_quiet_end(owner, qemu)
    assert new.process.poll() is None
    assert qemu.asked == NEGOTIATED
    assert new.status == ("running" if let_run else "paused")
    assert (tmp_path / "sock").read_text() == "new"


# --- QEMU is gone --------------------------------------------------------------------------------


def test_a_qemu_that_is_gone_before_it_greets_is_not_guarded(posted: Posted) -> None:
    qemu = Qemu()
    qemu.ours.close()
    owner = posted(qemu)
    assert_quiet_end(owner, qemu)
    assert owner.line.recv(64) == b""


@pytest.mark.parametrize("command", ["migrate_cancel", "query-status", "cont"])
def test_a_qemu_that_dies_under_its_hands_is_its_end(posted: Posted, command: str) -> None:
    qemu = Qemu()
    qemu.dies_at = command
    owner = posted(qemu)
    owner.arm(0.01)
    assert_quiet_end(owner, qemu)
    assert qemu.asked[-1] == command


def test_a_qemu_that_dies_in_the_middle_of_a_word_is_its_end(posted: Posted) -> None:
    qemu = Qemu()
    qemu.dies_at, qemu.last_words = "query-status", b'{"return": {"sta'
    owner = posted(qemu)
    owner.arm(0.01)
    assert_quiet_end(owner, qemu)


# --- what a QEMU has left protected --------------------------------------------------------------

PROTECTED = """
import ctypes, fcntl, mmap, os, struct, sys

MIB = 1 << 20
memory = mmap.mmap(-1, MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
ctypes.memset(start, 1, MIB)
libc = ctypes.CDLL(None, use_errno=True)
watched = libc.syscall(323, os.O_CLOEXEC)
if watched < 0:
    sys.exit("userfaultfd: " + os.strerror(ctypes.get_errno()))
fcntl.ioctl(watched, 0xC018AA3F, bytearray(struct.pack("QQQ", 0xAA, 1, 0)))
fcntl.ioctl(watched, 0xC020AA00, bytearray(struct.pack("QQQQ", start, MIB, 2, 0)))
fcntl.ioctl(watched, 0xC018AA06, bytearray(struct.pack("QQQ", start, MIB, 1)))
print("protected", flush=True)
ctypes.memset(start + 8192, 2, 1)
print("written", flush=True)
"""
"""A process that write-protects its own memory, as QEMU does, and then writes to it."""


@pytest.fixture
def stuck() -> Iterator["subprocess.Popen[str]"]:
    """A process that waits for leave to write, and gets none."""
    words = [sys.executable, "-c", PROTECTED]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "protected\n"
        yield process
        process.kill()


def says_nothing(process: "subprocess.Popen[str]", wait_s: float) -> bool:
    assert process.stdout
    return not select.select([process.stdout], [], [], wait_s)[0]


def test_protection_is_taken_off_and_who_waits_goes_on(stuck: "subprocess.Popen[str]") -> None:
    assert says_nothing(stuck, 0.2)
    assert len(list(guard.protected(stuck.pid))) == 1
    guard.unprotect(stuck.pid)
    assert stuck.communicate(timeout=PATIENCE_S)[0] == "written\n"
    assert stuck.returncode == 0


def test_memory_without_protection_is_left_alone() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        guard.unprotect(process.pid)
        assert list(guard.protected(process.pid)) == []
        process.kill()


def test_a_process_that_is_gone_cannot_be_looked_into() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait(PATIENCE_S)
    with pytest.raises(OSError, match=r"No such (file|process)"):
        guard.unprotect(process.pid)


def test_the_guard_takes_protection_off_before_it_asks_anything(
    posted: Posted, stuck: "subprocess.Popen[str]"
) -> None:
    qemu = Qemu()
    qemu.dies_at = "migrate_cancel"
    owner = posted(qemu)
    owner.arm(0.05, forgetful=stuck.pid)
    assert_quiet_end(owner, qemu)
    assert stuck.communicate(timeout=PATIENCE_S)[0] == "written\n"


def test_the_guard_does_its_work_where_it_may_not_look_into_qemu(posted: Posted) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait(PATIENCE_S)
    qemu = Qemu()
    owner = posted(qemu)
    owner.arm(0.05, forgetful=gone.pid)
    assert_quiet_end(owner, qemu)
    assert_rescued(qemu)


# --- a freeze ------------------------------------------------------------------------------------


class Freezer:
    """The one who has frozen the guest's file systems, and the guard that shares its connection."""

    def __init__(self, agent: FakeAgent, path: Path) -> None:
        self.agent = agent
        self.connection = open_socket(path)
        self.connection.settimeout(PATIENCE_S)
        self.line, theirs = socket.socketpair()
        self.line.settimeout(PATIENCE_S)
        descriptors = (self.connection.fileno(), theirs.fileno())
        self.guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, *map(str, descriptors), guard.THAW],
            pass_fds=descriptors,
            stderr=subprocess.PIPE,
        )
        theirs.close()

    def freeze(self) -> None:
        self.connection.sendall(request("guest-fsfreeze-freeze"))
        assert self.connection.recv(64) == b'{"return": 2}\n'

    def arm(self, limit_s: float = PATIENCE_S) -> None:
        assert self.line.recv(64) == READY
        orders = {"seconds": limit_s, "switch": None, "handover": None, "forgetful": None}
        self.line.sendall(guard.ARM + json.dumps(orders).encode() + b"\n")
        assert self.line.recv(64) == ARMED

    def assert_quiet_end(self) -> None:
        assert self.guard.stderr
        assert self.guard.wait(PATIENCE_S) == 0, self.guard.stderr.read()
        assert self.guard.stderr.read() == b""


@pytest.fixture
def freezer(tmp_path: Path) -> Iterator[Freezer]:
    agent = FakeAgent(tmp_path / "agent.sock")
    freezer = Freezer(agent, tmp_path / "agent.sock")
    yield freezer
    freezer.line.close()
    freezer.connection.close()
    freezer.guard.kill()
    freezer.guard.communicate(timeout=PATIENCE_S)
    agent.end()


def test_what_is_frozen_is_thawed_if_the_owner_hangs_up(freezer: Freezer) -> None:
    freezer.arm()
    freezer.freeze()
    freezer.line.close()
    freezer.assert_quiet_end()
    assert not freezer.agent.frozen


def test_what_is_frozen_is_thawed_if_the_owner_hangs(freezer: Freezer) -> None:
    freezer.arm(0.2)
    freezer.freeze()
    freezer.assert_quiet_end()
    assert not freezer.agent.frozen


def test_a_freeze_that_is_carried_out_late_is_thawed_all_the_same(freezer: Freezer) -> None:
    def freeze_slowly(_: socket.socket) -> bytes:
        time.sleep(0.5)
        freezer.agent.frozen = 2
        return b'{"return": 2}\n'

    freezer.agent.instead["guest-fsfreeze-freeze"] = freeze_slowly
    freezer.arm(0.1)
    freezer.connection.sendall(request("guest-fsfreeze-freeze"))
    freezer.assert_quiet_end()
    assert not freezer.agent.frozen


def test_an_agent_that_does_not_answer_is_asked_again(freezer: Freezer) -> None:
    freezer.arm()
    freezer.freeze()
    freezer.agent.instead["guest-fsfreeze-thaw"] = lambda _: freezer.agent.instead.clear()
    freezer.line.close()
    freezer.assert_quiet_end()
    assert freezer.agent.asked.count("guest-fsfreeze-thaw") == 2
    assert not freezer.agent.frozen


def test_noise_of_the_agent_does_not_end_the_guard(freezer: Freezer) -> None:
    freezer.arm()
    freezer.freeze()

    def noise(_: socket.socket) -> bytes:
        freezer.agent.instead.clear()
        return b"[" * 100_000 + b'\n"thawed"\n\xff{"return": 1}\n{"return": "thawed"}\n'

    freezer.agent.instead["guest-fsfreeze-thaw"] = noise
    freezer.line.close()
    freezer.assert_quiet_end()
    assert not freezer.agent.frozen


def test_who_thaws_by_himself_tells_the_guard_to_stand_down(freezer: Freezer) -> None:
    freezer.arm()
    freezer.freeze()
    freezer.line.sendall(STAND_DOWN)
    freezer.assert_quiet_end()
    assert freezer.agent.frozen, "it was none of its business"


def test_a_guard_of_a_freeze_that_never_began_says_nothing_to_the_agent(freezer: Freezer) -> None:
    assert freezer.line.recv(64) == READY
    freezer.line.close()
    freezer.assert_quiet_end()
    assert freezer.agent.asked == []


def test_a_qemu_that_dies_with_file_systems_frozen_is_the_end(freezer: Freezer) -> None:
    freezer.arm()
    freezer.freeze()
    freezer.agent.end()
    freezer.line.close()
    freezer.assert_quiet_end()


# --- one connection for both ---------------------------------------------------------------------


def left_by_owner(**settings: Any) -> Qemu:
    """A monitor that has greeted the owner, and holds words for it: one half-read, one whole."""
    qemu = Qemu(**settings)
    qemu.greeting = None
    qemu.noise = (
        b'us": "running", "running": true}, "id": "window-6"}\r\n{"return": {}, "id": "1"}\r\n'
    )
    return qemu


def heard(owner: Owner) -> bytes:
    """All that the guard says until it ends."""
    words = b""
    with suppress(ConnectionError):
        while piece := owner.line.recv(64):
            words += piece
    return words


def test_a_shared_connection_is_left_alone_until_it_is_needed(posted: Posted) -> None:
    qemu = left_by_owner()
    owner = posted(qemu, guard.SHARED)
    owner.arm()
    owner.line.sendall(STAND_DOWN)
    assert heard(owner) == guard.STOOD_DOWN
    assert_quiet_end(owner, qemu)
    assert qemu.asked == []
    assert not qemu.said_forget


def test_who_is_told_to_stand_down_has_let_go_of_qemu_when_it_says_so(posted: Posted) -> None:
    qemu = left_by_owner()
    owner = posted(qemu, guard.SHARED)
    owner.arm()
    owner.line.sendall(STAND_DOWN)
    assert owner.line.recv(64) == guard.STOOD_DOWN
    qemu.end()


def test_a_shared_connection_is_taken_over_whatever_the_owner_left_on_it(posted: Posted) -> None:
    qemu = left_by_owner()
    owner = posted(qemu, guard.SHARED)
    owner.arm()
    owner.hang_up()
    assert_quiet_end(owner, qemu)
    assert qemu.said_forget
    assert qemu.asked[0] == "migrate_cancel"
    assert qemu.statuses == ["paused", *["running"] * STEADY]


def test_an_owner_hears_that_the_guard_acts_before_it_does(posted: Posted) -> None:
    qemu = left_by_owner()
    owner = posted(qemu, guard.SHARED)
    owner.arm(0.05)
    assert owner.line.recv(64) == guard.ACTING
    assert heard(owner) == b""
    assert_quiet_end(owner, qemu)
    assert qemu.status == "running"


@pytest.mark.parametrize("lost", ["migrate_cancel", "query-status", "cont"])
def test_an_answer_that_the_owner_has_read_is_asked_for_again(posted: Posted, lost: str) -> None:
    qemu = left_by_owner()
    qemu.lost = [lost]
    owner = posted(qemu, guard.SHARED)
    owner.arm(0.05)
    assert_quiet_end(owner, qemu)
    assert qemu.statuses[-STEADY:] == ["running"] * STEADY


def test_a_switch_whose_state_is_not_known_is_asked_for_again(
    posted: Posted, tmp_path: Path
) -> None:
    qemu = left_by_owner()
    qemu.jobs, qemu.lost = ["waiting", "waiting", "concluded"], ["query-jobs"]
    owner = posted(qemu, guard.SHARED)
    owner.arm(switch=record(tmp_path, "base"))
    owner.hang_up()
    assert_quiet_end(owner, qemu)
    assert qemu.asked.count("query-jobs") == 3
    assert qemu.status == "running"

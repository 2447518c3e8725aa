"""Recovering is itself cut off, hindered, or not needed: the guest runs, and nothing is lost."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from calotype.qemu.monitor import listen_socket, open_socket
from calotype.store.store import Store
from calotype.testing.machine import CommandFailed, wait
from calotype.testing.whole import is_on, picture
from crashing import (
    DELETES,
    DISKS,
    NEW,
    OLD,
    OPERATIONS,
    TALKING,
    WINDOW,
    Done,
    Subject,
    assert_data,
    assert_held,
    await_running,
    cell,
    held,
    is_stopped,
    moments,
    whole,
    write_on,
)

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]

UNDOS = 9
"""How many steps of an external take are undone, at the most."""


# --- recover is cut off itself -------------------------------------------------------------------


@pytest.mark.parametrize("place", range(UNDOS))
@pytest.mark.parametrize("point", ["undoing", "undone"])
def test_recover_is_killed_too(subject: Subject, done: Done, point: str, place: int) -> None:
    operation = OPERATIONS["take"]
    operation.prepare(subject)
    before = picture(subject)
    subject.killed_at("done:10", operation.words)
    subject.write(NEW, 2)
    subject.killed_at(f"{point}:{place}", ("recover", "small"))
    subject.calotype("recover", "small")
    assert whole(subject, before, done("take")) == "before"
    assert_data(subject, "take", "before", wrote_on=True)


@pytest.mark.parametrize("place", range(7))
def test_recover_of_a_restore_is_killed_too(subject: Subject, done: Done, place: int) -> None:
    operation = OPERATIONS["restore"]
    operation.prepare(subject)
    before = picture(subject)
    subject.killed_at("done:8", operation.words)
    subject.killed_at(f"undone:{place}", ("recover", "small"))
    subject.calotype("recover", "small")
    assert whole(subject, before, done("restore")) == "before"
    assert_data(subject, "restore", "before", wrote_on=False)


@pytest.mark.parametrize("place", range(5))
def test_an_undo_past_the_point_of_no_return_that_is_killed_is_gone_on_with(
    subject: Subject, done: Done, place: int
) -> None:
    """The guest cannot be let run, what was begun is undone, and that is cut off in its midst."""
    operation = OPERATIONS["restore discarding"]
    operation.prepare(subject)
    before, let_run = picture(subject), operation.steps.index("LetRun")
    moments = f"done:{let_run}+undone:{place}"
    struck = subject.struck(moments, "EIO+kill-self", operation.words)
    _, said = struck.communicate(timeout=60)
    assert struck.returncode == -signal.SIGKILL, said
    subject.calotype("recover", "small")
    assert whole(subject, before, done("restore discarding")) == "before"
    assert_data(subject, "restore", "before", wrote_on=False)


@pytest.mark.parametrize("name", DELETES)
def test_recover_of_a_delete_is_killed_too_again_and_again(
    subject: Subject, done: Done, name: str
) -> None:
    """Each time it comes one step further, and what is there by then is left alone."""
    operation = OPERATIONS[name]
    operation.prepare(subject)
    holding = held(subject, name)
    subject.killed_at("doing:0", operation.words)
    for place in range(len(operation.steps)):
        subject.killed_at(f"applied:{place}", ("recover", "small"))
        assert subject.reads(OLD, 1), place
        wrote_on = write_on(subject)
    subject.calotype("recover", "small")
    assert whole(subject, {}, done(name)) == "after"
    assert_data(subject, name, "after", wrote_on=wrote_on)
    assert_held(subject, name, holding)


def test_every_command_that_writes_recovers_first(subject: Subject) -> None:
    OPERATIONS["take"].prepare(subject)
    for words in (["take", "small"], ["stop", "small", "--now"], ["start", "small"]):
        if is_on(subject):
            subject.killed_at("done:9", OPERATIONS["take"].words)
        subject.calotype(*words)
        assert Store(subject.store).unfinished(subject.home.name) == []
    outcomes = [each["outcome"] for each in subject.calotype("history", "small")["history"]]
    assert outcomes.count("undone") == 2
    assert "unfinished" not in outcomes


def test_those_who_look_do_not_wait_and_change_nothing(subject: Subject) -> None:
    OPERATIONS["take"].prepare(subject)
    subject.killed_at("done:9", OPERATIONS["take"].words)
    left = picture(subject)
    for words in (["ps"], ["list"], ["show", "small"], ["history", "small"]):
        subject.calotype(*words)
    assert picture(subject) == left


# --- the guard -----------------------------------------------------------------------------------


@pytest.mark.parametrize("deed", ["kill-self", "stop-self"])
@pytest.mark.parametrize("command", WINDOW)
@pytest.mark.parametrize("name", ["take", "take paused"])
def test_the_guest_runs_again_though_nobody_runs_a_command(
    subject: Subject, done: Done, name: str, command: str, deed: str
) -> None:
    operation = OPERATIONS[name]
    operation.prepare(subject)
    before = picture(subject)
    words = (*operation.words, "--pause-limit", "1500")
    struck = subject.struck(f"sent:{command}", deed, words)
    wait(lambda: struck.poll() is not None or is_stopped(struck.pid), "the deed")
    await_running(subject, 10.0)
    time.sleep(0.3)
    assert subject.qmp("query-status")["running"], "it was stopped again"
    if deed == "stop-self":
        os.kill(struck.pid, signal.SIGCONT)
    struck.communicate(timeout=60)
    wrote_on = write_on(subject)
    subject.calotype("recover", "small")
    state = whole(subject, before, done(name))
    assert_data(subject, name, state, wrote_on=wrote_on)
    assert deed != "kill-self" or state == "before"


@pytest.mark.parametrize("command", ["stop", "transaction", "cont"])
def test_a_guard_that_is_killed_is_not_missed(subject: Subject, done: Done, command: str) -> None:
    assert cell(subject, done, "take", f"sent:{command}", "kill-guard") == "after"


def test_a_guard_that_cannot_stand_by_keeps_the_guest_from_being_stopped(
    subject: Subject,
) -> None:
    OPERATIONS["take"].prepare(subject)
    before = picture(subject)
    with (
        open_socket(subject.home / "guard.sock"),
        pytest.raises(CommandFailed, match="guard") as refused,
    ):
        subject.calotype("take", "small")
    assert refused.value.data["exit_code"] == 9
    assert picture(subject) == before


def test_a_paused_vm_stays_paused_whatever_dies(subject: Subject) -> None:
    OPERATIONS["take"].prepare(subject)
    subject.qmp("stop")
    before = picture(subject)
    assert before["run state"] == "paused"
    for moment in ("done:8", "sent:transaction", "done:9", "done:10"):
        subject.killed_at(moment, OPERATIONS["take"].words)
        subject.calotype("recover", "small")
        assert picture(subject) == before, moment


# --- QEMU hangs, or cannot be reached ------------------------------------------------------------


@pytest.mark.parametrize(
    "moment", [*moments("take", "doing", of=TALKING), "sent:stop", "sent:transaction"]
)
def test_qemu_hangs(subject: Subject, done: Done, moment: str) -> None:
    cell(subject, done, "take", moment, "hang-qemu")


def test_a_line_before_the_monitor_that_does_not_move_is_not_waited_for(subject: Subject) -> None:
    qemu = subject.pid()
    assert qemu is not None
    os.kill(qemu, signal.SIGSTOP)
    with contextlib.ExitStack() as line:
        for name in ("query.sock", "control.sock") * LINE:
            line.enter_context(open_socket(subject.home / name))
        with pytest.raises(BlockingIOError):  # who waits for a place would wait for ever
            open_socket(subject.home / "query.sock")
        for words in (("take", "small", "--plan"), ("take", "small")):
            with pytest.raises(CommandFailed, match="gave no greeting"):
                subject.calotype(*words)
        assert subject.run_state() == "busy"
    subject.stop()
    assert subject.run_state() == "off"


def test_a_qemu_that_dies_in_an_internal_snapshot_leaves_a_sound_image(subject: Subject) -> None:
    """It counts the clusters, then writes the table: what is left between the two is made here."""
    subject.write(OLD, 1)
    subject.killed_at("done:9", OPERATIONS["take"].words)
    subject.kill()
    with (subject.folder / DISKS[1]).open("r+b") as image:
        image.seek(SNAPSHOT_COUNT_AT)
        assert image.read(4) == b"\0\0\0\1"
        image.seek(SNAPSHOT_COUNT_AT)
        image.write(bytes(4))
    with pytest.raises(subprocess.CalledProcessError):
        subject.check_image(subject.folder / DISKS[1])
    subject.calotype("recover", "small")
    subject.check_image(subject.folder / DISKS[1])
    assert subject.reads(OLD, 1)


LINE = 2
"""How many may wait at a monitor: QEMU listens with a backlog of 1 (listen(2), one more fits)."""

SNAPSHOT_COUNT_AT = 60
"""Where a qcow2's header has the number of its internal snapshots (docs/interop/qcow2.rst)."""


class Proxy:
    """Stands between Calotype and QEMU's monitor, and carries on until it is told not to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._real = path.with_suffix(".real")
        path.rename(self._real)
        self._listener = listen_socket(path)
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.carries = True
        self._start(self._serve)

    def _start(self, work: Callable[..., None], *sockets: socket.socket) -> None:
        self._threads.append(threading.Thread(target=work, args=sockets, daemon=True))
        self._threads[-1].start()

    def _serve(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return
            theirs = open_socket(self._real)
            self._open += [ours, theirs]
            self._start(self._carry, ours, theirs)
            self._start(self._carry, theirs, ours)

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, descriptors, _, _ = socket.recv_fds(source, 1 << 16, 8)
                while not self.carries:
                    time.sleep(0.01)
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                try:
                    socket.send_fds(sink, [data], descriptors)
                finally:
                    for descriptor in descriptors:
                        os.close(descriptor)

    def cut(self) -> None:
        """Hang up on both sides."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def stall(self) -> None:
        """Carry nothing any more."""
        self.carries = False

    def close(self) -> None:
        """Put QEMU's own socket back."""
        self.carries = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(10)
        for each in (self._listener, *self._open):
            each.close()
        self._path.unlink()
        self._real.rename(self._path)


@pytest.mark.parametrize("deed", ["cut", "stall"])
@pytest.mark.parametrize(
    "moment",
    [*moments("take", "doing", of=TALKING), "sent:stop", "sent:migrate", "sent:transaction"],
)
def test_the_connection_is_cut_or_stalls(
    subject: Subject, done: Done, moment: str, deed: str
) -> None:
    operation = OPERATIONS["take"]
    operation.prepare(subject)
    before = picture(subject)
    between = Proxy(subject.home / "control.sock")
    ours, theirs = socket.socketpair()
    asking = theirs.fileno()
    struck = subject.struck(moment, f"ask:{asking}", operation.words, descriptors=[asking])
    theirs.close()
    with ours:
        if ours.recv(1):
            getattr(between, deed)()
            ours.sendall(b"!")
        _, said = struck.communicate(timeout=90)
    between.close()
    assert struck.returncode in (0, 6, 7, 8), said
    await_running(subject, 10.0)
    wrote_on = write_on(subject)
    subject.calotype("recover", "small")
    state = whole(subject, before, done("take"))
    assert_data(subject, "take", state, wrote_on=wrote_on)


# --- a disk without room -------------------------------------------------------------------------


@pytest.fixture(params=["disks"])
def cramped(folder: Path, request: pytest.FixtureRequest) -> Iterator[Subject]:
    """A machine with one disk, and a small file system for the one of its two folders."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    (folder / "disks").mkdir()
    small = folder / request.param
    small.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=90M", "tmpfs", small], check=True)
    vm = Subject(folder, disks=("disks/zero.qcow2",))
    vm.make_disks()
    vm.run()
    yield vm
    vm.clean_up()
    subprocess.run(["umount", "-l", small], check=True)


def cut_off_and_fill(vm: Subject) -> Path:
    """Kill a take in its midst, let the guest write to the overlay, and take all room; by what."""
    vm.write(OLD, 1)
    vm.killed_at("done:8", ("take", "small"))
    for place in range(2, 10):
        vm.write(NEW, place)
    return filled(vm.folder / "disks")


def filled(folder: Path) -> Path:
    """Take all the room of a file system; by what."""
    filler = folder / "filler"
    with filler.open("wb") as rest:
        os.posix_fallocate(rest.fileno(), 0, os.statvfs(filler).f_bavail * 4096)
    return filler


def test_a_full_disk_forbids_the_merge_and_it_is_made_later(cramped: Subject) -> None:
    vm = cramped
    filler = cut_off_and_fill(vm)
    for _ in range(2):
        with pytest.raises(CommandFailed, match="cannot be undone yet") as refused:
            vm.calotype("recover", "small")
        assert refused.value.data["exit_code"] == 6
        assert vm.qmp("query-status")["running"]
    with pytest.raises(CommandFailed, match="not over yet"):
        vm.calotype("take", "small")
    overlay = Store(vm.store).record(vm.home.name).disks[0].active
    assert overlay.path.count(".qcow2") > 1
    filler.unlink()
    vm.calotype("recover", "small")
    assert Store(vm.store).record(vm.home.name).disks[0].active.path.endswith("/zero.qcow2")
    assert [path.name for path in (vm.folder / "disks").iterdir()] == ["zero.qcow2"]
    assert vm.reads(OLD, 1)
    assert all(vm.reads(NEW, place) for place in range(2, 10))


@pytest.mark.parametrize("cramped", ["store"], indirect=True)
def test_a_full_store_keeps_the_guest_running_and_the_undo_is_made_later(cramped: Subject) -> None:
    vm = cramped
    before = vm.files()
    vm.write(OLD, 1)
    vm.killed_at("done:5", ("take", "small", "--machine-state", "none"))
    vm.write(NEW, 2)
    filler = filled(vm.store)
    for place in range(3, 6):
        with pytest.raises(CommandFailed, match="No space left on device") as refused:
            vm.calotype("recover", "small")
        assert refused.value.data["exit_code"] == 6
        assert vm.qmp("query-status")["running"]
        vm.write(NEW, place)
    filler.unlink()
    vm.calotype("recover", "small")
    assert vm.qmp("query-jobs") == []
    assert vm.files() == before
    assert vm.reads(OLD, 1)
    assert all(vm.reads(NEW, place) for place in range(2, 6))


def test_a_full_disk_does_not_keep_a_vm_from_being_stopped_and_started(cramped: Subject) -> None:
    vm = cramped
    filler = cut_off_and_fill(vm)
    vm.stop()
    vm.calotype("start", "small")
    assert vm.qmp("query-status")["running"]
    filler.unlink()
    vm.calotype("recover", "small")
    assert [path.name for path in (vm.folder / "disks").iterdir()] == ["zero.qcow2"]
    assert vm.reads(OLD, 1)
    assert all(vm.reads(NEW, place) for place in range(2, 10))


# --- at random -----------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_a_hundred_random_moments_leave_no_orphan_and_no_frozen_guest(subject: Subject) -> None:
    """Kill takes at any moment, those within a step included, on one machine in a row."""
    seed = random.SystemRandom().randrange(1 << 32)
    moments_of = random.Random(seed)
    OPERATIONS["take"].prepare(subject)
    before, rounds, happened = picture(subject), 0, 0
    while rounds < 100:
        rounds += 1
        command = subprocess.Popen(
            [sys.executable, "-m", "calotype", *OPERATIONS["take"].words],
            cwd=subject.folder,
            env={**os.environ, "CALOTYPE_STORE": str(subject.store)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(moments_of.uniform(0.1, 0.5))
        command.kill()
        command.wait()
        await_running(subject, 5.0)
        subject.write(NEW, 2)
        subject.calotype("recover", "small")
        now = picture(subject)
        if now["snapshots"] != before["snapshots"]:
            happened += 1
            before = now
        assert now == before, f"seed {seed}, round {rounds}"
        assert subject.reads(OLD, 1)
        assert subject.reads(NEW, 2)
    assert happened < rounds, "no take was ever cut off"

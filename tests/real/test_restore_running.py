"""A VM that runs is gone over to a snapshot: prepared beside it, handed over, and handed back.

On a machine without an operating system, with a forwarded port, a serial port on a unix socket,
one on TCP, VNC, a pidfile and a log: what a user has connected to must answer afterwards, of the
new QEMU if it succeeded and of the old one if anything failed.
"""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from calotype.errors import CalotypeError
from calotype.qemu import process
from calotype.testing.machine import CommandFailed, wait
from calotype.testing.whole import picture
from crashing import NEW, OLD, Subject

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Server(Subject):
    """A machine that others have connected to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, disks=("zero.qcow2", "one.raw"))
        self.ssh, self.telnet = free_port(), free_port()
        self.display = free_port() - 5900

    def argv(self, **changes: object) -> list[str]:
        more = [
            *("-netdev", f"user,id=net,restrict=off,hostfwd=tcp:127.0.0.1:{self.ssh}-:22"),
            *("-device", "virtio-net-pci,netdev=net"),
            *("-serial", "unix:serial.sock,server=on,wait=off"),
            *("-serial", f"telnet:127.0.0.1:{self.telnet},server=on,wait=off"),
            *("-serial", "file:serial.log"),
            *("-vnc", f"127.0.0.1:{self.display}"),
            *("-pidfile", "pid"),
        ]
        return super().argv(more=[*more, *changes.pop("more", ())], **changes)  # type: ignore[misc, arg-type]

    def assert_answers(self) -> None:
        """Every way to it leads to the QEMU that runs it, and to no other."""
        pid = self.pid()
        assert int((self.folder / "pid").read_text()) == pid
        with socket.socket(socket.AF_UNIX) as serial:
            serial.connect(str(self.folder / "serial.sock"))
            credentials = serial.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            assert int.from_bytes(credentials[:4], "little") == pid
        for port in (self.ssh, self.telnet, 5900 + self.display):
            assert listeners(port) == [pid]
        with socket.create_connection(("127.0.0.1", 5900 + self.display), 5) as vnc:
            assert vnc.recv(4) == b"RFB "
        assert self.qmp("query-status")["running"]

    def answers(self) -> bool:
        """Whether all of that is so by now."""
        try:
            self.assert_answers()
        except (AssertionError, CalotypeError, OSError, ValueError):  # a pid is just written
            return False
        return True

    def assert_alone(self) -> None:
        """It answers, and no second QEMU and no socket of one is left."""
        self.assert_answers()
        assert [*self.folder.rglob("*.next"), *self.folder.rglob("*.prev")] == []
        assert [each.pid for each in process.find("CALOTYPE_VM", self.home.name)] == [self.pid()]


def listeners(port: int) -> list[int]:
    """The processes that listen on a TCP port of this host."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    inodes = {
        f"socket:[{each[9]}]"
        for each in fields
        if each[3] == "0A" and int(each[1].rpartition(":")[2], 16) == port
    }
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(link.readlink()) in inodes:
                found.add(int(link.parts[2]))
        except OSError:
            continue
    return sorted(found)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    """A server that runs; ended in the end."""
    vm = Server(folder)
    vm.make_disks()
    vm.run()
    yield vm
    for qemu in process.find("CALOTYPE_VM", vm.home.name):
        os.kill(qemu.pid, signal.SIGCONT)
        os.kill(qemu.pid, signal.SIGKILL)
    vm.clean_up()


def moved_on(vm: Server, *words: str) -> str:
    """Take a snapshot, and let the guest write on; its id."""
    vm.write(OLD, 1)
    snapshot = vm.take(*words)
    vm.write(NEW, 1)
    return snapshot


# --- it succeeds ---------------------------------------------------------------------------------


def test_a_vm_that_runs_goes_over_with_all_its_ports(server: Server) -> None:
    snapshot = moved_on(server)
    before = server.pid()
    server.assert_alone()
    told = server.calotype("restore", server.name, "--id", snapshot)
    assert told["run_state"] == "running"
    assert told["pause_ms"] is not None
    assert server.pid() != before
    server.assert_alone()
    assert server.reads(OLD, 1)
    server.write(NEW, 3)
    server.stop()
    server.calotype("restore", server.name, "--id", told["left_behind"])
    assert server.reads(NEW, 1)


def test_the_plan_names_what_is_handed_over_and_changes_nothing(server: Server) -> None:
    snapshot = moved_on(server)
    before = picture(server)
    plan = server.calotype("restore", server.name, "--id", snapshot, "--plan")
    assert [each["what"].partition(" ")[0] for each in plan["endpoints"]] == [
        "port", "unix", "TCP", "log", "TCP", "pidfile",
    ]  # fmt: skip
    assert plan["blockers"] == plan["mismatches"] == []
    assert "HandOver" in plan["steps"]
    assert picture(server) == before


def test_the_state_left_behind_is_kept_whole(server: Server) -> None:
    snapshot = moved_on(server)
    told = server.calotype("restore", server.name, "--id", snapshot, "--keep-current")
    assert server.reads(OLD, 1)
    server.calotype("restore", server.name, "--id", told["left_behind"])
    server.assert_alone()
    assert server.reads(NEW, 1)


def test_a_snapshot_inside_an_image_is_copied_out_of_it(server: Server) -> None:
    snapshot = moved_on(server, "--disk", "virtio0=internal")
    plan = server.calotype("restore", server.name, "--id", snapshot, "--plan")
    assert any("copied out" in note for note in plan["notes"])
    server.calotype("restore", server.name, "--id", snapshot)
    server.assert_alone()
    assert server.reads(OLD, 1)


def test_a_disk_that_is_skipped_goes_over_to_the_new_qemu(server: Server) -> None:
    snapshot = moved_on(server, "--disk", "virtio0=skip")
    server.write(NEW, 2)
    server.calotype("restore", server.name, "--id", snapshot)
    server.assert_alone()
    server.write(OLD, 3)
    assert server.reads(OLD, 3)


def test_a_vm_goes_over_again_and_again(server: Server) -> None:
    snapshot = moved_on(server)
    for _ in range(4):
        server.write(NEW, 1)
        server.calotype("restore", server.name, "--id", snapshot, "--discard-current")
        server.assert_alone()
        assert server.reads(OLD, 1)
    overlays = sorted(path.name.count(".") for path in server.folder.glob("zero.qcow2.*"))
    assert len(overlays) == 1


def test_a_vm_that_is_paused_goes_over_and_stays_paused_if_it_is_to(server: Server) -> None:
    snapshot = moved_on(server)
    server.calotype("restore", server.name, "--id", snapshot, "--run-state", "paused")
    assert not server.qmp("query-status")["running"]
    server.calotype("restore", server.name, "--id", snapshot)
    server.assert_alone()
    assert server.reads(OLD, 1)


# --- it fails, or somebody dies ------------------------------------------------------------------

STEPS = (
    "CreateOverlay", "CreateOverlay", "StartQemu", "CheckTopology", "LoadState",
    "MakeSnapshotFolder", "HandOver", "EndOld", "FreezeImages", "CommitLeftBehind",
)  # fmt: skip
HANDING = STEPS.index("HandOver")
ACTS = 17
"""Four sockets of ours, a forwarded port, a unix socket, a TCP port, VNC (two each), a pidfile."""
PLACES = [f"handing:{place}" for place in (0, 3, 9, 11, 13, 15, ACTS - 1)]


def test_the_moments_are_those_of_the_plan(server: Server) -> None:
    snapshot = moved_on(server)
    plan = server.calotype("restore", server.name, "--id", snapshot, "--plan")
    assert tuple(plan["steps"]) == STEPS


def struck(vm: Server, moment: str, deed: str) -> int:
    """Restore over the VM with something happening; the exit code."""
    command = vm.struck(moment, deed, ("restore", vm.name, "--id", vm.snapshot))
    command.communicate(timeout=60)
    return command.returncode


def assert_as_before(vm: Server, before: dict[str, object]) -> None:
    vm.calotype("recover", vm.name)
    assert picture(vm) == before
    vm.assert_alone()
    vm.write(NEW, 2)
    assert vm.reads(NEW, 1)
    assert vm.reads(NEW, 2)


PREPARING = [f"{point}:{place}" for place in range(HANDING) for point in ("doing", "done")]


@pytest.mark.parametrize("deed", ["kill-self", "EIO"])
@pytest.mark.parametrize("moment", [*PREPARING, f"doing:{HANDING}"])
def test_a_failure_while_it_is_prepared_is_not_noticed(
    server: Server, moment: str, deed: str
) -> None:
    moved_on(server)
    before = picture(server)
    assert struck(server, moment, deed) != 0
    server.assert_answers()
    assert_as_before(server, before)


@pytest.mark.parametrize("deed", ["EIO", "kill-new"])
@pytest.mark.parametrize("moment", [*PLACES, "handing:run"])
def test_a_failure_in_the_handover_hands_everything_back(
    server: Server, moment: str, deed: str
) -> None:
    moved_on(server)
    before = picture(server)
    assert struck(server, moment, deed) not in (0, -signal.SIGKILL)
    server.assert_answers()
    assert_as_before(server, before)


@pytest.mark.parametrize("deed", ["kill-self", "stop-self"])
@pytest.mark.parametrize("moment", PLACES)
def test_the_guard_hands_back_though_nobody_runs_a_command(
    server: Server, moment: str, deed: str
) -> None:
    moved_on(server)
    before = picture(server)
    command = server.struck(moment, deed, ("restore", server.name, "--id", server.snapshot))
    wait(lambda: command.poll() is not None or is_stopped(command.pid), "the deed")
    wait(server.answers, "the guard")
    if deed == "stop-self":
        os.kill(command.pid, signal.SIGCONT)
    command.communicate(timeout=60)
    assert_as_before(server, before)


def test_what_comes_too_late_is_not_recorded_though_the_guest_is_not_to_run(
    server: Server,
) -> None:
    moved_on(server)
    before = picture(server)
    words = ("restore", server.name, "--id", server.snapshot, "--run-state", "paused")
    command = server.struck(PLACES[-1], "stop-self", words)
    wait(lambda: is_stopped(command.pid), "the deed")
    wait(server.answers, "the guard")
    os.kill(command.pid, signal.SIGCONT)
    command.communicate(timeout=60)
    assert command.returncode == 7
    assert_as_before(server, before)


@pytest.mark.parametrize("deed", ["kill-self", "stop-self"])
def test_the_guard_lets_the_new_guest_run_once_it_is_recorded(server: Server, deed: str) -> None:
    moved_on(server)
    old = server.pid()
    command = server.struck("handing:run", deed, ("restore", server.name, "--id", server.snapshot))
    wait(lambda: command.poll() is not None or is_stopped(command.pid), "the deed")
    wait(lambda: bool(server.qmp("query-status")["running"]), "the guard")
    if deed == "stop-self":
        os.kill(command.pid, signal.SIGCONT)
    command.communicate(timeout=60)
    server.calotype("recover", server.name)
    server.assert_alone()
    if deed == "kill-self":
        assert server.pid() != old
    # one that wakes up too late may find its time over, and goes back whole
    assert server.reads(NEW if server.pid() == old else OLD, 1)


AFTERWARDS = [("kill-self", HANDING)]
AFTERWARDS += [(deed, at) for deed in ("kill-self", "EIO") for at in range(HANDING + 1, len(STEPS))]


@pytest.mark.parametrize(("deed", "place"), AFTERWARDS)
def test_what_fails_once_it_has_gone_over_is_finished(
    server: Server, place: int, deed: str
) -> None:
    moved_on(server)
    old = server.pid()
    assert struck(server, f"done:{place}", deed) != 0
    assert server.qmp("query-status")["running"]
    server.calotype("recover", server.name)
    assert server.pid() != old
    server.assert_alone()
    assert server.reads(OLD, 1)
    left = server.calotype("list")["vms"][0]["snapshots"][-1]["id"]
    server.stop()
    server.calotype("restore", server.name, "--id", left)
    assert server.reads(NEW, 1)


@pytest.mark.parametrize("moment", [*PREPARING[5:], *PLACES])
def test_an_old_qemu_that_dies_leaves_its_disks(server: Server, moment: str) -> None:
    moved_on(server)
    struck(server, moment, "kill-qemu")
    server.calotype("recover", server.name)
    if server.run_state() == "running":  # nothing was to be had from it any more
        server.assert_alone()
        assert server.reads(OLD, 1)
        return
    assert process.find("CALOTYPE_VM", server.home.name) == []
    assert server.reads(NEW, 1)
    server.calotype("start", server.name)
    server.assert_alone()


def test_without_the_guard_a_taker_that_dies_leaves_the_guest_standing(server: Server) -> None:
    moved_on(server)
    words = ("restore", server.name, "--id", server.snapshot)
    server.killed_at("handing:9", words, without="guard")
    with pytest.raises((AssertionError, OSError)):
        server.assert_answers()


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


# --- it is refused, or stops the VM first --------------------------------------------------------


@pytest.fixture
def single(folder: Path) -> Iterator[Subject]:
    """A machine with a debugger's port, which one QEMU alone can have."""

    class Debugged(Subject):
        def argv(self, **changes: object) -> list[str]:
            return super().argv(more=["-gdb", "unix:gdb.sock,server=on,wait=off"], **changes)  # type: ignore[arg-type]

    vm = Debugged(folder, disks=("zero.qcow2",))
    vm.make_disks()
    vm.run()
    yield vm
    vm.clean_up()


def test_what_one_alone_can_have_is_refused_by_name(single: Subject) -> None:
    snapshot = single.take()
    before = picture(single)
    with pytest.raises(CommandFailed, match=r"-gdb unix:gdb\.sock") as refused:
        single.calotype("restore", single.name, "--id", snapshot)
    assert refused.value.data["exit_code"] == 4
    assert "--stop-first" in str(refused.value)
    assert picture(single) == before


def test_a_vm_that_is_stopped_first_is_saved_whole(single: Subject) -> None:
    single.write(OLD, 1)
    snapshot = single.take()
    single.write(NEW, 1)
    told = single.calotype("restore", single.name, "--id", snapshot, "--stop-first")
    assert single.run_state() == "running"
    assert single.reads(OLD, 1)
    single.calotype("restore", single.name, "--id", told["left_behind"], "--stop-first")
    assert single.run_state() == "running"
    assert single.reads(NEW, 1)


def test_a_restore_that_fails_brings_the_vm_back_that_was_stopped_first(single: Subject) -> None:
    single.write(OLD, 1)
    snapshot = single.take()
    single.write(NEW, 1)
    state = single.state_file(snapshot)
    with state.open("r+b") as stream:
        stream.truncate(state.stat().st_size // 2)
    single.believe(snapshot)
    with pytest.raises(CommandFailed, match="cannot load"):
        single.calotype("restore", single.name, "--id", snapshot, "--stop-first")
    assert single.run_state() == "running"
    assert single.reads(NEW, 1)


@pytest.mark.parametrize("moment", ["done:0", "sent:migrate", "sent:transaction", "done:12"])
def test_a_guest_that_was_stopped_first_runs_again_though_nobody_runs_a_command(
    single: Subject, moment: str
) -> None:
    snapshot = single.take()
    single.write(NEW, 1)
    words = ("restore", single.name, "--id", snapshot, "--stop-first")
    single.killed_at(moment, words)
    wait(lambda: bool(single.qmp("query-status")["running"]), "the guard")
    single.calotype("recover", single.name)
    assert single.run_state() == "running"
    single.write(NEW, 2)
    assert single.reads(NEW, 1)
    assert single.reads(NEW, 2)


def test_what_is_in_the_way_of_the_restore_is_told_before_the_vm_is_stopped(
    single: Subject,
) -> None:
    snapshot = single.take()
    before, pid = picture(single), single.pid()
    words = ("restore", single.name, "--id", snapshot, "--stop-first")
    with pytest.raises(CommandFailed, match="no port for a guest agent") as refused:
        single.calotype(*words, "--sync-time")
    assert refused.value.data["exit_code"] == 4
    assert (picture(single), single.pid()) == (before, pid)
    told = single.calotype(*words, "--plan")
    assert told["blockers"] == []
    assert "HandOver" not in told["steps"]
    assert (picture(single), single.pid()) == (before, pid)


def test_a_vm_without_disks_is_gone_back_to_when_it_was_stopped_first(folder: Path) -> None:
    vm = Subject(folder, disks=())
    vm.make_disks()
    vm.run()
    snapshot = vm.take()
    pid = vm.pid()
    with pytest.raises(CommandFailed, match="no disk of it gets another image") as refused:
        vm.calotype("restore", vm.name, "--id", snapshot)
    assert "--stop-first" in str(refused.value)
    assert (vm.pid(), vm.run_state()) == (pid, "running")
    vm.calotype("restore", vm.name, "--id", snapshot, "--stop-first")
    assert vm.run_state() == "running"
    assert vm.pid() != pid
    vm.clean_up()


def test_disks_alone_are_booted_and_those_left_behind_by_a_restore_do_not_turn_a_vm_off(
    server: Server,
) -> None:
    snapshot = moved_on(server, "--machine-state", "none")
    left = server.calotype("restore", server.name, "--id", snapshot)["left_behind"]
    server.assert_alone()
    assert server.reads(OLD, 1)
    with pytest.raises(CommandFailed, match="no machine state, and the VM runs"):
        server.calotype("restore", server.name, "--id", left)
    server.assert_alone()
    server.calotype("restore", server.name, "--id", left, "--run-state", "running")
    server.assert_alone()
    assert server.reads(NEW, 1)

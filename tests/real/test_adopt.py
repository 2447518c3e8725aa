"""A QEMU that its user started by hand is adopted, snapshotted, killed, restored; or refused."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adopting import ByHand, WitnessByHand, server
from calotype.qemu.monitor import open_socket
from calotype.store.store import Store
from calotype.testing.machine import CommandFailed, wait
from calotype.testing.whole import picture
from calotype.testing.witness import Witness
from crashing import NEW, OLD, WINDOW

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]


@pytest.fixture
def stray(folder: Path) -> Iterator[ByHand]:
    """A machine with its images; no QEMU runs yet."""
    vm = ByHand(folder, disks=("zero.qcow2", "one.raw"))
    vm.make_disks()
    yield vm
    vm.clean_up()


def made(path: Path) -> Path:
    """One more image, empty."""
    format_ = path.suffix.removeprefix(".")
    subprocess.run(["qemu-img", "create", "-q", "-f", format_, path, "64M"], check=True)
    return path


def refused(vm: ByHand, words: str, code: int, path: str = "qmp.sock") -> dict[str, Any]:
    """Adopting is refused, in so many words, and leaves nothing; the error's members."""
    before = sorted(vm.store.rglob("*")) if vm.store.exists() else []
    with pytest.raises(CommandFailed, match=words) as failed:
        vm.adopt(path)
    assert failed.value.data["exit_code"] == code, failed.value
    left = [path for path in sorted(vm.store.rglob("*")) if path.parent.name == "vms"]
    assert left == [path for path in before if path.parent.name == "vms"]
    error: dict[str, Any] = failed.value.data["error"]
    assert error["remedy"]
    return error


# --- a user's session ----------------------------------------------------------------------------


def test_a_session(folder: Path, built_witness: Witness) -> None:
    vm = WitnessByHand(folder, built_witness, disks=("a b.qcow2", "one.raw"), name="web 1")
    vm.make_disks()
    try:
        vm.start_by_hand()
        vm.rounds_by_hand(2)
        said = vm.shell("adopt 'web 1' --qmp qmp.sock")
        assert f"process {vm.hand.pid}; writable disks: virtio0, virtio1" in said
        assert "does not work: console, logs: what it says goes where its own command" in said
        assert "start" not in said.replace("once it starts the VM itself", "")
        assert "running" in vm.shell("ps")
        assert "adopted at" in vm.shell("show 'web 1'")
        assert "no logs" in vm.shell("logs 'web 1'", expected=3)
        assert "no console of ours" in vm.shell("console 'web 1'", expected=6)
        assert "blocker" not in vm.shell("take 'web 1' --plan")
        first = vm.shell("take 'web 1' --tag before -q").strip()
        vm.rounds_by_hand(2)
        vm.shell("take 'web 1' -q")
        vm.rounds_by_hand(2)
        assert "deleted 1 snapshot" in vm.shell("delete 'web 1' --tag before")
        vm.shell("take 'web 1' --tag last -q")
        vm.rounds_by_hand(2)
        assert first not in vm.shell("list 'web 1'")
        assert "take" in vm.shell("history 'web 1'")

        vm.hand.kill()
        vm.hand.wait()
        assert "off" in vm.shell("ps")
        assert "is running" in vm.shell("restore 'web 1' --tag last")
        assert vm.testimony(0).is_consistent
        assert "TICK n=" in vm.shell("logs 'web 1'")
        assert "started last by Calotype" in vm.shell("show 'web 1'")
        vm.shell("stop 'web 1' --now")
        for path in vm.folder.glob("*.qcow2"):
            vm.check_image(path)
    finally:
        vm.clean_up()


def test_it_is_stopped_by_its_monitor_and_started_under_supervision(stray: ByHand) -> None:
    stray.run()
    stray.write(OLD, 1)
    stray.shell("stop small --now")
    assert stray.hand.wait(30) == 0
    stray.shell("start small")
    assert stray.reads(OLD, 1)
    stray.take()
    assert picture(stray)["processes"] == 1


def test_a_monitor_that_is_in_use_does_not_keep_it_from_being_stopped(stray: ByHand) -> None:
    stray.run()
    with open_socket(stray.folder / "qmp.sock"):
        assert stray.run_state() == "busy"
        assert stray.pid() == stray.hand.pid
        stray.shell("stop small --now")
    assert stray.hand.wait(30) == 0, "it was killed, and not told to end"


def test_one_that_is_forgotten_runs_on(stray: ByHand) -> None:
    stray.run()
    stray.shell("forget small")
    assert stray.qmp("query-status")["running"]
    stray.shell("adopt again --qmp qmp.sock")


# --- what cannot be started again ----------------------------------------------------------------


def test_a_daemon_is_adopted_and_started_without_being_one(stray: ByHand) -> None:
    absolute = [str(stray.folder / disk) for disk in stray.disks]
    argv = [word for word in stray.argv(disks=absolute) if word != "-nographic"]
    daemon = ("-display", "none", "-daemonize", "-pidfile", "daemon.pid", "-S")
    stray.start_by_hand(*daemon, argv=argv)
    told = stray.adopt()
    assert [each["words"] for each in told["dropped"]] == ["-daemonize", "-S"]
    assert "run state 'prelaunch'" in told["blockers"][0]["problem"]
    let_run(stray)
    stray.take()
    stray.shell("stop small --now")
    assert "running" in stray.shell("restore small --latest")


def let_run(vm: ByHand) -> None:
    """Let the guest run, as its user would."""
    with open_socket(vm.folder / "watch.sock") as monitor:
        monitor.sendall(b'{"execute": "qmp_capabilities"}{"execute": "cont"}')
        said = b""
        while b"RESUME" not in said:
            said += monitor.recv(4096)


def test_a_daemon_with_relative_paths_cannot_be_snapshotted_and_says_so(stray: ByHand) -> None:
    argv = [word for word in stray.argv() if word != "-nographic"]
    stray.start_by_hand("-display", "none", "-daemonize", "-pidfile", "daemon.pid", argv=argv)
    said = stray.shell("adopt small --qmp qmp.sock")
    assert "does not work: take, delete: QEMU has left the folder that 'one.raw' starts" in said
    assert "cannot open it again" in stray.shell("take small", expected=4)
    assert "cannot open it again" in stray.shell("take small --plan", expected=4)
    stray.shell("stop small --now")
    stray.shell("start small")
    stray.take()


def test_inherited_descriptors_are_no_obstacle_to_a_snapshot_but_to_a_start(stray: ByHand) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, (stray.folder / "passed").open("w+b") as passed:
        number = theirs.fileno()
        words = ("-chardev", f"socket,id=c,fd={number}", "-device", "virtio-serial")
        added = ("-add-fd", f"fd={passed.fileno()},set=7")
        stray.start_by_hand(*words, *added, descriptors=(number, passed.fileno()))
        said = stray.shell("adopt small --qmp qmp.sock")
        assert f"does not work: start, restore: -chardev socket,id=c,fd={number}" in said
        assert f"does not work: start, restore: -add-fd fd={passed.fileno()},set=7" in said
        snapshot = stray.take()
        assert "cannot be opened again" in stray.shell("show small")
        for how in ("", "--plan", "--stop-first"):
            said = stray.shell(f"restore small --id {snapshot} {how}", expected=4)
            assert "a file descriptor cannot be opened again" in said
        assert stray.qmp("query-status")["running"]
        stray.shell("stop small --now")
        for line in ("start small", f"restore small --id {snapshot}"):
            said = stray.shell(line, expected=4)
            assert "a file descriptor cannot be opened again" in said
            assert "calotype run small" in said
        stray.calotype("run", "small", "--", *stray.argv(), "-device", "virtio-serial")
        assert stray.run_state() == "running"


def test_a_server_that_waits_for_a_client_is_not_waited_for_again(stray: ByHand) -> None:
    serial = stray.folder / "serial.sock"

    def be_its_client() -> None:
        wait(serial.exists, "the serial port")
        open_socket(serial).close()

    client = threading.Thread(target=be_its_client)
    client.start()
    stray.start_by_hand("-serial", "unix:serial.sock,server=on")
    client.join()
    (dropped,) = stray.adopt()["dropped"]
    assert dropped["words"] == "-serial unix:serial.sock,server=on"
    stray.shell("stop small --now")
    assert "runs" in stray.shell("start small")


def test_a_serial_port_on_a_socket_is_the_console(stray: ByHand) -> None:
    stray.start_by_hand("-serial", server("serial.sock"))
    told = stray.adopt()
    assert {limit["command"] for limit in told["limits"]} == {"logs"}
    stray.shell("console small")
    with open_socket(stray.folder / "serial.sock"):
        assert f"in use by process {os.getpid()}" in stray.shell("console small", expected=6)


# --- a restore over it ---------------------------------------------------------------------------


def test_a_restore_over_the_qemu_of_its_user_is_refused_and_changes_nothing(stray: ByHand) -> None:
    stray.start_by_hand("-serial", server("serial.sock"))
    stray.adopt()
    snapshot = stray.take()
    before = picture(stray)
    with pytest.raises(CommandFailed, match="started by hand and adopted at /") as failed:
        stray.calotype("restore", "small", "--id", snapshot)
    assert failed.value.data["exit_code"] == 4
    assert "--stop-first" in failed.value.data["error"]["remedy"]
    with pytest.raises(CommandFailed, match="would take its user's sockets") as planned:
        stray.calotype("restore", "small", "--id", snapshot, "--plan")
    assert planned.value.data["exit_code"] == 4
    assert len(planned.value.data["told"]["blockers"]) == 1
    assert picture(stray) == before
    assert stray.pid() == stray.hand.pid
    assert stray.qmp("query-status")["running"]


def test_nothing_that_is_shown_of_it_holds_a_secret(stray: ByHand) -> None:
    stray.start_by_hand("-object", "secret,id=s0,data=hunter2")
    told = [stray.adopt()]
    told += [stray.calotype(*words) for words in (("show", "small"), ("ps",), ("list",))]
    told += [
        stray.calotype("show", "small", "--id", stray.take()),
        stray.calotype("history", "small"),
    ]
    assert "hunter2" not in json.dumps(told)
    assert "data=REDACTED" in json.dumps(told)


def test_it_is_restored_by_stopping_it_first_and_goes_over_from_then_on(stray: ByHand) -> None:
    stray.run()
    stray.write(OLD, 1)
    snapshot = stray.take()
    stray.write(NEW, 2)
    done = stray.calotype("restore", "small", "--id", snapshot, "--stop-first")
    assert stray.hand.wait(30) == 0, "it was killed, and not told to end"
    assert stray.run_state() == "running"
    assert stray.reads(OLD, 1)
    assert not stray.reads(NEW, 2)
    stray.calotype("restore", "small", "--id", done["left_behind"])
    assert stray.reads(NEW, 2)
    assert picture(stray)["processes"] == 1


# --- what QEMU is on, and not what its command line says -----------------------------------------


def test_an_overlay_that_was_put_on_by_hand_is_the_newest_image(stray: ByHand) -> None:
    stray.start_by_hand()
    overlay = stray.folder / "by-hand.qcow2"
    stray.qmp("blockdev-snapshot-sync", device="virtio0", snapshot_file=str(overlay))
    stray.write(OLD, 1)
    assert f"disk virtio0 is on {overlay} now" in stray.shell("adopt small --qmp qmp.sock")
    active = [disk.active.path for disk in Store(stray.store).record(stray.home.name).disks]
    assert active == [str(overlay), str(stray.folder / "one.raw")]
    stray.take()
    stray.write(NEW, 2)
    stray.hand.kill()
    stray.hand.wait()
    stray.shell("start small")
    assert stray.reads(OLD, 1)


def test_a_device_that_was_plugged_in_by_hand_is_in_the_way(stray: ByHand) -> None:
    stray.start_by_hand("-device", "pcie-root-port,id=root,chassis=9,slot=9")
    stray.qmp("device_add", driver="virtio-rng-pci", id="late", bus="root")
    told = stray.adopt()
    assert [each["problem"] for each in told["blockers"]] == [
        "the device 'late=virtio-rng-pci' was plugged in since the VM was started"
    ]
    with pytest.raises(CommandFailed, match="'late=virtio-rng-pci' was plugged in"):
        stray.take()


def test_a_disk_below_a_filter_is_adopted_with_its_image(stray: ByHand) -> None:
    made(stray.folder / "two.raw")
    stray.start_by_hand("-drive", "file=two.raw,format=raw,if=virtio,id=slow,iops=9999")
    assert stray.adopt()["blockers"] == []
    snapshot = stray.take()
    stray.shell("stop small --now")
    stray.shell(f"restore small --id {snapshot}")


def test_a_cd_that_is_named_from_qemus_folder_is_the_same_cd_for_us(stray: ByHand) -> None:
    made(stray.folder / "cd.raw")
    stray.start_by_hand("-cdrom", "cd.raw")
    assert stray.adopt()["blockers"] == []
    snapshot = stray.take()
    stray.shell("stop small --now")
    stray.shell(f"restore small --id {snapshot}")
    stray.take()


@pytest.mark.parametrize("medium", ["other.raw", ""])
def test_a_cd_that_was_changed_by_hand_is_in_the_way(stray: ByHand, medium: str) -> None:
    made(stray.folder / "cd.raw")
    stray.start_by_hand("-cdrom", "cd.raw")
    if medium:
        path = made(stray.folder / medium)
        stray.qmp("blockdev-change-medium", device="ide2-cd0", filename=str(path))
    else:
        stray.qmp("eject", device="ide2-cd0", force=True)
    told = [each["problem"] for each in stray.adopt()["blockers"]]
    assert any("cd.raw' was taken out of" in problem for problem in told)
    assert any("other.raw' was put into" in problem for problem in told) == bool(medium)


def test_a_file_that_was_moved_away_from_under_it_is_noticed(stray: ByHand) -> None:
    stray.start_by_hand()
    (stray.folder / "zero.qcow2").rename(stray.folder / "moved.qcow2")
    refused(stray, "moved, replaced or removed", 6)
    made(stray.folder / "zero.qcow2")
    refused(stray, "is not the file that QEMU has open", 6)


# --- refused -------------------------------------------------------------------------------------


def test_a_monitor_in_use_is_refused_in_seconds_and_its_holder_named(stray: ByHand) -> None:
    stray.start_by_hand()
    with open_socket(stray.folder / "qmp.sock"):
        error = refused(stray, f"process {os.getpid()} is connected to it", 6)
        assert error["holders"] == [os.getpid()]
        waiting = fill(stray.folder / "qmp.sock")
        refused(stray, "gave no greeting", 6)
        for each in waiting:
            each.close()
    stray.adopt()


def fill(path: Path) -> list[socket.socket]:
    """Wait at a socket with as many as it has room for."""
    waiting = []
    with contextlib.suppress(BlockingIOError):
        while True:
            waiting.append(open_socket(path))
    return waiting


def test_what_is_no_monitor_is_refused(stray: ByHand) -> None:
    agent = (
        "-chardev",
        f"socket,id=a,{server('agent.sock').removeprefix('unix:').join(('path=', ''))}",
    )
    stray.start_by_hand(
        "-monitor", server("hmp.sock"), *agent, "-device", "virtio-serial",
        "-device", "virtserialport,chardev=a,name=org.qemu.guest_agent.0",
    )  # fmt: skip
    refused(stray, "says .QEMU .* monitor.*: it is no QMP monitor", 2, "hmp.sock")
    refused(stray, "says nothing, where a QMP monitor greets", 2, "agent.sock")
    refused(stray, "is no socket", 2, "zero.qcow2")
    refused(stray, "No such file or directory", 9, "nosuch.sock")
    refused(stray, "over TCP nobody can tell whose QEMU answers", 2, "localhost:4444")
    stray.end_by_hand()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stray.folder / "dead.sock"))
    refused(stray, "nobody listens", 7, "dead.sock")


def test_a_socket_of_another_program_is_refused(stray: ByHand) -> None:
    stray.store.mkdir()
    with socket.socket(socket.AF_UNIX) as ours:
        ours.bind(str(stray.folder / "ours.sock"))
        ours.listen()
        error = refused(stray, "which is no QEMU", 2, "ours.sock")
        assert error["pid"] == os.getpid()


MANAGED = {
    "libvirt": ("-name", "guest=vm1,debug-threads=on"),
    "Proxmox VE": ("-smbios", "type=1,serial=/run/qemu-server/100"),
    "Incus": ("-smbios", "type=1,serial=/var/lib/incus/x"),
    "Kata Containers": ("-name", f"sandbox-{'0a' * 32}"),
}


@pytest.mark.parametrize(("manager", "words"), MANAGED.items())
def test_what_belongs_to_a_manager_is_refused(
    stray: ByHand, manager: str, words: tuple[str, ...]
) -> None:
    stray.start_by_hand(*words)
    with open_socket(stray.folder / "qmp.sock"):  # as it would be held by its manager
        error = refused(stray, f"belongs to {manager}", 6)
    assert error["manager"] == manager


def test_a_path_of_a_managers_is_enough(stray: ByHand) -> None:
    (stray.folder / "var/lib/libvirt/qemu").mkdir(parents=True)
    stray.start_by_hand("-qmp", server("var/lib/libvirt/qemu/m.sock"))
    refused(stray, "belongs to libvirt", 6)


def test_a_socket_that_was_handed_to_qemu_is_qemus(stray: ByHand) -> None:
    """QEMU listens on it once more, so that the kernel tells of QEMU and not of who made it."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(stray.folder / "handed"))
        listening.listen()
        number = listening.fileno()
        chardev = f"socket,id=h,fd={number},server=on,wait=off"
        stray.start_by_hand("-chardev", chardev, "-mon", "h,mode=control", descriptors=(number,))
        told = stray.adopt("handed")
    assert told["pid"] == stray.hand.pid
    assert {"start", "restore"} < {limit["command"] for limit in told["limits"]}
    stray.take()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a namespace")
def test_a_qemu_with_other_paths_is_refused(stray: ByHand) -> None:
    stray.start_by_hand(argv=("unshare", "--mount", *stray.argv()))
    refused(stray, "in a container or a chroot: its paths name other files", 9)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be somebody else")
def test_a_qemu_of_another_user_is_limited() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are for one user alone
        vm = ByHand(Path(name), disks=("zero.qcow2",))
        vm.make_disks()
        for path in (vm.folder, vm.folder / "zero.qcow2"):
            os.chown(path, 65534, 65534)
        try:
            as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
            vm.start_by_hand(argv=(*as_nobody, *vm.argv()))
            said = vm.shell("adopt small --qmp qmp.sock")
            assert "does not work: start, restore: it was started by user 65534" in said
            vm.take("--machine-state", "none")
            vm.shell("stop small --now")
            assert "user 65534" in vm.shell("start small", expected=4)
        finally:
            vm.clean_up()


def test_what_is_in_a_store_already_is_refused(stray: ByHand) -> None:
    stray.run()
    stray.take()
    assert "is the VM 'small' already" in stray.shell("adopt other --qmp qmp.sock", expected=6)
    stray.end_by_hand()
    stray.shell("start small")
    control = stray.home / "control.sock"
    assert "the VM 'small' already" in stray.shell(f"adopt other --qmp {control}", expected=6)
    user_own = stray.folder / "qmp.sock"
    assert "the VM 'small' already" in stray.shell(f"adopt other --qmp {user_own}", expected=6)
    other_store = f"adopt other --qmp {user_own} --store elsewhere"
    assert "run by Calotype already" in stray.shell(other_store, expected=6)


def test_a_name_and_an_image_that_are_taken_are_refused(stray: ByHand) -> None:
    stray.run()
    stray.take()
    stray.shell("stop small --now")
    made(stray.folder / "other.raw")
    stray.start_by_hand(argv=stray.argv(disks=("other.raw",)))
    refused(stray, "the name 'small' is taken by a VM with another command line", 6)
    assert "cannot name a VM" in stray.shell("adopt '' --qmp qmp.sock", expected=2)
    stray.end_by_hand()
    base = stray.folder / "one.raw"
    subprocess.run(["chattr", "-i", base], check=False)
    base.chmod(0o600)
    stray.start_by_hand(argv=stray.argv(disks=("one.raw",)))
    said = stray.shell("adopt other --qmp qmp.sock", expected=6)
    assert "belongs to the VM 'small'; its newest content is in" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("-snapshot",), "-snapshot: the disks' writes would go to files that are gone"),
        (
            ("-drive", "file=two.raw,format=raw,if=virtio,snapshot=on"),
            "snapshot: the disk's writes would go to a file that is gone",
        ),
    ],
)
def test_disks_that_cannot_be_stood_for_are_refused(
    stray: ByHand, words: tuple[str, ...], reason: str
) -> None:
    made(stray.folder / "two.raw")
    stray.start_by_hand(*words)
    refused(stray, reason, 2)


# --- its user starts it anew ---------------------------------------------------------------------


def test_one_that_its_user_started_anew_is_told_and_bound_again(stray: ByHand) -> None:
    stray.run()
    stray.end_by_hand()
    assert stray.run_state() == "off"
    stray.start_by_hand()
    for line in ("take small", "start small"):
        said = stray.shell(line, expected=6)
        assert f"process {stray.hand.pid} answers at its monitor" in said
        assert "calotype adopt small --qmp" in said
    told = stray.adopt()
    assert told["is_new"] is False
    assert told["pid"] == stray.hand.pid
    stray.take()


def test_one_that_its_user_started_on_old_images_is_not_bound(stray: ByHand) -> None:
    stray.run()
    stray.take("--machine-state", "none")
    stray.end_by_hand()
    for disk in stray.disks:
        subprocess.run(["chattr", "-i", stray.folder / disk], check=False)
        (stray.folder / disk).chmod(0o600)
    stray.start_by_hand()
    refused(stray, "the newest content of that disk is in", 6)
    stray.end_by_hand()
    assert "runs" in stray.shell("start small")


def test_another_process_at_the_socket_is_never_taken_for_the_one_that_is_known(
    stray: ByHand,
) -> None:
    """The recorded QEMU lives, and its socket was taken over by another."""
    stray.run()
    first = stray.hand
    try:
        argv = stray.argv(disks=())
        stray.start_by_hand(argv=argv)
        with pytest.raises(CommandFailed, match="not the QEMU"):
            stray.take()
    finally:
        first.kill()
        first.wait()


# --- one monitor, and a guard --------------------------------------------------------------------


@pytest.fixture
def adopted(stray: ByHand) -> ByHand:
    """An adopted machine that was written to."""
    stray.run()
    stray.take("--machine-state", "none")
    stray.write(OLD, 1)
    return stray


def await_running(vm: ByHand) -> None:
    def runs() -> bool:
        return bool(vm.qmp("query-status")["running"])

    wait(runs, "the guest to run")
    time.sleep(0.3)
    assert runs(), "it was stopped again"


@pytest.mark.parametrize(
    ("deed", "command"),
    [
        *(("kill-self", command) for command in WINDOW),
        *(("stop-self", command) for command in ("stop", "transaction", "cont")),
    ],
)
def test_the_guest_runs_again_though_its_only_monitor_was_held_by_who_died(
    adopted: ByHand, command: str, deed: str
) -> None:
    before = picture(adopted)
    words = ("take", "small", "--pause-limit", "700")
    struck = adopted.struck(f"sent:{command}", deed, words)
    wait(lambda: struck.poll() is not None or is_stopped(struck.pid), "the deed")
    await_running(adopted)
    if deed == "stop-self":
        assert struck.poll() is None
        os.kill(struck.pid, signal.SIGCONT)
    _, said = struck.communicate(timeout=60)
    assert struck.returncode in ((-signal.SIGKILL,) if deed == "kill-self" else (0, 8)), said
    adopted.write(NEW, 2)
    adopted.calotype("recover", "small")
    now = picture(adopted)
    assert adopted.reads(OLD, 1)
    assert adopted.reads(NEW, 2)
    if struck.returncode:
        assert now == before
    else:
        assert now["snapshots"] != before["snapshots"]
    assert adopted.qmp("query-status")["running"]


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_who_was_held_up_finds_that_the_guard_has_ended_the_pause(adopted: ByHand) -> None:
    words = ("take", "small", "--pause-limit", "500")
    struck = adopted.struck("sent:migrate", "stop-self", words)
    wait(lambda: is_stopped(struck.pid), "the deed")
    await_running(adopted)
    os.kill(struck.pid, signal.SIGCONT)
    _, said = struck.communicate(timeout=60)
    assert struck.returncode == 8
    assert b"the pause reached its limit, and the guard has ended it" in said
    assert len(adopted.calotype("list")["vms"][0]["snapshots"]) == 1
    adopted.take()


def test_a_guard_that_is_killed_is_not_missed(adopted: ByHand) -> None:
    struck = adopted.struck("sent:transaction", "kill-guard", ("take", "small"))
    _, said = struck.communicate(timeout=60)
    assert struck.returncode == 0, said


@pytest.mark.parametrize("moment", ["done:5", "done:7", "done:9", "done:11"])
def test_what_was_cut_off_is_undone_over_its_users_socket(adopted: ByHand, moment: str) -> None:
    before = picture(adopted)
    adopted.killed_at(moment, ("take", "small"))
    adopted.write(NEW, 2)
    adopted.calotype("recover", "small")
    assert picture(adopted) == before
    assert adopted.reads(OLD, 1)
    assert adopted.reads(NEW, 2)


def test_what_was_cut_off_is_undone_though_it_was_killed_and_is_started_by_us(
    adopted: ByHand,
) -> None:
    adopted.killed_at("done:8", ("take", "small"))
    adopted.write(NEW, 2)
    adopted.hand.kill()
    adopted.hand.wait()
    adopted.calotype("start", "small")
    assert adopted.reads(OLD, 1)
    assert adopted.reads(NEW, 2)
    assert adopted.run_state() == "running"


def test_those_who_look_at_its_only_monitor_say_busy_and_are_not_in_the_way(
    adopted: ByHand,
) -> None:
    struck = adopted.struck("done:7", "stop-self", ("take", "small"))
    wait(lambda: is_stopped(struck.pid), "the deed")
    assert adopted.run_state() == "busy"
    os.kill(struck.pid, signal.SIGCONT)
    _, said = struck.communicate(timeout=60)
    assert struck.returncode == 0, said
    assert adopted.run_state() == "running"

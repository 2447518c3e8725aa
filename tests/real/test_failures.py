"""What fails leaves nothing behind, and a guest that runs on, on the images that it was on.

Each of these breaks a take or a restore in the middle, on a real QEMU, and compares all that could
have been left: block nodes, run state, capabilities, the directory and the catalogue.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calotype.store import images
from calotype.testing.machine import CommandFailed
from calotype.testing.witness_vm import WitnessVm

ROUNDS_PER_FLUSH = 16
"""How often the witness flushes its disks (witness.c)."""

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

Boot = Callable[..., WitnessVm]


def picture(vm: WitnessVm) -> dict[str, Any]:
    """All that a snapshot touches, as it is now."""
    nodes = vm.qmp("query-named-block-nodes", flat=True)
    parameters = vm.qmp("query-migrate-parameters")
    return {
        "nodes": sorted((node["drv"], node["file"], node["ro"]) for node in nodes),
        "jobs": vm.qmp("query-jobs"),
        "fdsets": vm.qmp("query-fdsets"),
        "run state": vm.qmp("query-status")["status"],
        "capabilities": vm.qmp("query-migrate-capabilities"),
        "bandwidth": parameters["max-bandwidth"],
        "files": vm.files(),
        "catalogue": vm.calotype("list"),
        "record": vm.calotype("show", vm.name),
        "inside": inside(vm.folder / "zero.qcow2"),
    }


def inside(path: Path) -> list[str]:
    return [entry.name for entry in images.read_metadata(path).snapshots]


def assert_undone(vm: WitnessVm, before: dict[str, Any]) -> None:
    assert picture(vm) == before
    mark = vm.console_size()
    testimony = vm.testimony(mark)
    assert testimony.is_consistent, testimony
    for path in vm.folder.glob("*.qcow2"):
        vm.check_image(path)


@pytest.fixture
def small_store(folder: Path) -> Iterator[Path]:
    """The store's folder, on a file system with room for one machine state and little more."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    store = folder / "store"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700M", "tmpfs", store], check=True)
    yield store
    subprocess.run(["umount", "-l", store], check=True)


# --- take ----------------------------------------------------------------------------------------


def test_a_pause_over_the_limit_is_given_up_and_the_guest_runs(boot: Boot) -> None:
    vm = boot(memory_mib=512, pool_mib=128)
    before = picture(vm)
    words = ("--pause-limit", "1", "--disk", "virtio0=internal")
    with pytest.raises(CommandFailed, match="limit of 1 ms; the guest runs as before") as failed:
        vm.calotype("take", vm.name, *words)
    assert failed.value.data["exit_code"] == 8
    assert_undone(vm, before)
    assert vm.calotype("take", vm.name)["pause_ms"] > 0


def test_a_save_that_is_cancelled_from_outside_undoes_the_disks_too(boot: Boot) -> None:
    vm = boot(memory_mib=512, pool_mib=256)
    before = picture(vm)
    taking = spawn(vm, "take", vm.name, "--disk", "virtio0=internal")
    await_status(vm, "active")
    vm.qmp("migrate_cancel")
    exit_code, said = ended(taking)
    assert exit_code == 7
    assert b"the save failed" in said
    assert_undone(vm, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_take_that_is_interrupted_is_undone(boot: Boot, number: signal.Signals) -> None:
    vm = boot(memory_mib=512, pool_mib=256)
    before = picture(vm)
    taking = spawn(vm, "take", vm.name)
    await_status(vm, "active")
    taking.send_signal(number)
    assert ended(taking)[0] == 130
    assert_undone(vm, before)


def test_a_store_without_room_is_a_blocker(small_store: Path, boot: Boot) -> None:
    vm = boot(memory_mib=512, pool_mib=256)
    (small_store / "filler").write_bytes(bytes(690 << 20))
    before = picture(vm)
    with pytest.raises(CommandFailed, match="are free in the store") as blocked:
        vm.calotype("take", vm.name)
    assert blocked.value.data["exit_code"] == 4
    assert picture(vm) == before


def test_a_store_that_fills_up_while_saving_undoes_the_take(small_store: Path, boot: Boot) -> None:
    vm = boot(memory_mib=512, pool_mib=256)
    before = picture(vm)
    taking = spawn(vm, "take", vm.name)
    await_status(vm, "active")
    room = shutil.disk_usage(small_store).used + (32 << 20)
    subprocess.run(["mount", "-o", f"remount,size={room}", small_store], check=True)
    exit_code, said = ended(taking)
    assert exit_code == 7, said
    assert_undone(vm, before)


def test_a_qemu_that_dies_while_saving_keeps_what_the_guest_wrote(boot: Boot) -> None:
    vm = boot(memory_mib=512, pool_mib=256)
    pid = vm.pid()
    assert pid is not None
    taking = spawn(vm, "take", vm.name)
    await_status(vm, "active")
    os.kill(pid, signal.SIGKILL)
    assert ended(taking)[0] == 7
    told = vm.ticks()[-1].n
    flushed = told - told % ROUNDS_PER_FLUSH  # later ones a QEMU that is killed may lose
    assert min(vm.newest("zero.qcow2"), vm.newest("one.raw")) >= flushed
    assert vm.calotype("list")["vms"][0]["snapshots"] == []
    mark = vm.console_size()
    vm.calotype("start", vm.name)
    vm.await_rounds(20, mark)


def spawn(vm: WitnessVm, *words: str) -> "subprocess.Popen[bytes]":
    """Start a command and do not wait for it."""
    return subprocess.Popen(
        [sys.executable, "-m", "calotype", *words],
        cwd=vm.folder,
        env={**os.environ, "CALOTYPE_STORE": str(vm.store)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def ended(command: "subprocess.Popen[bytes]") -> tuple[int, bytes]:
    """Wait for a command; its exit code, and what it said on standard error."""
    _, said = command.communicate(timeout=90)
    return command.returncode, said


def await_status(vm: WitnessVm, status: str) -> None:
    """Wait until the guest runs and the save under way is in *status*."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if vm.qmp("query-migrate").get("status") == status and vm.qmp("query-status")["running"]:
            return
    pytest.fail(f"the save never was {status}")


# --- blocked -------------------------------------------------------------------------------------


def test_what_is_in_the_way_is_named_and_nothing_is_changed(boot: Boot) -> None:
    vm = boot()
    extra = vm.folder / "extra.raw"
    extra.write_bytes(bytes(1 << 20))
    vm.qmp("blockdev-add", driver="raw", node_name="extra", file=_file(extra), read_only=False)
    vm.qmp("block-dirty-bitmap-add", node="extra", name="b0")
    before = picture(vm)
    with pytest.raises(CommandFailed) as blocked:
        vm.calotype("take", vm.name, "--disk", "virtio1=internal", "--disk", "nosuch=skip")
    assert blocked.value.data["exit_code"] == 4
    problems = " ".join(problem for problem, _ in blocked.value.data["error"]["blockers"])
    for words in ("'extra'", "'b0'", "holds no internal snapshots", "'nosuch'"):
        assert words in problems
    assert picture(vm) == before


def _file(path: Path) -> dict[str, str]:
    return {"driver": "file", "filename": str(path)}


def test_a_device_that_was_plugged_in_is_a_blocker(boot: Boot) -> None:
    machine = ("-machine", "q35", "-accel", "tcg", "-device", "qemu-xhci,id=usb")
    vm = boot(qemu=("qemu-system-x86_64", *machine))
    vm.qmp("device_add", driver="usb-tablet", id="late", bus="usb.0")
    with pytest.raises(CommandFailed, match="'late=usb-tablet' was plugged in") as blocked:
        vm.calotype("take", vm.name)
    assert blocked.value.data["exit_code"] == 4


def test_a_plan_changes_nothing(boot: Boot) -> None:
    vm = boot()
    before = picture(vm)
    plan = vm.calotype("take", vm.name, "--plan")["plan"]
    assert picture(vm) == before
    assert [disk["disk"] for disk in plan["disks"]] == ["virtio0", "virtio1"]
    assert plan["estimate"]["bytes"] > 16 << 20


def test_capabilities_that_another_has_set_are_put_back(boot: Boot) -> None:
    vm = boot()
    wanted = [{"capability": name, "state": True} for name in ("multifd", "mapped-ram")]
    vm.qmp("migrate-set-capabilities", capabilities=wanted)
    vm.qmp("migrate-set-parameters", max_bandwidth=12345678)
    before = picture(vm)
    for _ in range(5):  # set before QEMU has taken the save down, they make it crash
        vm.calotype("take", vm.name)
        after = picture(vm)
        assert after["capabilities"] == before["capabilities"]
        assert after["bandwidth"] == before["bandwidth"] == 12345678


# --- restore -------------------------------------------------------------------------------------


def test_a_state_that_cannot_be_loaded_undoes_the_restore(boot: Boot) -> None:
    vm = boot()
    snapshot = vm.calotype("take", vm.name)["id"]
    vm.await_rounds(20, vm.console_size())
    vm.kill()
    state = vm.state_file(snapshot)
    with state.open("r+b") as file:
        file.truncate(state.stat().st_size // 2)
    vm.believe(snapshot)
    before = (vm.files(), vm.calotype("list"), vm.calotype("show", vm.name))
    with pytest.raises(CommandFailed, match="cannot load the machine state") as failed:
        vm.calotype("restore", vm.name, "--id", snapshot)
    assert failed.value.data["exit_code"] == 7
    assert (vm.files(), vm.calotype("list"), vm.calotype("show", vm.name)) == before
    assert vm.pid() is None
    mark = vm.console_size()
    vm.calotype("start", vm.name)
    vm.await_rounds(20, mark)


def test_the_old_command_line_fails_loudly_even_for_root(boot: Boot) -> None:
    vm = boot()
    vm.calotype("take", vm.name)
    vm.kill()
    by_hand = subprocess.run(vm.argv(), cwd=vm.folder, capture_output=True, timeout=30, check=False)
    assert by_hand.returncode != 0
    assert b"zero.qcow2" in by_hand.stderr
    shown = vm.calotype("show", vm.name)["vm"]["disks"]
    assert [Path(disk["active"]["path"]).is_file() for disk in shown] == [True, True]
    assert json.dumps(shown).count(".qcow2.") >= 1

"""QEMU 7.2, Debian 12's own: the other order of the instant, and what such a QEMU forgets.

It lets the guest run by itself as soon as RAM is protected, so the disks come first. It leaves RAM
protected when a live save is cancelled or fails, so that the guest would stand still for ever: its
protection is taken off from outside. It has no `blockdev-set-active`, no `file:` and no mapped-ram.

The tools are those of 7.2 as well: they come first on PATH, as on the machine of one who uses it.
"""

import signal
from pathlib import Path
from typing import Any

import pytest

from calotype.guard import userfaultfds
from calotype.plan.window import State
from calotype.qemu import passing
from calotype.testing.machine import CommandFailed, Machine, wait
from calotype.testing.whole import picture
from calotype.testing.witness_vm import WitnessVm
from witnessing import (
    Boot,
    assert_caught,
    assert_consistent,
    assert_sound,
    broken_take,
    exit_code_at,
    restore,
    struck,
)

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("qemu_7_2"),
]

PAUSED = ("--method", "paused", "--pause-limit", "60000")
INSIDE = ("--disk", "virtio0=internal")
SLOW: dict[str, Any] = {"memory_mib": 512, "pool_mib": 160}
"""A guest whose save takes long enough for something to happen meanwhile."""


def settings(vm: WitnessVm) -> dict[str, Any]:
    """What a take must leave as it was."""
    kept = ("capabilities", "bandwidth", "jobs", "fdsets", "nodes", "run state")
    return {key: value for key, value in picture(vm).items() if key in kept}


# --- sound ---------------------------------------------------------------------------------------


def test_a_live_snapshot_is_taken_disks_first_and_is_consistent(boot: Boot) -> None:
    vm = boot()
    assert [vm.qmp("query-version")["qemu"][part] for part in ("major", "minor")] == [7, 2]
    plan = vm.calotype("take", vm.name, "--plan")["plan"]
    assert plan["method"] == "live-storage-first"
    assert plan["warnings"] == vm.calotype("take", vm.name, "--plan", *PAUSED)["plan"]["warnings"]
    before = settings(vm)
    first = vm.calotype("take", vm.name, "--tag", "one")
    told = vm.await_rounds(200, vm.console_size())
    assert settings(vm)["capabilities"] == before["capabilities"]
    assert settings(vm)["bandwidth"] == before["bandwidth"]
    assert settings(vm)["run state"] == "running"
    assert 0 < first["pause_ms"] < first["total_ms"]
    vm.kill()
    mark = vm.console_size()
    vm.calotype("restore", vm.name, "--tag", "one")
    assert_consistent(vm.testimony(mark))
    assert vm.ticks(mark)[0].n < told.n - 100
    second = vm.calotype("take", vm.name)
    assert second["parent"] == first["id"]
    assert_consistent(restore(vm, "--latest"))
    for path in vm.folder.glob("*.qcow2"):
        vm.check_image(path)


def test_a_guest_stands_still_while_it_is_saved_and_is_consistent(boot: Boot) -> None:
    vm = boot()
    first = vm.calotype("take", vm.name, *PAUSED, *INSIDE)["id"]
    vm.await_rounds(50, vm.console_size())
    assert settings(vm)["run state"] == "running"
    second = vm.calotype("take", vm.name, *PAUSED)["id"]
    for snapshot in (first, second):
        vm.await_rounds(50, vm.console_size())
        assert_consistent(restore(vm, "--id", snapshot))


def test_a_paused_vm_is_not_taken_live_but_its_disks_are(boot: Boot) -> None:
    vm = boot()
    vm.qmp("stop")
    before = settings(vm)
    for words in ((), PAUSED):
        with pytest.raises(CommandFailed, match="would let the paused guest run") as refused:
            vm.calotype("take", vm.name, *words)
        assert refused.value.data["exit_code"] == 4
    assert settings(vm) == before
    vm.calotype("take", vm.name, "--machine-state", "none", "--tag", "disks")
    assert vm.run_state() == "paused"
    vm.kill()
    mark = vm.console_size()
    vm.calotype("restore", vm.name, "--tag", "disks", "--run-state", "running")
    vm.await_rounds(20, mark)
    assert vm.testimony(mark).boots == 1


def test_disks_of_a_vm_that_was_migrated_away_are_not_taken(folder: Path) -> None:
    """Nothing would undo it: images become active again only when the guest runs."""
    vm = Machine(folder)
    vm.make_disks()
    vm.run()
    try:
        vm.qmp("migrate", uri="exec:cat >/dev/null")
        wait(lambda: vm.run_state() == "postmigrate", "the migration to end")
        with pytest.raises(CommandFailed, match="run state 'postmigrate'") as refused:
            vm.take("--machine-state", "none")
        assert refused.value.data["exit_code"] == 4
        vm.calotype("start", vm.name)
        vm.take("--machine-state", "none")
    finally:
        vm.clean_up()


def test_snapshots_are_deleted_under_a_guest_that_writes(boot: Boot) -> None:
    vm = boot()
    taken = [vm.calotype("take", vm.name, *words)["id"] for words in ((), INSIDE, ())]
    vm.await_rounds(30, vm.console_size())
    for snapshot in (taken[0], taken[2]):
        vm.calotype("delete", vm.name, "--id", snapshot)
    assert_sound(vm)
    assert_consistent(restore(vm, "--id", taken[1]))


# --- twin ----------------------------------------------------------------------------------------


def test_twin_storage_after_the_guest_was_let_run_is_caught(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of newer QEMU, on one that does not wait for us."""
    rows = {
        (State.DRAINING, "ok stop"): (State.STARTING, "migrate"),
        (State.WATCHING, "protected"): (State.WAITING, None),
        (State.WATCHING, "saved"): (State.WAITING, None),
        (State.WATCHING_RESUMED, "protected"): (State.WAITING_RESUMED, None),
        (State.WATCHING_RESUMED, "saved"): (State.WAITING_RESUMED, None),
        (State.WAITING_RESUMED, "tick"): (State.STORING, "transaction"),
        (State.STORING, "ok transaction"): (State.ACCEPTED, None),
    }
    monkeypatch.setattr(passing, "TICK_S", 0.1)
    vm = boot()
    assert_caught(vm, lambda: broken_take(vm, monkeypatch, rows, "live-storage-first"))


# --- what dies -----------------------------------------------------------------------------------


def test_a_take_is_killed_and_the_guest_runs_on(boot: Boot) -> None:
    vm = boot(**SLOW)
    before = settings(vm)
    for moment in ("sent:transaction", "sent:migrate", "doing:8"):
        assert exit_code_at(vm, moment, "kill-self", "take", vm.name, *INSIDE) == -signal.SIGKILL
        vm.calotype("recover", vm.name)
        assert settings(vm) == before
        assert_sound(vm)
    assert vm.calotype("list")["vms"][0]["snapshots"] == []
    snapshot = vm.calotype("take", vm.name, *INSIDE)["id"]
    assert_consistent(restore(vm, "--id", snapshot))


def test_a_save_that_is_cancelled_does_not_leave_the_guest_standing(boot: Boot) -> None:
    """Its threads are seen to wait for leave to write, before they are let go on."""
    vm = boot(**SLOW)
    before = settings(vm)
    pid = vm.pid()
    assert pid is not None
    assert userfaultfds(pid) == []
    taking = struck(vm, "doing:10", "stop-self", "take", vm.name)
    wait(lambda: is_stopped(taking.pid), "the command to stop")
    vm.qmp("migrate_cancel")
    wait(lambda: stands_still(pid), "the guest to stand still")
    taking.send_signal(signal.SIGCONT)
    taking.communicate(timeout=90)
    assert taking.returncode == 7
    assert settings(vm) == before
    assert_sound(vm)
    snapshot = vm.calotype("take", vm.name)["id"]
    assert_consistent(restore(vm, "--id", snapshot))


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def stands_still(pid: int) -> bool:
    """Whether a thread waits for somebody to let it write to its memory."""
    waits = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/wchan")]
    return "handle_userfault" in waits


# --- and then -----------------------------------------------------------------------------------


def test_a_snapshot_of_7_2_is_restored_by_the_newer_qemu(
    boot: Boot, monkeypatch: pytest.MonkeyPatch, path_before: str
) -> None:
    """What was taken before the system's QEMU was upgraded is still good afterwards."""
    vm = boot()
    snapshot = vm.calotype("take", vm.name)["id"]
    vm.await_rounds(50, vm.console_size())
    vm.kill()
    monkeypatch.setenv("PATH", path_before)
    mark = vm.console_size()
    vm.calotype("restore", vm.name, "--id", snapshot)
    assert vm.qmp("query-version")["qemu"]["major"] > 7
    assert_consistent(vm.testimony(mark))

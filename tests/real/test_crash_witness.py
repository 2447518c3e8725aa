"""After a crash the guest itself finds its RAM and its disks in agreement.

A dozen cells of the crash matrix with a Linux that writes to its disks all the time: what it wrote
before the crash, after it, and while `recover` merged its overlays back must all be there.
"""

import signal

import pytest

from witnessing import Boot, assert_sound, exit_code_at

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

KINDS = ("--disk", "virtio0=internal")


@pytest.mark.parametrize(
    "moments",
    [
        ("doing:7", "sent:stop", "sent:migrate", "sent:query-migrate"),
        ("sent:transaction", "sent:cont", "done:7", "doing:8"),
        ("done:8", "done:9", "done:10", "done:11"),
    ],
)
def test_a_take_is_killed_under_a_guest_that_writes(boot: Boot, moments: tuple[str, ...]) -> None:
    vm = boot()
    for moment in moments:
        assert exit_code_at(vm, moment, "kill-self", "take", vm.name, *KINDS) == -signal.SIGKILL
        vm.await_rounds(30, vm.console_size())
        vm.calotype("recover", vm.name)
        assert_sound(vm)
    assert vm.calotype("list")["vms"][0]["snapshots"] == []
    snapshot = vm.calotype("take", vm.name, *KINDS)["id"]
    vm.await_rounds(30, vm.console_size())
    vm.kill()
    vm.calotype("restore", vm.name, "--id", snapshot)
    assert_sound(vm)


@pytest.mark.parametrize("moment", ["sent:transaction", "done:8"])
def test_qemu_is_killed_under_a_guest_that_writes(boot: Boot, moment: str) -> None:
    """A guest that was killed boots again, on disks that hold the newest round that it told of."""
    vm = boot()
    assert exit_code_at(vm, moment, "kill-qemu", "take", vm.name, *KINDS) == 7
    told = vm.ticks()[-1].n
    vm.calotype("recover", vm.name)
    assert min(vm.newest("zero.qcow2"), vm.newest("one.raw")) >= told - 1
    mark = vm.console_size()
    vm.calotype("start", vm.name)
    vm.await_rounds(20, mark)
    assert sorted(path.name for path in vm.folder.glob("*.qcow2")) == ["zero.qcow2"]


@pytest.mark.parametrize("moment", ["done:4", "done:8"])
def test_a_restore_is_killed_and_the_guest_goes_on_either_way(boot: Boot, moment: str) -> None:
    vm = boot()
    snapshot = vm.calotype("take", vm.name)["id"]
    vm.await_rounds(50, vm.console_size())
    vm.kill()
    newest = vm.newest("one.raw")
    words = ("restore", vm.name, "--id", snapshot)
    assert exit_code_at(vm, moment, "kill-self", *words) == -signal.SIGKILL
    vm.calotype("recover", vm.name)
    if vm.pid() is None:
        assert vm.newest("one.raw") == newest
        vm.calotype(*words)
    assert_sound(vm)

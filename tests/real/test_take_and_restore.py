"""The main job on a real guest, and its twins: each breaks the order on purpose and is caught.

The witness compares its RAM with every disk in each round; `check` compares all of its RAM. A
restored witness that goes on without a complaint proves that RAM and disks are of one instant.
"""

import json
import re
from pathlib import Path

import msgspec
import pytest

from calotype.engine import changing
from calotype.engine.effects import EFFECTS
from calotype.engine.take_effects import Taking
from calotype.engine.world import Effect
from calotype.model.snapshot import Manifest
from calotype.plan import take as planning
from calotype.plan.steps import AwaitSave, Step
from calotype.plan.window import State
from calotype.qemu import passing
from calotype.testing.machine import CommandFailed
from calotype.testing.witness_vm import WitnessVm
from witnessing import (
    Boot,
    assert_caught,
    assert_consistent,
    assert_sound,
    broken_take,
    restore,
)

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

PAGE, CONTINUE = 0x08, 0x20


# --- sound ---------------------------------------------------------------------------------------


def test_a_live_snapshot_of_a_writing_guest_is_consistent(boot: Boot) -> None:
    vm = boot()
    before = vm.ticks()[-1]
    taken = vm.calotype("take", vm.name, "--tag", "one")
    after = vm.await_rounds(200, vm.console_size())
    vm.kill()
    mark = vm.console_size()
    vm.calotype("restore", vm.name, "--tag", "one")
    assert_consistent(vm.testimony(mark))
    first = vm.ticks(mark)[0]
    assert before.n <= first.n < after.n - 100
    assert taken["parts"] == {"virtio0": "external", "virtio1": "external"}
    assert 0 < taken["pause_ms"] < taken["total_ms"]
    assert taken["bytes"] > 16 << 20


def test_each_of_three_snapshots_is_restored_and_taken_from_again(boot: Boot) -> None:
    vm = boot()
    ids = []
    for _ in range(3):
        ids.append(vm.calotype("take", vm.name)["id"])
        vm.await_rounds(50, vm.console_size())
    assert_consistent(restore(vm, "--id", ids[0]))
    branch = vm.calotype("take", vm.name, "--tag", "branch")
    assert branch["parent"] == ids[0]
    assert_consistent(restore(vm, "--id", ids[2]))
    assert_consistent(restore(vm, "--tag", "branch"))
    assert_consistent(restore(vm, "--id", ids[1][:10]))
    for path in vm.folder.glob("*.qcow2"):
        vm.check_image(path)


def test_a_paused_snapshot_is_consistent(boot: Boot) -> None:
    vm = boot()
    taken = vm.calotype("take", vm.name, "--method", "paused", "--pause-limit", "60000")
    vm.await_rounds(50, vm.console_size())
    assert taken["pause_ms"] > 20
    assert_consistent(restore(vm, "--latest"))


@pytest.mark.parametrize("method", ["live", "paused"])
def test_internal_and_external_disks_are_mixed_in_one_snapshot(boot: Boot, method: str) -> None:
    vm = boot()
    words = ("--method", method, "--pause-limit", "60000", "--disk", "virtio0=internal")
    first = vm.calotype("take", vm.name, *words)
    assert first["parts"] == {"virtio0": "internal", "virtio1": "external"}
    vm.await_rounds(50, vm.console_size())
    later = vm.calotype("take", vm.name)
    vm.await_rounds(50, vm.console_size())
    assert_consistent(restore(vm, "--id", first["id"]))
    assert_consistent(restore(vm, "--id", later["id"]))
    assert_consistent(restore(vm, "--id", first["id"], "--discard-current"))


def test_a_disk_is_gone_back_in_where_its_image_is_still_the_active_one(boot: Boot) -> None:
    vm = boot(disks=("zero.qcow2", "one.qcow2"))
    kinds = ("--disk", "virtio0=internal", "--disk", "virtio1=internal")
    first = vm.calotype("take", vm.name, *kinds)["id"]
    vm.await_rounds(50, vm.console_size())
    second = vm.calotype("take", vm.name, *kinds)["id"]
    for snapshot in (first, second, first):
        assert_consistent(restore(vm, "--id", snapshot))
    assert sorted(path.name for path in vm.folder.glob("*.qcow2")) == ["one.qcow2", "zero.qcow2"]


def test_a_vm_that_is_paused_stays_paused_and_is_restored_paused(boot: Boot) -> None:
    vm = boot()
    vm.qmp("stop")
    vm.calotype("take", vm.name, "--tag", "still")
    assert vm.run_state() == "paused"
    vm.qmp("cont")
    vm.await_rounds(50, vm.console_size())
    vm.kill()
    mark = vm.console_size()
    restored = vm.calotype("restore", vm.name, "--tag", "still")
    assert restored["run_state"] == "paused"
    assert vm.run_state() == "paused"
    assert not vm.ticks(mark)
    vm.qmp("cont")
    assert_consistent(vm.testimony(mark))


def test_disks_alone_are_snapshotted_without_a_pause_and_boot_again(boot: Boot) -> None:
    vm = boot()
    taken = vm.calotype("take", vm.name, "--machine-state", "none", "--tag", "disks")
    assert taken["pause_ms"] is None
    assert taken["bytes"] == 0
    vm.kill()
    mark = vm.console_size()
    vm.calotype("restore", vm.name, "--tag", "disks")
    vm.await_rounds(20, mark)
    assert vm.testimony(mark).boots == 1


def test_what_a_restore_leaves_behind_can_be_gone_back_to(boot: Boot) -> None:
    vm = boot()
    vm.calotype("take", vm.name, "--tag", "one")
    vm.await_rounds(100, vm.console_size())
    vm.kill()
    newest = vm.newest("one.raw")
    undo = vm.calotype("restore", vm.name, "--tag", "one")["undo"]
    vm.await_rounds(20, vm.console_size())
    for words in undo[:-1]:
        vm.calotype(*words[1:])
    assert vm.calotype(*undo[-1][1:])["run_state"] == "off"
    assert vm.pid() is None
    assert vm.newest("one.raw") == newest


def test_a_guest_that_runs_goes_over_to_a_snapshot_and_back_to_what_it_left(boot: Boot) -> None:
    vm = boot()
    taken = vm.calotype("take", vm.name, "--tag", "one", "--disk", "virtio0=internal")
    assert taken["parts"] == {"virtio0": "internal", "virtio1": "external"}
    left = vm.await_rounds(100, vm.console_size())

    there = vm.calotype("restore", vm.name, "--tag", "one", "--keep-current")
    assert goes_on(vm) < left.n
    assert there["pause_ms"] > 0

    back = vm.calotype("restore", vm.name, "--id", there["left_behind"])
    assert goes_on(vm) > left.n
    assert back["pause_ms"] > 0
    assert_sound(vm)


def goes_on(vm: WitnessVm) -> int:
    """Let the guest testify from now on; the round that it is in."""
    mark = vm.console_size()
    first = vm.await_rounds(1, mark)
    assert_consistent(vm.testimony(mark))
    return first.n


# --- twins ---------------------------------------------------------------------------------------


def test_twin_storage_after_cont_is_caught(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        (State.WATCHING, "protected"): (State.RESUMING, "cont"),
        (State.RESUMED, "ok cont"): (State.WAITING_RESUMED, None),
        (State.WAITING_RESUMED, "tick"): (State.STORING, "transaction"),
        (State.STORING, "ok transaction"): (State.ACCEPTED, None),
    }
    monkeypatch.setattr(passing, "TICK_S", 0.03)
    vm = boot()
    assert_caught(vm, lambda: broken_take(vm, monkeypatch, rows))


def test_twin_cont_at_active_is_caught(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        (State.WATCHING, "unprotected"): (State.STORING, "transaction"),
        (State.RESUMED, "STOP"): (State.RESUMED, None),
        (State.RESUMED, "RESUME"): (State.RESUMED, None),
    }
    save = EFFECTS[AwaitSave]

    async def hurry(taking: Taking, step: AwaitSave) -> None:
        await taking.monitor.execute("migrate-set-parameters", max_bandwidth=1 << 40)
        await save.apply(taking, step)

    monkeypatch.setattr(planning, "_FAST_BYTES_PER_S", 1 << 20)
    effects: dict[type[Step], Effect] = {**EFFECTS, AwaitSave: Effect(hurry)}
    monkeypatch.setattr(changing, "EFFECTS", effects)
    vm = boot(memory_mib=512, pool_mib=256)
    assert_caught(vm, lambda: broken_take(vm, monkeypatch, rows))


def test_twin_a_disk_of_another_snapshot_is_caught(boot: Boot) -> None:
    vm = boot()
    first = vm.calotype("take", vm.name)["id"]
    vm.await_rounds(50, vm.console_size())
    second = vm.calotype("take", vm.name)["id"]
    vm.await_rounds(50, vm.console_size())
    theirs = vm.manifest(second).storage[1]
    ours = vm.manifest(first)
    forged = (ours.storage[0], msgspec.structs.replace(theirs, reason="forged"))
    vm.put_manifest(msgspec.structs.replace(ours, storage=forged))
    verdict = restore(vm, "--id", first)
    assert verdict.has_testified
    assert not verdict.is_consistent


def test_twin_a_flipped_byte_of_ram_is_caught_by_the_preflight_and_by_the_guest(boot: Boot) -> None:
    vm = boot()
    snapshot = vm.calotype("take", vm.name)["id"]
    flip_in_pool(vm.state_file(snapshot))
    vm.kill()
    with pytest.raises(CommandFailed, match="machine state: it was written") as refused:
        vm.calotype("restore", vm.name, "--id", snapshot)
    assert refused.value.data["exit_code"] == 5
    vm.believe(snapshot)
    mark = vm.console_size()
    vm.calotype("restore", vm.name, "--id", snapshot)
    verdict = vm.testimony(mark)
    assert verdict.has_testified
    assert not verdict.is_consistent


def flip_in_pool(state: Path) -> None:
    """Flip one byte in a page of the witness's pool, inside the migration stream.

    A page of the pool begins a page of RAM, so the header of one stands before it in the stream: an
    offset with flags in its low bits (migration/ram.c, save_page_header). Other copies of the magic
    lie within pages.
    """
    content = state.read_bytes()
    places = [found.start() for found in re.finditer(b"WITNPAGE", content)]
    flags = [int.from_bytes(content[place - 8 : place], "big") & 0xFFF for place in places]
    pages = [place for place, flag in zip(places, flags, strict=True) if flag == PAGE | CONTINUE]
    place = pages[len(pages) // 2] + 2000
    with state.open("r+b") as file:
        file.seek(place)
        file.write(bytes([content[place] ^ 0x10]))


def test_a_manifest_is_canonical_json(boot: Boot) -> None:
    vm = boot()
    snapshot = vm.calotype("take", vm.name, "--tag", "x y", "--description", "\u20ac")["id"]
    manifest = vm.manifest(snapshot)
    path = vm.store / "vms" / manifest.vm_id / "snapshots" / snapshot / "manifest.json"
    members = json.loads(path.read_bytes())
    assert members == json.loads(msgspec.json.encode(manifest))
    assert list(members) == sorted(members)
    assert members["format"] == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert (path.parent / "machine-state").stat().st_mode & 0o777 == 0o600
    assert isinstance(manifest, Manifest)

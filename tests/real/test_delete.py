"""A delete on real images and a real QEMU changes nothing that a snapshot or the guest reads.

On a machine without an operating system: patterns are written through QEMU while it runs, and with
qemu-io while it does not; what each snapshot holds is read with qemu-img before and after.
"""

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calotype.engine import deletion, launch, switching
from calotype.engine.effects import EFFECTS
from calotype.engine.world import World
from calotype.model.snapshot import Manifest
from calotype.model.vm import Image, VmRecord
from calotype.plan.delete import DeletePlan, DeleteRequest
from calotype.plan.steps import Step
from calotype.qemu import live_merge
from calotype.qemu.monitor import Monitor, connect
from calotype.store import images
from calotype.store.store import Store
from calotype.testing.machine import CommandFailed, Machine
from calotype.testing.witness_vm import WitnessVm

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

Boot = Callable[..., WitnessVm]
Contents = dict[str, list[str]]
INSIDE = ("--disk", "virtio0=internal")
DISKS_ONLY = ("--machine-state", "none")


class Vm(Machine):
    """A machine whose disks are written and read by the tests."""

    count = 0

    def write(self) -> None:
        """Write another pattern to each disk: by QEMU if it runs, else by qemu-io."""
        self.count += 1
        command = f"write -P {self.count % 255 + 1} {self.count % 40}M 192k"
        if self.pid() is not None:
            # flushed, or its newest tables are in QEMU's memory alone
            asyncio.run(self.write_live((command, "flush")))
            return
        for disk in self.active():
            tool = ["qemu-io", "-f", disk.format, "-c", command, disk.path]
            subprocess.run(tool, check=True, stdout=subprocess.DEVNULL)

    async def write_live(self, orders: tuple[str, ...]) -> None:
        async with connect(self.home / "query.sock") as monitor:
            for place in range(len(self.disks)):
                for order in orders:
                    line = {"command-line": f'qemu-io virtio{place} "{order}"'}
                    assert await monitor.send("human-monitor-command", line) == ""

    def pid(self) -> int | None:
        store = Store(self.store)
        qemu = launch.is_running(store, store.record(self.home.name))
        return qemu.pid if qemu else None

    def active(self) -> list[Image]:
        store = Store(self.store)
        return [disk.active for disk in store.record(self.home.name).disks]

    def snapshots(self) -> list[str]:
        return [entry.id for entry in Store(self.store).index.snapshots(self.home.name)]

    def contents(self) -> Contents:
        """What each snapshot holds, and what the guest reads, by digest."""
        store = Store(self.store)
        manifests = store.manifests(self.home.name)
        held = {manifest.id: self.parts(manifest) for manifest in manifests}
        return held | {"now": [self.digest(image) for image in self.active()]}

    def parts(self, manifest: Manifest) -> list[str]:
        return [
            self.digest(part.image, part.internal_name) for part in manifest.storage if part.image
        ]

    def digest(self, image: Image, inside: str = "") -> str:
        copy = self.folder / "copy"
        one = ("-l", f"snapshot.name={inside}") if inside else ()
        tool = ("qemu-img", "convert", "-U", "-f", image.format, "-O", "raw", *one)
        subprocess.run([*tool, image.path, copy], check=True)
        digest = images.digest(copy)
        copy.unlink()
        return digest

    def overlays(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.name.count(".") > 1)

    def delete(self, *ids: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
        """Delete, and see that what stays is what it was."""
        before = self.contents()
        chosen = [word for each in ids for word in ("--id", each)]
        told = self.calotype("delete", self.name, *chosen, *more)
        after = self.contents()
        assert after == {who: before[who] for who in before if who not in told["deleted"]}
        self.check()
        return told

    def check(self) -> None:
        """All images are sound; all but the active ones are frozen, and those are not."""
        active = {image.path for image in self.active()}
        for path in self.folder.iterdir():
            if path.suffix == ".qcow2":
                self.check_image(path)
            if path.suffix in (".qcow2", ".raw") and path.is_file():
                assert bool(path.stat().st_mode & 0o200) is (str(path) in active), path
        for snapshot in self.snapshots():
            manifest = self.manifest(snapshot)
            for part in manifest.storage:
                for layer in part.layers:
                    now = images.identify(Path(layer.path), layer.format)
                    assert now == layer.identity, layer.path

    def restore(self, snapshot: str, *words: str) -> None:
        self.calotype("restore", self.name, "--id", snapshot, *words)
        self.stop_if_runs()

    def stop_if_runs(self) -> None:
        if self.pid() is not None:
            self.stop()


@pytest.fixture(params=["running", "stopped"])
def vm(folder: Path, request: pytest.FixtureRequest) -> Iterator[Vm]:
    """Three snapshots of a machine with a qcow2 and a raw disk; it runs, or it does not."""
    vm = Vm(folder, disks=("zero.qcow2", "one.raw"))
    vm.make_disks()
    vm.run()
    for _ in range(3):
        vm.write()
        vm.take()
    vm.write()
    if request.param == "stopped":
        vm.stop()
    yield vm
    vm.clean_up()


@pytest.fixture
def plain(folder: Path) -> Iterator[Vm]:
    """A machine that runs, with two qcow2 disks and no snapshot."""
    vm = Vm(folder)
    vm.make_disks()
    vm.run()
    yield vm
    vm.clean_up()


# --- chains --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_snapshots_of_a_chain_are_deleted_in_any_order(vm: Vm, order: tuple[int, ...]) -> None:
    ids = vm.snapshots()
    for place in order:
        vm.delete(ids[place])
        vm.write()
    assert vm.overlays() == []
    assert [Path(image.path).name for image in vm.active()] == ["zero.qcow2", "one.raw"]
    assert [image.format for image in vm.active()] == ["qcow2", "raw"]
    vm.stop_if_runs()
    vm.calotype("start", vm.name)


def test_all_are_deleted_at_once_and_the_old_command_line_works_again(vm: Vm) -> None:
    newest = vm.contents()["now"]
    told = vm.delete(*vm.snapshots())
    assert told["left"] == []
    assert vm.overlays() == []
    assert vm.contents() == {"now": newest}
    assert list((vm.home / "snapshots").iterdir()) == []
    vm.stop_if_runs()
    by_hand = ["timeout", "1", *vm.argv()]
    assert subprocess.run(by_hand, cwd=vm.folder, check=False).returncode == 124
    assert vm.contents() == {"now": newest}


def test_what_is_left_of_three_is_restored_and_taken_from_again(vm: Vm) -> None:
    first, second, third = vm.snapshots()
    vm.delete(second)
    assert vm.manifest(third).parent == first
    vm.stop_if_runs()
    before = vm.contents()
    for snapshot in (first, third, first):
        vm.restore(snapshot)
        assert vm.contents()["now"] == before[snapshot]
    vm.calotype("start", vm.name)
    vm.write()
    vm.take()
    vm.delete(first, third)


def test_the_descendants_go_too_on_request(vm: Vm) -> None:
    first, second, third = vm.snapshots()
    told = vm.delete(second, more=("--children",))
    assert told["deleted"] == [second, third]
    assert vm.snapshots() == [first]
    assert vm.calotype("list")["vms"][0]["now"] == first


def test_a_dry_run_says_it_all_and_changes_nothing(vm: Vm) -> None:
    second = vm.snapshots()[1]
    before = (vm.picture(), vm.contents())
    plan = vm.calotype("delete", vm.name, "--id", second, "--dry-run")["plan"]
    assert (vm.picture(), vm.contents()) == before
    assert plan["snapshots"] == [second]
    assert [merge["direction"] for merge in plan["merges"]] == ["down", "down"]
    assert 0 < plan["freed_bytes"] <= plan["freed_limit_bytes"]


# --- branches ------------------------------------------------------------------------------------


def test_a_restored_branch_keeps_its_base_until_one_branch_is_left(vm: Vm) -> None:
    first, second, third = vm.snapshots()
    vm.stop_if_runs()
    vm.restore(first)
    vm.write()
    (left,) = (each for each in vm.snapshots() if each not in (first, second, third))
    told = vm.delete(first)
    assert {Path(each["path"]).name for each in told["left"]} == {"zero.qcow2", "one.raw"}
    vm.delete(third)
    vm.delete(left)
    vm.delete(second)
    assert vm.overlays() == []


def test_an_image_that_no_snapshot_knows_keeps_what_it_stands_on(vm: Vm) -> None:
    vm.stop_if_runs()
    ids = vm.snapshots()
    below = vm.manifest(ids[1]).storage[0].image
    assert below
    clone = vm.folder / "clone.qcow2"
    tool = ("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", below.path, "-F", "qcow2")
    subprocess.run([*tool, clone, "64M"], check=True)
    before = vm.digest(Image(str(clone), "qcow2"))
    told = vm.calotype("delete", vm.name, "--id", ids[1])
    assert "none of Calotype's" in told["left"][0]["reason"] or "2 images" in str(told["left"])
    assert vm.digest(Image(str(clone), "qcow2")) == before
    clone.unlink()
    told = vm.calotype("delete", vm.name, "--leftovers")
    assert told["left"] == []
    assert told["deleted"] == []


def test_a_base_of_small_branches_is_merged_up_into_each(vm: Vm) -> None:
    first, second, third = vm.snapshots()
    vm.stop_if_runs()
    vm.restore(second)
    vm.write()
    (left,) = (each for each in vm.snapshots() if each not in (first, second, third))
    plan = vm.calotype("delete", vm.name, "--id", second, "--dry-run")["plan"]
    assert {merge["direction"] for merge in plan["merges"]} == {"up"}
    assert vm.delete(second)["left"] == []
    vm.restore(third)
    vm.delete(left, first)


# --- inside --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_running", [True, False])
def test_a_snapshot_inside_is_deleted_by_its_id(plain: Vm, is_running: bool) -> None:
    ids = []
    for _ in range(3):
        plain.write()
        ids.append(plain.take(*INSIDE, "--disk", "virtio1=internal"))
    image = plain.active()[0]
    if not is_running:
        plain.stop()
    plain.delete(ids[1])
    assert len(images.read_metadata(Path(image.path)).snapshots) == 2
    plain.delete(ids[0], ids[2])
    assert images.read_metadata(Path(image.path)).snapshots == ()


def test_another_snapshot_with_the_id_as_its_name_stays(plain: Vm) -> None:
    snapshot = plain.take(*INSIDE)
    plain.stop()
    path = Path(plain.active()[0].path)
    subprocess.run(["qemu-img", "snapshot", "-c", "1", path], check=True)
    plain.calotype("delete", plain.name, "--id", snapshot)
    assert [entry.name for entry in images.read_metadata(path).snapshots] == ["1"]


def test_two_snapshots_of_one_name_inside_are_not_mistaken(plain: Vm) -> None:
    snapshot = plain.take(*INSIDE)
    name = plain.manifest(snapshot).storage[0].internal_name
    plain.stop()
    path = Path(plain.active()[0].path)
    subprocess.run(["qemu-img", "snapshot", "-c", name, path], check=True)
    with pytest.raises(CommandFailed, match="more than one snapshot called"):
        plain.calotype("delete", plain.name, "--id", snapshot)
    assert len(images.read_metadata(path).snapshots) == 2


def test_a_snapshot_inside_an_image_that_the_vm_stands_on_waits_until_it_is_off(
    plain: Vm,
) -> None:
    plain.write()
    inside = plain.take(*INSIDE)
    plain.write()
    outside = plain.take()
    with pytest.raises(CommandFailed, match="stop the VM first") as blocked:
        plain.calotype("delete", plain.name, "--id", inside)
    assert blocked.value.data["exit_code"] == 4
    assert plain.snapshots() == [inside, outside]
    told = plain.delete(inside, outside)
    assert told["left"] == []
    assert plain.overlays() == []
    assert images.read_metadata(Path(plain.active()[0].path)).snapshots == ()


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_a_copy_of_what_was_inside_gets_back_to_the_users_path(folder: Path, kind: str) -> None:
    vm = Vm(folder, disks=(f"zero.{kind}",))
    vm.make_disks()
    vm.run()
    try:
        vm.write()
        first = vm.take()
        vm.write()
        inside = vm.take(*INSIDE)
        vm.write()
        second = vm.take()
        vm.stop()
        vm.restore(inside)
        vm.write()
        (left,) = (each for each in vm.snapshots() if each not in (first, inside, second))
        newest = vm.contents()["now"]
        for snapshot in (first, inside, second, left):
            vm.delete(snapshot)
        assert vm.overlays() == []
        assert vm.active() == [Image(str(vm.folder / f"zero.{kind}"), kind)]  # type: ignore[arg-type]
        assert vm.contents() == {"now": newest}
    finally:
        vm.clean_up()


# --- refusals ------------------------------------------------------------------------------------


def test_an_image_that_was_written_is_named_and_nothing_is_changed(vm: Vm) -> None:
    vm.stop_if_runs()
    second = vm.snapshots()[1]
    image = vm.manifest(second).storage[0].image
    assert image
    images.thaw(Path(image.path), images.Frozen(0o644, immutable=True))
    tool = ("qemu-io", "-f", "qcow2", "-c", "write -P 99 0 64k", image.path)
    subprocess.run(tool, check=True, stdout=subprocess.DEVNULL)
    before = vm.picture()
    with pytest.raises(CommandFailed, match=r"it was written|has \d+ bytes instead") as refused:
        vm.calotype("delete", vm.name, "--id", second)
    assert refused.value.data["exit_code"] == 5
    assert image.path in refused.value.data["error"]["problem"]
    assert vm.picture() == before


def test_a_job_of_somebody_else_is_in_the_way(plain: Vm) -> None:
    plain.take()
    second = plain.take()
    target = plain.folder / "target"
    plain.write()
    plain.qmp("drive-mirror", job_id="theirs", device="virtio0", target=str(target), sync="full")
    with pytest.raises(CommandFailed, match="'theirs' is under way") as blocked:
        plain.calotype("delete", plain.name, "--id", second)
    assert blocked.value.data["exit_code"] == 4


# --- cut off -------------------------------------------------------------------------------------


class Cut(Exception):  # noqa: N818 - what a kill would do
    """The end of whoever carries out the steps."""


def carry_out(vm: Vm, steps: tuple[Step, ...]) -> None:
    """Carry out steps, by the QEMU that runs now."""
    store = Store(vm.store)
    record = store.record(vm.home.name)
    asyncio.run(apply(store, record, steps))


async def apply(store: Store, record: VmRecord, steps: tuple[Step, ...]) -> None:
    """Let steps have their effects, without a journal."""
    world = World(store, record)
    for step in steps:
        await EFFECTS[type(step)].apply(world, step)


def planned(vm: Vm, *snapshots: str) -> DeletePlan:
    request = DeleteRequest(frozenset(snapshots))
    return asyncio.run(deletion.delete_plan_only(Store(vm.store), vm.name, request))


def test_steps_are_done_again_after_a_cut_at_any_place(vm: Vm) -> None:
    ids = vm.snapshots()
    before = vm.contents()
    plan = planned(vm, *ids)
    for count in range(1, len(plan.steps) + 1):
        carry_out(vm, plan.steps[:count])
        assert vm.contents()["now"] == before["now"], plan.steps[count - 1]
        vm.write()
        before = vm.contents()
    carry_out(vm, plan.steps)
    assert vm.contents() == {"now": before["now"]}
    assert vm.overlays() == []
    vm.check()


@pytest.mark.parametrize("stage", ["ready", "stopped", "recorded", "completed"])
@pytest.mark.parametrize("dies", [False, True])
def test_a_switch_that_was_cut_off_is_finished(
    plain: Vm, monkeypatch: pytest.MonkeyPatch, stage: str, dies: bool
) -> None:
    plain.write()
    plain.take(*DISKS_ONLY)
    plain.write()
    newest = plain.contents()["now"]
    plan = planned(plain, *plain.snapshots())

    async def cut(world: World, monitor: Monitor, job: str, top: Image, base: Image) -> None:
        if stage != "ready":
            await monitor.execute("stop")
            await live_merge.caught_up(monitor, job)
        if stage in ("recorded", "completed"):
            switching.record_newest(world, base, {top, base})
        if stage == "completed":
            await monitor.execute("job-complete", id=job)
            await live_merge.reached(monitor, job, "concluded", lambda _: None)
        raise Cut

    with monkeypatch.context() as cutting:
        cutting.setattr(switching, "switch", cut)
        with pytest.raises(Cut):
            carry_out(plain, plan.steps)
    if dies:
        plain.kill()
        assert plain.contents()["now"] == newest
        plain.calotype("start", plain.name)
    assert plain.contents()["now"] == newest
    carry_out(plain, plan.steps)
    assert plain.contents() == {"now": newest}
    assert plain.overlays() == []
    assert plain.run_state() == "running"
    plain.check()


def test_a_switch_that_is_cancelled_is_seen_through_and_the_guest_runs(
    plain: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.write()
    plain.take(*DISKS_ONLY)
    plain.write()
    plan = planned(plain, *plain.snapshots())
    reached = live_merge.reached
    work: list[asyncio.Task[None]] = []

    async def cancelling(monitor: Monitor, job: str, wanted: str, told: Callable[..., None]) -> str:
        if wanted == "concluded":
            work[0].cancel()
        return await reached(monitor, job, wanted, told)

    async def cancelled() -> None:
        store = Store(plain.store)
        record = store.record(plain.home.name)
        work.append(asyncio.create_task(apply(store, record, plan.steps)))
        await work[0]

    with monkeypatch.context() as cutting:
        cutting.setattr(live_merge, "reached", cancelling)
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(cancelled())
    assert plain.run_state() == "running"
    plain.write()
    newest = plain.contents()["now"]
    carry_out(plain, plan.steps)
    assert plain.contents() == {"now": newest}
    assert plain.overlays() == []
    plain.check()


@pytest.mark.parametrize("is_running", [True, False])
def test_a_delete_whose_process_is_killed_is_finished_by_recover(
    plain: Vm, is_running: bool
) -> None:
    for place in range(9):
        if plain.pid() is None:
            plain.calotype("start", plain.name)
        plain.write()
        snapshot = plain.take(*DISKS_ONLY)
        plain.write()
        if not is_running:
            plain.stop()
        newest = plain.contents()["now"]
        words = ("delete", plain.name, "--id", snapshot)
        assert len(planned(plain, snapshot).steps) == 9
        assert killed(plain, f"{'done' if place % 2 else 'doing'}:{place}", words) == -9
        (told,) = plain.calotype("recover")["recovered"]
        assert (told["operation"], told["outcome"]) == ("delete", "finished")
        assert plain.contents() == {"now": newest}
        assert plain.overlays() == []
        assert plain.run_state() == ("running" if is_running else "off")
        plain.check()


def killed(vm: Vm, moment: str, words: tuple[str, ...]) -> int:
    """Run a command that is killed at a moment of it; its exit code."""
    return subprocess.run(
        [sys.executable, "-m", "calotype.testing.crash", moment, "kill-self", *words],
        cwd=vm.folder,
        env={**os.environ, "CALOTYPE_STORE": str(vm.store)},
        check=False,
    ).returncode


# --- lives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_life_of_takes_restores_and_deletes_keeps_every_content(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    vm = Vm(folder, disks=("zero.qcow2", "one.raw"))
    vm.make_disks()
    vm.run()
    try:
        for _ in range(14):
            live(vm, chance)
        vm.stop_if_runs()
        newest = vm.contents()["now"]
        for snapshot in chance.sample(vm.snapshots(), len(vm.snapshots())):
            vm.delete(snapshot)
        assert vm.overlays() == []
        assert vm.contents() == {"now": newest}
    finally:
        vm.clean_up()


def live(vm: Vm, chance: random.Random) -> None:
    """One thing that happens to a VM."""
    vm.write()
    snapshots = vm.snapshots()
    verb = chance.choice(["take", "take", "inside", "restore", "delete", "delete", "turn"])
    if verb in ("take", "inside") and vm.pid() is not None:
        vm.take(*DISKS_ONLY, *(INSIDE if verb == "inside" else ()))
    elif verb == "restore" and snapshots:
        vm.stop_if_runs()
        vm.restore(chance.choice(snapshots), *chance.choice([(), ("--discard-current",)]))
    elif verb == "delete" and snapshots:
        doomed = chance.sample(snapshots, chance.randint(1, min(3, len(snapshots))))
        if not planned(vm, *doomed).blockers:
            vm.delete(*doomed)
    elif vm.pid() is None:
        vm.calotype("start", vm.name)
    else:
        vm.stop()


# --- a guest that would notice -------------------------------------------------------------------


def test_the_middle_of_three_goes_while_the_guest_runs_and_the_others_stay_consistent(
    boot: Boot,
) -> None:
    vm = boot()
    ids = []
    for _ in range(3):
        ids.append(vm.calotype("take", vm.name)["id"])
        vm.await_rounds(50, vm.console_size())
    mark = vm.console_size()
    assert vm.calotype("delete", vm.name, "--id", ids[1])["left"] == []
    assert vm.testimony(mark).is_consistent
    for snapshot in (ids[0], ids[2]):
        vm.kill()
        mark = vm.console_size()
        vm.calotype("restore", vm.name, "--id", snapshot)
        verdict = vm.testimony(mark)
        assert verdict.is_consistent, verdict
        assert verdict.boots == 0
    mark = vm.console_size()
    words = [
        word for each in vm.calotype("list")["vms"][0]["snapshots"] for word in ("--id", each["id"])
    ]
    vm.calotype("delete", vm.name, *words)
    assert vm.testimony(mark).is_consistent
    assert [disk["active"] for disk in vm.calotype("show", vm.name)["vm"]["disks"]] == [
        disk["origin"] for disk in vm.calotype("show", vm.name)["vm"]["disks"]
    ]
    for path in vm.folder.glob("*.qcow2"):
        vm.check_image(path)


# --- images that something else stands on --------------------------------------------------------


def test_an_image_that_another_vm_stands_on_is_left_alone(plain: Vm) -> None:
    plain.write()
    snapshot = plain.take(*DISKS_ONLY)
    plain.write()
    (plain.folder / "elsewhere").mkdir()
    other, kept = plain.folder / "elsewhere" / "other.qcow2", plain.folder / "kept.raw"
    backing = ("-b", str(plain.folder / "zero.qcow2"), "-F", "qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, other], check=True)
    subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", other, kept], check=True)
    plain.calotype("run", "other", "--", *plain.argv(disks=(str(other),)))
    plain.calotype("stop", "other", "--now")
    plain.calotype("delete", plain.name, "--id", snapshot)
    compared: list[str | Path] = [
        "qemu-img",
        "compare",
        "-q",
        "-U",
        "-f",
        "qcow2",
        "-F",
        "raw",
        other,
        kept,
    ]
    subprocess.run(compared, check=True)
    plain.calotype("stop", plain.name, "--now")


def test_the_newest_image_of_a_disk_that_was_set_aside_is_left_alone(plain: Vm) -> None:
    plain.write()
    first = plain.take(*DISKS_ONLY)
    plain.write()
    inside = ("--disk", "virtio1=internal", "--disk", "virtio0=skip")
    second = plain.take(*DISKS_ONLY, *inside)
    plain.write()
    plain.stop()
    newest = Path(plain.active()[1].path)
    plain.define(disks=("zero.qcow2",))
    plain.calotype("delete", plain.name, "--id", first, "--id", second)
    assert newest.exists()
    plain.define()
    assert plain.active()[1].path == str(newest)

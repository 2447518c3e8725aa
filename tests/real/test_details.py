"""What nobody sees until it is missing: each was taken out once, and no other test noticed."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blake3 import blake3

from calotype.qemu import process
from calotype.qemu.monitor import connect
from calotype.store import images
from calotype.testing.machine import CommandFailed, Machine
from calotype.testing.whole import picture
from crashing import OLD, Subject

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]


def held_at(
    vm: Subject, moment: str, *words: str
) -> "tuple[subprocess.Popen[bytes], socket.socket]":
    """Run a command and hold it at a moment; it goes on when the socket is written to."""
    ours, theirs = socket.socketpair()
    asking = theirs.fileno()
    struck = vm.struck(moment, f"ask:{asking}", words, descriptors=[asking])
    theirs.close()
    assert ours.recv(1) == b"?"
    return struck, ours


# --- take ----------------------------------------------------------------------------------------


def test_disks_that_change_while_a_snapshot_is_prepared_end_it(subject: Subject) -> None:
    before = picture(subject)
    extra = subject.folder / "extra.raw"
    extra.write_bytes(bytes(1 << 20))
    struck, line = held_at(subject, "doing:11", "take", "small")
    subject.qmp(
        "blockdev-add", driver="raw", node_name="extra", read_only=True,
        file={"driver": "file", "filename": str(extra)},
    )  # fmt: skip
    with line:
        line.sendall(b"!")
        _, said = struck.communicate(timeout=60)
    assert struck.returncode == 6, said
    assert b"disks changed" in said
    subject.qmp("blockdev-del", node_name="extra")
    extra.unlink()
    assert picture(subject) == before


async def test_the_instant_is_when_qemu_stopped_the_guest(subject: Subject) -> None:
    said: list[Any] = []
    async with connect(subject.home / "query.sock") as monitor:
        with monitor.tapped(said.append):
            await asyncio.to_thread(subject.take)
    (stop,) = [each["timestamp"] for each in said if each.get("event") == "STOP"]
    at_us = stop["seconds"] * 1_000_000 + stop["microseconds"]
    (entry,) = subject.calotype("list")["vms"][0]["snapshots"]
    assert entry["instant"] == datetime.fromtimestamp(at_us / 1e6, UTC).isoformat()


def test_the_digest_is_that_of_the_state(subject: Subject) -> None:
    snapshot = subject.take()
    state = subject.manifest(snapshot).machine_state
    assert state is not None
    content = subject.state_file(snapshot).read_bytes()
    assert state.digest == blake3(content).hexdigest()
    assert state.identity.size_bytes == len(content)
    assert content.startswith(b"QEVM")


def test_memory_on_a_disk_is_in_the_way_of_a_live_snapshot(folder: Path) -> None:
    backing = folder / "ram"
    vm = Machine(folder)
    vm.make_disks()
    memory = f"memory-backend-file,id=ram,size=64M,share=on,mem-path={backing}"
    vm.calotype(
        "run", "small", "--", *vm.argv(more=("-object", memory, "-M", "memory-backend=ram"))
    )
    try:
        with pytest.raises(CommandFailed, match="memory backend 'ram'") as blocked:
            vm.take()
        assert blocked.value.data["exit_code"] == 4
    finally:
        vm.clean_up()


def test_a_disk_that_keeps_its_data_elsewhere_is_in_the_way(folder: Path) -> None:
    vm = Machine(folder, disks=("zero.qcow2",))
    tool = ("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data.raw")
    subprocess.run([*tool, "zero.qcow2", "64M"], cwd=folder, check=True)
    vm.run()
    try:
        with pytest.raises(CommandFailed, match="keeps data in another file"):
            vm.take()
    finally:
        vm.clean_up()


def test_a_vm_that_never_ran_is_in_the_way_of_its_state_and_not_of_its_disks(folder: Path) -> None:
    vm = Machine(folder)
    vm.make_disks()
    vm.calotype("run", "small", "--", *vm.argv(more=("-S",)))
    try:
        with pytest.raises(CommandFailed, match="run state 'prelaunch'") as blocked:
            vm.take()
        assert blocked.value.data["exit_code"] == 4
        vm.take("--machine-state", "none")
        assert vm.run_state() == "prelaunch"
        vm.calotype("start", "small")
        assert vm.run_state() == "running"
        vm.take()
        with pytest.raises(CommandFailed, match="runs already"):
            vm.calotype("start", "small")
    finally:
        vm.clean_up()


def test_a_vm_that_is_paused_can_be_taken_again_and_again(subject: Subject) -> None:
    subject.qmp("stop")
    for words in ([], ["--method", "paused"], ["--method", "live"]):
        subject.take(*words)
        assert subject.run_state() == "paused"
    subject.calotype("start", "small")
    assert subject.run_state() == "running"


def test_a_vm_that_is_paused_while_a_take_prepares_stays_paused(subject: Subject) -> None:
    struck, line = held_at(subject, "doing:10", "take", "small")
    subject.qmp("stop")
    with line:
        line.sendall(b"!")
        _, said = struck.communicate(timeout=60)
    assert struck.returncode == 7, said
    assert subject.run_state() == "paused"


# --- restore -------------------------------------------------------------------------------------


def test_another_machine_than_the_snapshot_s_is_refused_before_its_state_is_loaded(
    subject: Subject,
) -> None:
    snapshot = subject.take()
    manifest = subject.manifest(snapshot)
    assert manifest.topology is not None
    other = msgspec.structs.replace(manifest.topology, memory_bytes=1 << 30)
    subject.put_manifest(msgspec.structs.replace(manifest, topology=other))
    subject.stop()
    before = picture(subject)
    with pytest.raises(CommandFailed, match="memory_bytes") as refused:
        subject.calotype("restore", "small", "--id", snapshot)
    assert refused.value.data["exit_code"] == 5
    assert picture(subject) == before


def test_what_is_left_behind_is_frozen_and_what_is_discarded_is_gone(subject: Subject) -> None:
    subject.write(OLD, 1)
    snapshot = subject.take()
    subject.stop()
    subject.calotype("restore", "small", "--id", snapshot)
    left = [path for path in subject.folder.glob("*.qcow2") if snapshot in path.name]
    assert len(left) == 3
    for path in left:
        assert not images.before_freeze(path).immutable, "it is not immutable"
        assert path.stat().st_mode & 0o222 == 0
    subject.stop()
    present = set(subject.folder.glob("*.qcow2"))
    subject.calotype("restore", "small", "--id", snapshot, "--discard-current")
    gone = present - set(subject.folder.glob("*.qcow2"))
    assert len(gone) == 3
    assert not gone & set(left)


def test_going_back_to_what_was_left_behind_keeps_a_disk_s_new_size(subject: Subject) -> None:
    first = subject.take()
    subject.qmp("block_resize", device="virtio0", size=128 << 20)
    subject.take()
    subject.stop()
    undo = subject.calotype("restore", "small", "--id", first)["undo"]
    for words in undo:
        subject.calotype(*words[1:])
    active = subject.calotype("show", "small")["vm"]["disks"][0]["active"]["path"]
    assert images.read_metadata(Path(active)).header.virtual_size_bytes == 128 << 20


def test_read_only_storage_is_compared_too(folder: Path) -> None:
    vm = Machine(folder)
    vm.make_disks()
    disc = folder / "disc.raw"
    disc.write_bytes(bytes(1 << 20))
    drive = f"file={disc},format=raw,readonly=on,if=none,id=disc"
    vm.calotype(
        "run", "small", "--", *vm.argv(more=("-drive", drive, "-device", "virtio-blk,drive=disc"))
    )
    try:
        snapshot = vm.take()
        (noted,) = vm.manifest(snapshot).read_only
        assert noted.path == str(disc)
        vm.stop()
        shutil.copy(disc, folder / "copy")
        (folder / "copy").replace(disc)
        with pytest.raises(CommandFailed, match="it is another file") as refused:
            vm.calotype("restore", "small", "--id", snapshot)
        assert refused.value.data["exit_code"] == 5
        disc.unlink()
        with pytest.raises(CommandFailed, match="is missing") as refused:
            vm.calotype("restore", "small", "--id", snapshot)
        assert refused.value.data["exit_code"] == 5
    finally:
        vm.clean_up()


def test_an_image_that_is_no_qcow2_any_more_is_told_as_replaced(subject: Subject) -> None:
    snapshot = subject.take()
    subject.stop()
    base = subject.folder / "zero.qcow2"
    images.thaw(base, images.Frozen(0o644, immutable=True))
    base.write_bytes(b"this is no image")
    with pytest.raises(CommandFailed, match=r"zero\.qcow2") as refused:
        subject.calotype("restore", "small", "--id", snapshot)
    assert refused.value.data["exit_code"] == 5
    assert refused.value.data["error"]["mismatches"]


# --- run, start, stop ----------------------------------------------------------------------------


def test_a_disk_that_a_command_line_leaves_out_comes_back_with_its_newest_content(
    subject: Subject,
) -> None:
    subject.write(OLD, 1)
    snapshot = subject.take()
    subject.stop()
    subject.define(disks=("one.qcow2",))
    with pytest.raises(CommandFailed, match="missing from the VM"):
        subject.calotype("restore", "small", "--id", snapshot)
    subject.define()
    assert subject.reads(OLD, 1)
    subject.calotype("restore", "small", "--id", snapshot)
    assert subject.run_state() == "running"


def test_no_vm_may_write_to_what_a_snapshot_stands_on(subject: Subject, tmp_path: Path) -> None:
    subject.take()
    subject.take()
    layers = [path for path in subject.folder.glob("zero*") if not os.access(path, os.X_OK)]
    for layer in layers:
        drive = f"file={layer},format=qcow2,if=virtio"
        with pytest.raises(CommandFailed, match="cannot be written to") as refused:
            subject.calotype(
                "run", "other", "--", *Machine(tmp_path).argv(disks=()), "-drive", drive
            )
        assert refused.value.data["exit_code"] == 6


@pytest.mark.parametrize("how", ["replaced", "moved", "another format"])
@pytest.mark.parametrize("name", ["zero.qcow2", "one.qcow2"])
def test_an_image_that_is_another_under_qemu_is_refused(
    subject: Subject, name: str, how: str
) -> None:
    subject.write(OLD, 1)
    image = subject.folder / name
    before = picture(subject)
    image.rename(image.with_suffix(".away"))
    if how == "replaced":
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    elif how == "another format":
        image.write_bytes(bytes(1 << 20))
    for words in (["--plan"], [], ["--disk", "virtio1=internal"]):
        with pytest.raises(CommandFailed, match="is not the file that QEMU has open") as refused:
            subject.calotype("take", "small", *words)
        assert refused.value.data["exit_code"] == 6
    image.with_suffix(".away").rename(image)
    assert picture(subject) == before
    assert subject.reads(OLD, 1)
    subject.take()


def test_definitions_of_one_name_at_once_make_one_vm(folder: Path) -> None:
    vm = Machine(folder)
    vm.make_disks()
    command = [*vm.argv(disks=()), "-S"]
    environment = {**os.environ, "CALOTYPE_STORE": str(vm.store)}
    tool = Path(sys.executable).parent / "calotype"
    racing = [
        subprocess.Popen([tool, "run", "small", "--", *command], env=environment, cwd=folder,
                         stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(4)
    ]  # fmt: skip
    codes = sorted(each.wait(60) for each in racing)
    try:
        assert codes == [0, 6, 6, 6]
        assert len(list((vm.store / "vms").iterdir())) == 1
        assert len(process.find("CALOTYPE_VM", vm.home.name)) == 1
    finally:
        vm.clean_up()


def test_a_store_without_room_for_the_process_leaves_no_qemu(subject: Subject) -> None:
    subject.stop()
    struck = subject.struck("done:0", "ENOSPC", ("start", "small"))
    struck.communicate(timeout=60)
    assert struck.returncode == 9
    assert process.find("CALOTYPE_VM", subject.home.name) == []


def test_stop_now_lets_qemu_write_what_it_holds(subject: Subject) -> None:
    for place in range(3):
        line = f'qemu-io virtio{place} "write -P {OLD} 1M 64k"'
        subject.qmp("human-monitor-command", command_line=line)
    subject.stop()
    assert subject.reads(OLD, 1)


def test_what_is_ours_is_for_us_alone(subject: Subject) -> None:
    subject.take()
    open_to_others = [
        str(path) for path in subject.store.rglob("*") if path.lstat().st_mode & 0o077
    ]
    assert open_to_others == []
    assert json.loads((subject.home / "process.json").read_text())["pid"]

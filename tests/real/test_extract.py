"""What is extracted is what the guest had, while it runs and while it does not; or nothing is left.

On a machine without an operating system, whose disks QEMU itself is told to write. What a disk held
is built by the test, byte for byte, and compared by qemu-img.
"""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calotype.store import images
from calotype.testing.machine import CommandFailed, wait
from calotype.testing.whole import picture
from crashing import Subject

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

MIB = 1 << 20
INSIDE = ("--disk", "virtio1=internal", "--machine-state", "none")


class Vm(Subject):
    """A qcow2 over a backing file with a relative name, a qcow2 with snapshots inside, a raw."""

    def make_disks(self) -> None:
        create = ("qemu-img", "create", "-q", "-f", "qcow2")
        for words in (
            (*create, "base.qcow2", "64M"),
            ("qemu-io", "-f", "qcow2", "-c", "write -P 7 9M 64k", "base.qcow2"),
            (*create, "-b", "base.qcow2", "-F", "qcow2", "zero.qcow2"),
            (*create, "one.qcow2", "64M"),
            ("qemu-img", "create", "-q", "-f", "raw", "two.raw", "64M"),
        ):
            subprocess.run(words, cwd=self.folder, check=True, stdout=subprocess.DEVNULL)

    def extract(self, disk: str, output: str, *words: str) -> Path:
        told = self.calotype("extract", self.name, *words, disk, "-o", output)
        assert told["path"] == str(self.folder / output)
        return Path(told["path"])

    def expected(self, disk: str, *writes: tuple[int, int]) -> Path:
        """What a disk holds after *writes* of 64 KiB: a pattern, and the MiB that it is at."""
        image = self.folder / "expected"
        with image.open("wb") as file:
            file.truncate(64 * MIB)
            for pattern, at in (*([(7, 9)] if disk == "virtio0" else []), *writes):
                file.seek(at * MIB)
                file.write(bytes([pattern]) * 65536)
        return image

    def has(self, image: Path, disk: str, *writes: tuple[int, int]) -> bool:
        format_: Any = "raw" if image.suffix == ".raw" else "qcow2"
        assert images.identify(image, format_).virtual_size_bytes == 64 * MIB
        tool = ("qemu-img", "compare", "-q", "-U", "-f", format_, "-F", "raw")
        done = subprocess.run([*tool, image, self.expected(disk, *writes)], check=False)
        return done.returncode == 0

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.name.startswith("."))


@pytest.fixture
def vm(folder: Path) -> Iterator[Vm]:
    vm = Vm(folder, disks=("zero.qcow2", "one.qcow2", "two.raw"))
    vm.make_disks()
    vm.run()
    yield vm
    vm.clean_up()


def test_each_disk_is_what_the_guest_had(vm: Vm) -> None:
    vm.write(1, 1)
    first = vm.take(*INSIDE)
    vm.write(2, 2)
    second = vm.take("--tag", "two", *INSIDE)
    vm.write(3, 1)
    had = {first: ((1, 1),), second: ((1, 1), (2, 2))}
    before = picture(vm)
    for disk in ("virtio0", "virtio1", "virtio2"):
        for number, (snapshot, writes) in enumerate(had.items()):
            copy = vm.extract(disk, f"{disk}-{number}.qcow2", "--id", snapshot)
            assert vm.has(copy, disk, *writes), (disk, number)
            assert stat.S_IMODE(copy.stat().st_mode) == 0o600
            told = subprocess.run(["qemu-img", "info", copy], check=True, capture_output=True)
            assert b"backing file" not in told.stdout
            vm.check_image(copy)
            copy.unlink()
    raw = vm.extract("virtio1", "copy.raw", "--tag", "two", "--format", "raw")
    assert raw.stat().st_size == 64 * MIB
    assert vm.has(raw, "virtio1", (1, 1), (2, 2))
    raw.unlink()
    vm.expected("virtio0").unlink()
    assert picture(vm) == before
    vm.stop()
    assert vm.has(vm.extract("virtio0", "off.qcow2", "--latest"), "virtio0", (1, 1), (2, 2))
    assert vm.has(vm.extract("virtio1", "inside.qcow2", "--latest"), "virtio1", (1, 1), (2, 2))
    assert vm.leftovers() == []


def test_a_disk_that_has_grown_since_is_extracted_with_the_size_that_it_had(vm: Vm) -> None:
    vm.write(1, 1)
    vm.take(*INSIDE)
    vm.qmp("block_resize", device="virtio1", size=96 * MIB)
    copy = vm.extract("virtio1", "copy.qcow2", "--latest")
    assert vm.has(copy, "virtio1", (1, 1))


def test_the_paths_that_are_shown_hold_what_the_guest_had(vm: Vm) -> None:
    vm.write(1, 1)
    snapshot = vm.take("--disk", "virtio1=internal", "--disk", "virtio2=skip")
    vm.write(2, 1)
    paths = vm.calotype("show", vm.name, "--id", snapshot, "--paths")["paths"]
    zero, one, two = paths["disks"]
    assert [image["path"] for image in zero["chain"]] == [
        str(vm.folder / "zero.qcow2"), str(vm.folder / "base.qcow2"),
    ]  # fmt: skip
    assert vm.has(Path(zero["chain"][0]["path"]), "virtio0", (1, 1))
    assert [image["path"] for image in one["chain"]] == [str(vm.folder / "one.qcow2")]
    copy = vm.folder / "copy.qcow2"
    tool = ("qemu-img", "convert", "-U", "-O", "qcow2", "-l", one["internal_id"])
    subprocess.run([*tool, one["chain"][0]["path"], copy], check=True)
    assert vm.has(copy, "virtio1", (1, 1))
    assert (two["kind"], two["chain"]) == ("skip", [])
    assert paths["machine_state"] == str(vm.state_file(snapshot))


def test_what_is_there_is_never_overwritten(vm: Vm) -> None:
    vm.take(*INSIDE)
    there = vm.folder / "there.qcow2"
    there.write_text("mine")
    (vm.folder / "link").symlink_to(vm.folder / "nowhere")
    before = sorted(vm.folder.iterdir())
    for output in ("there.qcow2", "link", "zero.qcow2", ".", "nosuch/copy.qcow2"):
        with pytest.raises(CommandFailed) as refused:
            vm.extract("virtio0", output, "--latest")
        assert refused.value.data["exit_code"] == 9
    assert there.read_text() == "mine"
    assert sorted(vm.folder.iterdir()) == before


def test_what_was_put_there_meanwhile_is_not_overwritten(vm: Vm) -> None:
    vm.take(*INSIDE)
    extracting = _slowed(vm)
    there = vm.folder / "copy.qcow2"
    there.write_text("mine")
    _, said = _went_on(extracting)
    assert extracting.returncode == 9, said
    assert there.read_text() == "mine"
    assert vm.leftovers() == []


def test_ctrl_c_leaves_nothing(vm: Vm) -> None:
    vm.take(*INSIDE)
    before = picture(vm)
    for number in (signal.SIGINT, signal.SIGTERM):
        extracting = _slowed(vm)
        assert len(vm.leftovers()) == 1
        os.killpg(extracting.pid, number)
        _, said = extracting.communicate(timeout=30)
        assert extracting.returncode == 130, said
        assert b"nothing is left" in said
        assert vm.leftovers() == []
    assert picture(vm) == before


def test_a_snapshot_that_is_deleted_while_it_is_read_leaves_nothing(vm: Vm) -> None:
    vm.write(1, 1)
    first = vm.take(*INSIDE)
    vm.take(*INSIDE)
    extracting = _slowed(vm, "--id", first)
    vm.calotype("delete", vm.name, "--id", first)
    _, said = _went_on(extracting)
    assert extracting.returncode == 6, said
    assert not (vm.folder / "copy.qcow2").exists()
    assert vm.leftovers() == []


def test_a_full_disk_leaves_nothing(vm: Vm, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for at in range(1, 40):
            vm.write(at, at)
        vm.take(*INSIDE)
        for disk in ("virtio0", "virtio1"):
            with pytest.raises(CommandFailed, match="No space") as full:
                vm.extract(disk, "small/copy.qcow2", "--latest")
            assert full.value.data["exit_code"] == 9
            assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_what_is_not_what_was_recorded_is_not_extracted(vm: Vm) -> None:
    vm.take(*INSIDE)
    image = vm.folder / "zero.qcow2"
    subprocess.run(["chattr", "-i", image], check=True)
    with pytest.raises(CommandFailed, match="accept-touched") as touched:
        vm.extract("virtio0", "copy.qcow2", "--latest")
    assert touched.value.data["exit_code"] == 5
    copy = vm.extract("virtio0", "copy.qcow2", "--latest", "--accept-touched")
    assert vm.has(copy, "virtio0")
    os.utime(image)
    with pytest.raises(CommandFailed, match="written") as written:
        vm.extract("virtio0", "other.qcow2", "--latest", "--accept-touched")
    assert written.value.data["exit_code"] == 5
    subprocess.run(["qemu-img", "snapshot", "-U", "-l", "one.qcow2"], cwd=vm.folder, check=True)
    vm.stop()
    (part,) = [each for each in vm.manifest(vm.snapshot).storage if each.kind == "internal"]
    tool = ("qemu-img", "snapshot", "-d", part.internal_name, "one.qcow2")
    subprocess.run(tool, cwd=vm.folder, check=True)
    with pytest.raises(CommandFailed, match="no longer holds"):
        vm.extract("virtio1", "other.qcow2", "--latest")
    assert vm.leftovers() == []


def _slowed(vm: Vm, *words: str) -> "subprocess.Popen[bytes]":
    """An extraction whose qemu-img stands still once the copy is begun."""
    slow = vm.folder.parent / f"{vm.folder.name}-bin"
    slow.mkdir(exist_ok=True)
    tool = slow / "qemu-img"
    real = subprocess.run(["which", "qemu-img"], check=True, capture_output=True, text=True).stdout
    tool.write_text(
        f'#!/bin/sh\nwhile ! [ -e "{slow}/go" ]; do sleep 0.05; done\nexec {real.strip()} "$@"\n'
    )
    tool.chmod(0o755)
    extracting = subprocess.Popen(
        [sys.executable, "-m", "calotype", "extract", vm.name, "virtio0", "-o", "copy.qcow2",
         *(words or ("--latest",))],
        cwd=vm.folder,
        env={**os.environ, "CALOTYPE_STORE": str(vm.store), "PATH": f"{slow}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    wait(lambda: bool(vm.leftovers()), "the copy to be begun")
    time.sleep(0.3)
    return extracting


def _went_on(extracting: "subprocess.Popen[bytes]") -> tuple[Any, Any]:
    (slow,) = {part for part in _environment(extracting.pid) if part.endswith("-bin")}
    Path(slow, "go").touch()
    return extracting.communicate(timeout=60)


def _environment(pid: int) -> list[str]:
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (path,) = [word for word in words if word.startswith(b"PATH=")]
    return path.decode().removeprefix("PATH=").split(":")

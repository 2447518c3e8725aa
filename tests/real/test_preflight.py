"""A restore refuses, by name and before anything is touched, what is not what it was.

On a machine without an operating system: nothing is loaded here, only refused.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from calotype.store import images
from calotype.testing.machine import CommandFailed, Machine, thaw_all

pytestmark = pytest.mark.qemu

Damage = Callable[[Machine], None]


@pytest.fixture
def machine(folder: Path) -> Iterator[Machine]:
    """A small machine with two disks of equal size, snapshotted once, and off."""
    small = Machine(folder)
    small.make_disks()
    small.run()
    yield small
    small.clean_up()


def _thawed(machine: Machine, file: str) -> Path:
    path = machine.folder / file
    images.thaw(path, images.Frozen(0o644, immutable=True))
    return path


def remove(machine: Machine) -> None:
    _thawed(machine, "zero.qcow2").unlink()


def swap(machine: Machine) -> None:
    zero, one = _thawed(machine, "zero.qcow2"), _thawed(machine, "one.qcow2")
    aside = machine.folder / "aside"
    zero.rename(aside)
    one.rename(zero)
    aside.rename(one)


def resize(machine: Machine) -> None:
    path = _thawed(machine, "one.qcow2")
    subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", path, "128M"], check=True)


def replace(machine: Machine) -> None:
    path = _thawed(machine, "one.qcow2")
    copy = machine.folder / "copy"
    shutil.copy2(path, copy)
    copy.replace(path)


def write(machine: Machine) -> None:
    path = _thawed(machine, "zero.qcow2")
    tool = ("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k")
    subprocess.run([*tool, path], check=True, stdout=subprocess.DEVNULL)


def touch(machine: Machine) -> None:
    _thawed(machine, "zero.qcow2").chmod(0o400)


def lose_the_state(machine: Machine) -> None:
    machine.state_file(machine.snapshot).unlink()


def shorten_the_state(machine: Machine) -> None:
    os.truncate(machine.state_file(machine.snapshot), 1000)


def other_ram(machine: Machine) -> None:
    machine.define(memory="96")


def other_machine(machine: Machine) -> None:
    machine.define(machine="pc")


def other_cpu(machine: Machine) -> None:
    machine.define(more=("-cpu", "Nehalem"))


def other_devices(machine: Machine) -> None:
    machine.define(more=("-device", "virtio-rng-pci"))


def extra_disk(machine: Machine) -> None:
    subprocess.run(["qemu-img", "create", "-q", machine.folder / "more.raw", "64M"], check=True)
    machine.define(more=("-drive", "file=more.raw,format=raw,if=virtio"))


def missing_disk(machine: Machine) -> None:
    machine.define(disks=("zero.qcow2",))


def disks_in_another_order(machine: Machine) -> None:
    machine.define(disks=("one.qcow2", "zero.qcow2"))


DAMAGES: list[tuple[Damage, str, str]] = [
    (remove, "missing", "disk 'virtio0'.*zero.qcow2 is missing"),
    (swap, "swapped", "disk 'virtio0'.*is the image of disk 'virtio1'"),
    (resize, "resized", "disk 'virtio1'.*134217728 bytes instead of 67108864"),
    (replace, "replaced", "disk 'virtio1'.*it is another file"),
    (write, "written", "disk 'virtio0'.*zero.qcow2"),
    (touch, "touched", "disk 'virtio0'.*zero.qcow2"),
    (lose_the_state, "missing", "machine state's file"),
    (shorten_the_state, "resized", "machine state"),
    (other_ram, "definition", "100663296.*67108864"),
    (other_machine, "definition", "machine.*'pc'.*'q35'"),
    (other_cpu, "definition", "cpu.*Nehalem"),
    (other_devices, "definition", "virtio-rng-pci"),
    (extra_disk, "extra", "more.raw.*was not there"),
    (missing_disk, "missing", "disk 'virtio1'.*missing from the VM"),
    (disks_in_another_order, "swapped", "another order"),
]


DAMAGE_NAMES = [damage.__name__ for damage, _, _ in DAMAGES]


@pytest.mark.parametrize(("damage", "kind", "words"), DAMAGES, ids=DAMAGE_NAMES)
def test_a_difference_is_named_and_nothing_is_changed(
    machine: Machine, damage: Damage, kind: str, words: str
) -> None:
    machine.take()
    machine.stop()
    damage(machine)
    before = machine.picture()
    with pytest.raises(CommandFailed, match=f"(?s){words}") as refused:
        machine.calotype("restore", machine.name, "--latest")
    assert refused.value.data["exit_code"] == 5
    assert kind in {each["kind"] for each in refused.value.data["error"]["mismatches"]}
    assert machine.picture() == before
    assert machine.pid() is None


def test_a_touched_image_is_accepted_on_request_and_a_written_one_is_not(machine: Machine) -> None:
    machine.take()
    machine.stop()
    touch(machine)
    words = ("restore", machine.name, "--latest")
    with pytest.raises(CommandFailed, match="give --accept-touched"):
        machine.calotype(*words)
    assert machine.calotype(*words, "--accept-touched")["run_state"] == "running"
    machine.stop()
    write(machine)
    with pytest.raises(CommandFailed, match="instead of 196616"):
        machine.calotype(*words, "--accept-touched")


def test_all_differences_are_named_at_once(machine: Machine) -> None:
    machine.take()
    machine.stop()
    remove(machine)
    resize(machine)
    lose_the_state(machine)
    with pytest.raises(CommandFailed) as refused:
        machine.calotype("restore", machine.name, "--latest")
    kinds = sorted(each["kind"] for each in refused.value.data["error"]["mismatches"])
    assert kinds == ["missing", "missing", "resized"]


def test_the_machine_that_was_defined_first_can_be_restored_again(machine: Machine) -> None:
    machine.take()
    machine.stop()
    other_ram(machine)
    machine.define()
    assert machine.calotype("restore", machine.name, "--latest")["run_state"] == "running"


def test_a_template_below_a_disk_that_was_written_is_named(folder: Path) -> None:
    template = folder / "template.qcow2"
    tool = ("qemu-img", "create", "-q", "-f", "qcow2")
    subprocess.run([*tool, template, "64M"], check=True)
    small = Machine(folder)
    for disk in small.disks:
        subprocess.run([*tool, "-b", template, "-F", "qcow2", folder / disk], check=True)
    small.run()
    try:
        small.take()
        small.stop()
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", "write 0 64k", template],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        with pytest.raises(CommandFailed, match=r"template\.qcow2") as refused:
            small.calotype("restore", small.name, "--latest")
        assert refused.value.data["exit_code"] == 5
    finally:
        small.clean_up()
        thaw_all(folder)

"""Files that are not what they were change nothing: they are named, and what to do is said.

Files of the store, a machine state, images, and what belongs to another snapshot or VM.
"""

import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from calotype.store import images
from calotype.testing.machine import Machine
from crashing import Subject
from refusing import (
    HOST,
    MISMATCH,
    NOT_FOUND,
    QEMU,
    STORE,
    WRITERS,
    assert_refused,
    everything,
    say,
    tree_and_qemu,
)

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

# --- files of the store --------------------------------------------------------------------------

Damage = Callable[[Path], None]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_in_the_header(path: Path) -> None:
    os.truncate(path, 100)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def garbage(path: Path) -> None:
    path.write_bytes(b"\x00\xff{]" * 50)


def alter(path: Path) -> None:
    """Change one byte in the middle, and put the times back."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def remove(path: Path) -> None:
    path.unlink()


def be_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


class Kept:
    """Puts a file aside for a test, and back in its end: the file itself, not a copy."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.aside = path.with_name(f"{path.name}.aside")

    def __enter__(self) -> Path:
        frozen = images.before_freeze(self.path)
        images.thaw(self.path, images.Frozen(0o600, immutable=True))
        self.frozen = frozen
        self.path.rename(self.aside)
        shutil.copy2(self.aside, self.path)
        return self.path

    def __exit__(self, *_: object) -> None:
        if self.path.is_dir():
            self.path.rmdir()
        self.path.unlink(missing_ok=True)
        self.aside.rename(self.path)


def manifest_of(vm: Machine, tag: str = "first") -> Path:
    (entry,) = [each for each in vm.calotype("list")["vms"][0]["snapshots"] if each["tag"] == tag]
    return vm.home / "snapshots" / str(entry["id"]) / "manifest.json"


@pytest.mark.parametrize("damage", [truncate, empty, garbage, be_a_folder])
def test_a_manifest_that_is_none_is_named(off: Machine, damage: Damage) -> None:
    with Kept(manifest_of(off)) as path:
        damage(path)
        before = everything(off)
        for word in ("restore", "delete"):
            said = say(off, *WRITERS[word])
            assert_refused(said, STORE)
            assert str(path) in said.lines[0]
        assert everything(off) == before


def test_a_manifest_of_other_images_is_told(off: Machine) -> None:
    with Kept(manifest_of(off)) as path:
        path.write_text(re.sub(r'("inode": )(\d+)', r"\g<1>1\g<2>", path.read_text()))
        before = everything(off)
        for word in ("restore", "delete"):
            assert_refused(say(off, *WRITERS[word]), MISMATCH)
        assert everything(off) == before


def test_without_its_manifest_there_is_no_snapshot(off: Machine) -> None:
    with Kept(manifest_of(off)) as path:
        path.unlink()
        before = everything(off)
        for word in ("restore", "delete"):
            assert_refused(say(off, *WRITERS[word]), NOT_FOUND)
        assert everything(off) == before


@pytest.mark.parametrize("damage", [truncate, empty, garbage, be_a_folder])
def test_a_record_that_is_none_is_named(off: Machine, damage: Damage) -> None:
    with Kept(off.home / "record.json") as path:
        damage(path)
        before = everything(off)
        for words in WRITERS.values():
            said = say(off, *words)
            assert_refused(said, STORE)
            assert str(path) in said.lines[0]
        assert everything(off) == before


def test_without_its_record_there_is_no_vm(off: Machine) -> None:
    with Kept(off.home / "record.json") as path:
        path.unlink()
        before = everything(off)
        for words in WRITERS.values():
            assert_refused(say(off, *words), NOT_FOUND)
        assert everything(off) == before


@pytest.mark.parametrize("damage", [truncate, empty, garbage, remove])
def test_an_index_that_is_none_is_made_anew(off: Machine, damage: Damage) -> None:
    before = everything(off)
    listed = say(off, "list", "--json")
    damage(off.store / "index.sqlite")
    assert say(off, "list", "--json") == listed
    damage(off.store / "index.sqlite")
    assert say(off, *WRITERS["recover"]).code == 0
    assert everything(off) == before


def test_an_index_that_another_holds_is_waited_for_and_then_told(off: Machine) -> None:
    before = everything(off)
    with sqlite3.connect(off.store / "index.sqlite", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        looked = say(off, "list", "--json")
        tagged = say(off, "tag", "small", "second", "--tag", "first")
        other.execute("ROLLBACK")
    assert looked.code == 0
    assert [vm["name"] for vm in json.loads(looked.told)["vms"]] == ["small"]
    assert_refused(tagged, HOST)
    assert "locked" in tagged.lines[0]
    assert everything(off) == before


def cut_off(vm: Subject) -> Path:
    """Leave the journal of a take that was cut off."""
    vm.killed_at("done:4", ("take", "small"))
    (journal,) = (vm.home / "journal").iterdir()
    return journal


@pytest.mark.parametrize("damage", [empty, garbage, alter])
def test_a_journal_that_was_altered_is_named_and_nothing_is_done_by_it(
    subject: Subject, damage: Damage
) -> None:
    subject.take("--tag", "first")
    with Kept(cut_off(subject)) as path:
        damage(path)
        before = tree_and_qemu(subject)
        words = [*(WRITERS[word] for word in ("restore", "delete", "recover")), ("take", "small")]
        for each in words:
            said = say(subject, *each)
            assert_refused(said, STORE)
            assert str(path) in said.lines[0]
        assert tree_and_qemu(subject) == before
    subject.calotype("recover", "small")
    assert subject.calotype("history", "small")["history"][-1]["outcome"] == "undone"


# --- a machine state, images, and snapshots of others --------------------------------------------


def state_of(vm: Machine) -> Path:
    return manifest_of(vm).with_name("machine-state")


def image_of(vm: Machine) -> Path:
    return vm.folder / "zero.qcow2"


@pytest.mark.parametrize("which", [state_of, image_of])
@pytest.mark.parametrize("damage", [truncate, empty, garbage, alter, remove, lambda _: None])
def test_content_that_is_not_what_it_was_is_refused(
    off: Machine, which: Callable[[Machine], Path], damage: Damage
) -> None:
    """The last is a copy, to the byte and to the second, in the place of the file."""
    path = which(off)
    frozen = images.before_freeze(path)
    status = path.stat()
    with Kept(path):
        damage(path)
        before = everything(off)
        said = say(off, *WRITERS["restore"])
        assert_refused(said, MISMATCH)
        assert everything(off) == before
    path.chmod(status.st_mode & 0o777)
    if frozen.immutable:
        images.freeze(path)


def test_a_snapshot_of_another_vm_is_none_of_this_one(off: Machine, subject: Subject) -> None:
    subject.take("--tag", "theirs")
    theirs = manifest_of(subject, "theirs").parent
    ours = off.home / "snapshots" / theirs.name
    shutil.copytree(theirs, ours)
    try:
        before = everything(off)
        for word in ("restore", "delete"):
            said = say(off, word, "small", "--id", theirs.name)
            assert_refused(said, NOT_FOUND, STORE)
        assert say(off, "list").code == 0
        assert everything(off) == before
    finally:
        shutil.rmtree(ours)


def test_a_snapshot_in_the_folder_of_another_is_told(off: Machine) -> None:
    """A folder is named by its snapshot's id: what holds another's manifest is neither."""
    path = manifest_of(off)
    wrong = path.parent.with_name("0123456789abcdef")
    shutil.copytree(path.parent, wrong)
    try:
        before = everything(off)
        assert_refused(say(off, "restore", "small", "--id", wrong.name), NOT_FOUND, STORE)
        assert_refused(say(off, "delete", "small", "--id", wrong.name), NOT_FOUND, STORE)
        assert say(off, "list").code == 0
        assert everything(off) == before
    finally:
        shutil.rmtree(wrong)


@pytest.mark.parametrize("damage", [cut_in_the_header, empty, garbage, remove])
def test_a_vm_is_not_started_on_an_image_that_is_none(off: Machine, damage: Damage) -> None:
    """QEMU tells that it is none: what is kept is who was started last, and the history of it."""
    (active,) = (path for path in off.folder.glob("zero.qcow2.*.qcow2") if _is_newest(off, path))
    with Kept(active):
        damage(active)
        before = everything(off)
        assert_refused(say(off, *WRITERS["start"]), QEMU, HOST)
        after = everything(off)
        told = {
            path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
        }
        assert {Path(path).name for path in told if "history" not in path} <= {"process.json"}


def _is_newest(vm: Machine, path: Path) -> bool:
    record = json.loads((vm.home / "record.json").read_text())
    return str(path) in {disk["active"]["path"] for disk in record["disks"]}

"""A check-up of a store of real files: each trouble is made, found and named; else is silence."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from builders import (
    OTHER,
    SNAPSHOT,
    make_began,
    make_disk_record,
    make_manifest,
    make_part,
    make_record,
)
from calotype.engine.examination import examine
from calotype.formats import argv as command_line
from calotype.formats.argv import CommandLine
from calotype.model.snapshot import MachineStatePart, Manifest
from calotype.model.vm import Adopted, Image, ImageFacts, VmRecord
from calotype.plan.diagnosis import CHECKS, Finding, diagnose
from calotype.plan.sights import QemuSight, Sight
from calotype.qemu import host
from calotype.store import images
from calotype.store.journal import Journal
from calotype.store.store import Store
from calotype.testing.machine import thaw_all

MIB = 1 << 20
OF_THE_HOST = {"kvm", "write-tracking", "store-in-memory"}
"""Checks that the host of the tests may well deserve."""


class Home:
    """A store with a VM that is off, on an overlay over an image that its snapshot stands on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.origin = Image(str(folder / "disk.qcow2"), "qcow2")
        self.overlay = Image(f"{self.origin.path}.{SNAPSHOT}.qcow2", "qcow2")
        self.create(self.origin.path)
        self.create(self.overlay.path, backing=self.origin.path)
        images.freeze(Path(self.origin.path))
        self.root = folder / "store"
        self.store = Store(self.root)
        self.record = self.keep(self.made_record())
        self.commit()

    def made_record(self) -> VmRecord:
        argv = ("qemu-system-x86_64", "-drive", f"file={self.origin.path},if=virtio")
        disk = make_disk_record(0, origin=self.origin, active=self.overlay)
        return make_record([disk], argv=argv, cwd=str(self.folder), parent=SNAPSHOT)

    def keep(self, record: VmRecord) -> VmRecord:
        self.store.make_vm_folder(record.id)
        self.store.save(record)
        return record

    def commit(self, **changes: Any) -> Manifest:
        self.store.make_snapshot_folder(self.record.id, SNAPSHOT)
        self.state.write_bytes(b"QEVM")
        identity = images.identify(Path(self.origin.path), "qcow2")
        layer = ImageFacts(self.origin.path, "qcow2", identity)
        part = make_part(0, origin=self.origin, image=self.origin, layers=(layer,))
        machine_state = MachineStatePart(
            "machine-state", images.identify(self.state, "raw"), "digest"
        )
        command = CommandLine.parse(self.record.argv)
        manifest = make_manifest(
            [part],
            machine_state=machine_state,
            definition=command_line.definition(command, self.record.cwd),
        )
        manifest = replace(manifest, **changes)
        self.store.commit(manifest)
        return manifest

    @property
    def state(self) -> Path:
        return self.store.snapshot_folder(self.record.id, SNAPSHOT) / "machine-state"

    @property
    def vm_folder(self) -> Path:
        return self.store.folder(self.record.id)

    def create(self, path: str, backing: str = "") -> None:
        below = ("-u", "-b", backing, "-F", "qcow2") if backing else ()
        tool = ("qemu-img", "create", "-q", "-f", "qcow2", *below)
        subprocess.run([*tool, path, "1M"], check=True)

    def look(self) -> Sight:
        return asyncio.run(examine(self.root))

    def findings(self) -> list[Finding]:
        return [each for each in diagnose(self.look()) if each.check not in OF_THE_HOST]

    def found(self, *checks: str) -> list[Finding]:
        """The findings, which are of these checks and of no others."""
        findings = self.findings()
        assert [each.check for each in findings] == list(checks), findings
        assert all(each.remedy for each in findings)
        return findings


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    async def ask(program: str) -> QemuSight:
        return QemuSight(program, (10, 0, 2), host.CAPABILITIES)

    monkeypatch.setattr(host, "ask", ask)
    yield Home(tmp_path)
    thaw_all(tmp_path)


@pytest.fixture
def opening() -> Iterator[Callable[..., int]]:
    """Let another process open a file; its pid."""
    children: list[subprocess.Popen[str]] = []

    def opened(path: Path, mode: str) -> int:
        code = (
            "import sys; file = open(sys.argv[1], sys.argv[2]); print('open', flush=True); input()"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", code, path, mode],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        children.append(child)
        assert child.stdout
        child.stdout.readline()
        return child.pid

    yield opened
    for child in children:
        child.communicate("\n")


def files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder, by all that changes when it is touched."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_ctime_ns, path.lstat().st_size)
        for path in (folder, *folder.rglob("*"))
    }


# --- silence -------------------------------------------------------------------------------------


def test_a_healthy_store_gives_no_finding_and_is_left_alone(home: Home) -> None:
    before = files(home.folder)
    assert home.findings() == []
    assert files(home.folder) == before


def test_a_store_that_is_not_there_is_not_made(home: Home) -> None:
    home.root = home.folder / "nosuch"
    sight = home.look()
    assert (sight.store, sight.vms) == (None, ())
    assert home.findings() == []
    assert not home.root.exists()


def test_an_index_that_is_gone_is_not_made(home: Home) -> None:
    (home.root / "index.sqlite").unlink()
    home.found()
    assert not (home.root / "index.sqlite").exists()


# --- files that nothing names --------------------------------------------------------------------


def test_an_overlay_that_nothing_names(home: Home) -> None:
    orphan = f"{home.origin.path}.{OTHER}.qcow2"
    home.create(orphan, backing=home.origin.path)
    (finding,) = home.found("orphan")
    assert finding.problem.startswith(orphan)


@pytest.mark.parametrize("name", ["disk.qcow2.copy.qcow2", "disk.qcow2.old", "other.qcow2"])
def test_a_file_of_the_user_is_no_overlay_of_ours(home: Home, name: str) -> None:
    home.create(str(home.folder / name), backing=home.origin.path)
    home.found()


def test_an_overlay_that_the_newest_image_stands_on_is_named(home: Home) -> None:
    middle = f"{home.origin.path}.{OTHER}.qcow2"
    home.create(middle, backing=home.origin.path)
    home.create(home.overlay.path, backing=middle)
    home.found()


def test_an_overlay_that_a_journal_names_is_told_as_what_was_cut_off(home: Home) -> None:
    from calotype.plan.steps import CreateOverlay  # noqa: PLC0415

    overlay = f"{home.origin.path}.{OTHER}.qcow2"
    home.create(overlay, backing=home.origin.path)
    steps = (CreateOverlay(overlay, home.origin, MIB),)
    Journal.begin(
        home.vm_folder, make_began(id=OTHER, snapshot=OTHER, steps=steps, record=home.record)
    )
    home.store.make_snapshot_folder(home.record.id, OTHER)
    (finding,) = home.found("cut-off")
    assert "recover web" in finding.remedy


def test_an_overlay_of_a_forgotten_vm_is_named(home: Home) -> None:
    home.store.forget(home.record)
    home.found()


def test_a_folder_without_a_manifest(home: Home) -> None:
    home.store.make_snapshot_folder(home.record.id, OTHER)
    (home.store.snapshot_folder(home.record.id, OTHER) / "machine-state").write_bytes(
        b"1" * 5 * MIB
    )
    (finding,) = home.found("orphan")
    assert f"snapshots/{OTHER} (5 MiB)" in finding.problem
    assert "recover web" in finding.remedy


def test_a_machine_state_that_no_manifest_names(home: Home) -> None:
    home.state.with_name("machine-state.old").write_bytes(b"1")
    (finding,) = home.found("orphan")
    assert "machine-state.old" in finding.problem


def test_the_folder_of_a_vm_without_a_record(home: Home) -> None:
    home.store.make_vm_folder("00000000000000ff")
    (finding,) = home.found("orphan")
    assert "without a record" in finding.problem


@pytest.mark.parametrize("place", ["images", "store"])
def test_a_file_that_was_being_written_long_ago(
    home: Home, place: str, opening: Callable[..., int]
) -> None:
    path = (home.folder if place == "images" else home.vm_folder) / ".calotype-0123"
    path.touch()
    home.found()  # it may be written to in a moment
    os.utime(path, (0, 0))
    home.found("orphan")
    opening(path, "rb")
    home.found()


def test_where_a_manifest_is_damaged_no_image_is_called_an_orphan(home: Home) -> None:
    home.create(f"{home.origin.path}.{OTHER}.qcow2", backing=home.origin.path)
    home.state.with_name("manifest.json").write_text("{}")
    (finding,) = home.found("damaged")
    assert "manifest.json" in finding.problem


# --- files that are missing, or not what they were ------------------------------------------------


def test_a_machine_state_that_is_missing(home: Home) -> None:
    home.state.unlink()
    (finding,) = home.found("missing")
    assert "machine-state" in finding.problem
    assert SNAPSHOT in finding.about


def test_an_image_that_is_missing(home: Home) -> None:
    images.thaw(Path(home.origin.path), images.Frozen(0o600, immutable=True))
    Path(home.origin.path).unlink()
    broken, missing = home.found("chain-broken", "missing")
    assert home.origin.path in broken.problem
    assert home.origin.path in missing.problem


def test_the_newest_image_that_is_missing(home: Home) -> None:
    Path(home.overlay.path).unlink()
    (finding,) = home.found("chain-broken")
    assert home.overlay.path in finding.problem


def test_an_image_that_was_written_to_and_is_not_frozen(home: Home) -> None:
    images.thaw(Path(home.origin.path), images.Frozen(0o600, immutable=True))
    assert {each.check for each in home.findings()} == {"touched", "unfrozen"}
    os.utime(home.origin.path)
    assert {each.check for each in home.findings()} == {"changed", "unfrozen"}


def test_the_same_of_many_snapshots_is_told_once(home: Home) -> None:
    first = home.store.manifest(home.record.id, SNAPSHOT)
    home.store.make_snapshot_folder(home.record.id, OTHER)
    home.store.commit(replace(first, id=OTHER, machine_state=None))
    images.thaw(Path(home.origin.path), images.Frozen(0o444, immutable=True))
    (finding,) = home.found("touched")
    assert finding.about.endswith("and 1 more")


def test_a_vm_that_was_defined_anew(home: Home) -> None:
    home.keep(replace(home.record, argv=(*home.record.argv, "-m", "1G")))
    (finding,) = home.found("redefined")
    assert "machine.memory.size" in finding.problem


def test_a_damaged_record_labels_process_and_journal(home: Home) -> None:
    for path in ("labels.json", "../../process.json"):
        (home.state.parent / path).write_text("{")
    (home.vm_folder / "journal").mkdir()
    (home.vm_folder / "journal" / f"{OTHER}.jsonl").write_text("no journal\n")
    assert len(home.found("damaged", "damaged", "damaged")) == 3
    (home.vm_folder / "record.json").write_text("{")
    assert "damaged" in {each.check for each in home.findings()}


@pytest.mark.parametrize("spoil", ["stale", "no database"])
def test_an_index_that_does_not_fit(home: Home, spoil: str) -> None:
    path = home.root / "index.sqlite"
    if spoil == "stale":
        home.store.index.remove_snapshot(SNAPSHOT)
    else:
        path.write_text("no database at all, but long enough to be looked at" * 100)
    before = path.read_bytes()
    (finding,) = home.found("index")
    assert "doctor --rebuild" in finding.remedy
    assert path.read_bytes() == before


# --- processes -----------------------------------------------------------------------------------


def test_a_frozen_image_that_is_open_for_writing(home: Home, opening: Callable[..., int]) -> None:
    images.thaw(Path(home.origin.path), images.Frozen(0o644, immutable=True))
    other_name = home.folder / "other-name"
    os.link(home.origin.path, other_name)
    pid = opening(other_name, "r+b")
    other_name.unlink()
    images.freeze(Path(home.origin.path))
    home.commit()
    with home.store.locked(home.record, "delete"):  # it may be the one who merges
        home.found()
    (finding,) = home.found("frozen-open")
    assert home.origin.path in finding.problem
    assert f"process {pid} (" in finding.problem
    assert f"kill {pid}" in finding.remedy


def test_who_only_reads_a_frozen_image_may(home: Home, opening: Callable[..., int]) -> None:
    opening(Path(home.origin.path), "rb")
    home.found()


def test_the_newest_image_of_a_vm_that_is_off_is_open_for_writing(
    home: Home, opening: Callable[..., int]
) -> None:
    pid = opening(Path(home.overlay.path), "r+b")
    (finding,) = home.found("in-use")
    assert f"process {pid} (" in finding.problem
    assert finding.remedy == f"end that process (kill {pid}) before it starts"


def test_a_vm_that_its_user_has_started_again_is_to_be_bound_and_not_killed(
    home: Home, opening: Callable[..., int]
) -> None:
    adopted = Adopted(home.record.argv, "/run/web's.sock", 0)
    home.store.save(replace(home.record, adopted=adopted))
    opening(Path(home.overlay.path), "r+b")
    (finding,) = home.found("in-use")
    assert """`calotype adopt web --qmp '/run/web'"'"'s.sock'` binds it""" in finding.remedy


def test_a_vm_that_somebody_is_changing_is_not_judged(home: Home) -> None:
    home.state.unlink()
    home.store.make_snapshot_folder(home.record.id, OTHER)
    home.found("missing", "orphan")
    with home.store.locked(home.record, "take"):
        assert home.look().vms[0].is_changing
        home.found()
    home.found("missing", "orphan")


# --- what keeps a VM from starting ---------------------------------------------------------------


def test_what_a_start_would_miss(home: Home) -> None:
    argv = ("no-such-qemu", *home.record.argv[1:], "-cdrom", "gone.iso", "-kernel", "gone")
    home.keep(replace(home.record, argv=argv, cwd=str(home.folder / "gone")))
    found = [each for each in home.findings() if each.check == "cannot-start"]
    assert len(found) == 4
    told = " ".join(each.problem for each in found)
    for words in ("no-such-qemu", "gone is missing", "gone/gone.iso", "gone/gone,"):
        assert words in told, words


def test_a_chain_that_is_too_long(home: Home) -> None:
    below = home.origin.path
    for place in range(98):
        path = str(home.folder / f"layer-{place}.qcow2")
        shutil.copy(home.overlay.path, path)
        repointed(path, below)
        below = path
    repointed(home.overlay.path, below)
    (finding,) = home.found("chain-long")
    assert "stands on 99 images" in finding.problem


def repointed(path: str, below: str) -> None:
    """Let an image that stands on another stand on *below*: its name is as long, or shorter."""
    tool = ("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below, path)
    subprocess.run(tool, check=True)


def test_a_secret_in_a_command_line(home: Home) -> None:
    argv = (*home.record.argv, "-object", "secret,id=s0,data=hunter2")
    home.keep(replace(home.record, argv=argv))
    (finding,) = home.found("secret")
    assert "hunter2" not in str(finding)


# --- the host ------------------------------------------------------------------------------------


def test_little_space(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "free_bytes", lambda _: 63 * MIB)
    assert {each.check for each in home.findings()} == {"store-full", "space"}
    monkeypatch.setattr(images, "free_bytes", lambda _: 65 * MIB)
    home.found("store-small")


def test_a_host_that_lacks_what_is_needed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home.folder))
    checks = {each.check for each in home.findings()}
    assert checks == {"tool-missing", "qemu-missing", "cannot-start"}


@pytest.mark.parametrize(
    ("name", "check"), [("has_kvm", "kvm"), ("may_track_writes", "write-tracking")]
)
def test_what_the_host_does_not_let_us_do(
    home: Home, monkeypatch: pytest.MonkeyPatch, name: str, check: str
) -> None:
    monkeypatch.setattr(host, name, lambda: False)
    assert check in {each.check for each in diagnose(home.look())}
    monkeypatch.setattr(host, name, lambda: True)
    assert check not in {each.check for each in diagnose(home.look())}


def test_the_names_of_checks_are_of_one_each() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)


# --- the command ---------------------------------------------------------------------------------


def test_the_exit_code_says_whether_all_is_well(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from calotype.cli.main import main  # noqa: PLC0415

    monkeypatch.setenv("CALOTYPE_STORE", str(home.root))

    def said(*words: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["doctor", *words])
        return caught.value.code, *capsys.readouterr()

    code, out, err = said()
    assert (code, err) == (0, "")
    assert "all is well" in out
    assert json.loads(said("--json")[1])["is_well"] is True
    home.state.unlink()
    code, out, err = said()
    assert code == 11
    assert "fault: vm 'web', snapshot" in out
    assert "[missing]" in out
    assert err.startswith("calotype: not all is well: 1 fault")
    told = json.loads(said("--json")[1])
    assert (told["is_well"], told["error"]["family"]) == (False, "unwell")
    assert [each["check"] for each in told["findings"] if each["severity"] == "fault"] == [
        "missing"
    ]

"""Tags, descriptions, protection, `delete` and `du`, as a user meets them; no QEMU runs here."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from builders import SNAPSHOT, VM_ID, make_disk_record, make_manifest, make_part, make_record
from calotype.cli.main import main
from calotype.model.snapshot import Manifest
from calotype.model.vm import Image, VmRecord
from calotype.store.store import Store


class Said(NamedTuple):
    """What one call of the command said."""

    code: object
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Calotype = Callable[..., Said]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A VM on one image, with one snapshot of its machine state alone."""
    monkeypatch.setenv("CALOTYPE_STORE", str(tmp_path / "store"))
    path = str(tmp_path / "disk.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    image = Image(path, "qcow2")
    store = Store(tmp_path / "store")
    record = make_record([make_disk_record(0, origin=image, active=image)], parent=SNAPSHOT)
    keep(store, record, make_manifest([make_part(0, "skip", origin=image)], tag="first"))
    return store


def keep(store: Store, record: VmRecord, manifest: Manifest) -> None:
    store.make_vm_folder(record.id)
    store.save(record)
    store.make_snapshot_folder(record.id, manifest.id)
    (store.snapshot_folder(record.id, manifest.id) / "machine-state").write_bytes(bytes(5000))
    store.commit(manifest)


@pytest.fixture
def calotype(store: Store, capsys: pytest.CaptureFixture[str]) -> Calotype:
    def call(*words: str) -> Said:
        assert store.root.exists()
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(words))
        return Said(caught.value.code, *capsys.readouterr())

    return call


def test_a_snapshot_is_found_by_its_new_tag_and_not_by_the_old(
    calotype: Calotype, store: Store
) -> None:
    assert calotype("tag", "web", "--tag", "first", "second").code == 0
    assert calotype("show", "web", "--tag", "first").code == 3
    assert "'second'" in calotype("show", "web", "--tag", "second").out
    assert "'second'" in calotype("list", "web").out
    assert store.manifest(VM_ID, SNAPSHOT).tag == "first"


def test_what_was_said_survives_a_new_index(calotype: Calotype, store: Store) -> None:
    calotype("tag", "web", "--id", SNAPSHOT, "second")
    calotype("describe", "web", "--id", SNAPSHOT, "all is well")
    calotype("protect", "web", "--id", SNAPSHOT)
    before = store.index.snapshots(VM_ID)
    (store.root / "index.sqlite").unlink()
    assert Store(store.root).index.snapshots(VM_ID) == before
    assert before[0].is_protected
    assert before[0].description == "all is well"


def test_a_tag_that_is_no_text_is_refused(calotype: Calotype) -> None:
    said = calotype("tag", "web", "--latest", "a\nb", "--json")
    assert (said.code, said.json["error"]["family"]) == (2, "request")


def test_a_protected_snapshot_is_not_deleted_until_it_is_unprotected(
    calotype: Calotype, store: Store
) -> None:
    assert calotype("protect", "web", "--latest").code == 0
    assert "protected" in calotype("list", "web").out
    said = calotype("delete", "web", "--id", SNAPSHOT)
    assert said.code == 4
    assert f"calotype unprotect web --id {SNAPSHOT}" in said.err
    assert calotype("delete", "web", "--id", SNAPSHOT, "--dry-run").code == 4
    assert calotype("unprotect", "web", "--latest").code == 0
    assert calotype("delete", "web", "--id", SNAPSHOT, "-q").out == f"{SNAPSHOT}\n"
    assert store.manifests(VM_ID) == []
    assert store.record(VM_ID).parent is None
    assert not store.snapshot_folder(VM_ID, SNAPSHOT).exists()


@pytest.mark.parametrize(
    "words", [(), ("--id", SNAPSHOT, "--tag", "first"), ("--leftovers", "--tag", "first")]
)
def test_which_snapshots_are_meant_is_said_in_one_way(
    calotype: Calotype, words: tuple[str, ...]
) -> None:
    said = calotype("delete", "web", *words)
    assert said.code == 2
    assert "which snapshots?" in said.err


def test_a_dry_run_says_what_is_freed_and_what_stays(calotype: Calotype, store: Store) -> None:
    said = calotype("delete", "web", "--tag", "first", "--dry-run")
    assert said.code == 0
    assert f"deletes: {SNAPSHOT}" in said.out
    assert re.search(r"frees: (8|12|16) KiB\n", said.out), "the state, and the manifest"
    assert "disk.qcow2: it holds the newest content" in said.out
    assert len(store.manifests(VM_ID)) == 1


def test_what_a_snapshot_takes_is_told(calotype: Calotype) -> None:
    (vm,) = calotype("du", "--json").json["vms"]
    (told,) = vm["snapshots"]
    assert (told["id"], told["tag"], told["shared_bytes"]) == (SNAPSHOT, "first", 0)
    assert 8192 <= told["own_bytes"] < vm["total_bytes"]
    assert "its own" in calotype("du", "web").out

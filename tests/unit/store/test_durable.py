"""What is said to be done is there after a power cut: every name that changed was synced.

The system calls that change names and those that sync are watched. A name that was changed and
whose folder was not synced since may be the old one after a power cut.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import OTHER, SNAPSHOT, VM_ID, make_manifest, make_record
from calotype.model.labels import Labels
from calotype.model.vm import Process
from calotype.qemu import process
from calotype.store.journal import Began, Journal
from calotype.store.store import Store


class Watch:
    """The folders whose names are not durable, and the files whose content is not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folders: set[str] = set()
        self.files: set[str] = set()
        for name in ("rename", "replace", "link"):
            self._after(monkeypatch, name, lambda source, target: [source, target])
        for name in ("unlink", "mkdir", "rmdir"):
            self._after(monkeypatch, name, lambda path: [path])
        for name in ("fsync", "fdatasync"):
            self._synced(monkeypatch, name)
        write = os.write

        def written(fd: int, data: bytes) -> int:
            self.files.add(str(Path(f"/proc/self/fd/{fd}").readlink()))
            return write(fd, data)

        monkeypatch.setattr(os, "write", written)

    def _after(
        self, monkeypatch: pytest.MonkeyPatch, name: str, changed: Callable[..., list[Any]]
    ) -> None:
        call = getattr(os, name)

        def watched(*words: Any, **settings: Any) -> Any:
            count = 2 if name in ("rename", "replace", "link") else 1
            paths = [os.path.realpath(path) for path in changed(*words[:count])]
            answer = call(*words, **settings)
            self.folders.update(map(os.path.dirname, paths))
            if count == 2:
                if paths[0] in self.files:
                    self.files.add(paths[1])
                self.files.discard(paths[0])
            return answer

        monkeypatch.setattr(os, name, watched)

    def _synced(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        call = getattr(os, name)

        def watched(fd: int) -> None:
            call(fd)
            path = str(Path(f"/proc/self/fd/{fd}").readlink())
            self.folders.discard(path)
            self.files.discard(path)

        monkeypatch.setattr(os, name, watched)

    def lost(self) -> list[str]:
        """What may be lost in a power cut now."""
        return sorted(each for each in self.folders | self.files if Path(each).exists())


def began() -> Began:
    return Began(
        operation="take", id=OTHER, snapshot=OTHER, at="2026-01-01T00:00:00+00:00",
        owner=process.this(), qemu=None, record=make_record(), steps=(),
    )  # fmt: skip


def a_journal(store: Store) -> None:
    Journal.begin(store.folder(VM_ID), began()).end("done")


OPERATIONS: dict[str, Callable[[Store], object]] = {
    "a record": lambda store: store.save(make_record(parent=OTHER)),
    "a process": lambda store: store.save_process(VM_ID, Process(1, 2)),
    "a folder": lambda store: store.make_snapshot_folder(VM_ID, OTHER),
    "a manifest": lambda store: store.commit(make_manifest()),
    "a snapshot that is dropped": lambda store: store.drop_snapshot(VM_ID, SNAPSHOT),
    "labels": lambda store: store.save_labels(make_manifest(), Labels(tag="new")),
    "a journal that begins": lambda store: Journal.begin(store.folder(VM_ID), began()),
    "a journal that ends": a_journal,
    "a VM that is forgotten": lambda store: store.forget(make_record()),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_is_lost_in_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    store = Store(tmp_path / "store")
    store.make_vm_folder(VM_ID)
    store.save(make_record())
    store.make_snapshot_folder(VM_ID, SNAPSHOT)
    store.commit(make_manifest())
    watch = Watch(monkeypatch)
    OPERATIONS[name](store)
    assert watch.lost() == []


def test_what_was_not_synced_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    path = tmp_path / "a"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
    os.write(fd, b"x")
    path.rename(tmp_path / "b")
    assert watch.lost() == [str(tmp_path), str(tmp_path / "b")]
    os.fsync(fd)
    os.close(fd)
    assert watch.lost() == [str(tmp_path)]

"""The store: one folder that holds all that Calotype knows.

::

    STORE/
        index.sqlite                    a picture of the rest; may be deleted at any time
        naming.lock                     held while a VM is defined
        vms/VM-ID/
            record.json                 the definition, and which images hold the newest content
            process.json                the QEMU that runs it, if one does
            lock                        held by the one operation that changes this VM
            control.sock query.sock guard.sock service.sock console.sock
            qemu.log console.log
            journal/ID.jsonl            an operation under way, or cut off (store/journal.py)
            history/ID.jsonl            one that has ended
            snapshots/ID/
                machine-state           RAM and devices, for the owner alone
                manifest.json           written last; without it there is no snapshot
                labels.json             what the user said of it since; may be missing
        forgotten/VM-ID/                what `forget` keeps

Folders are named by ids of ours: a VM's name and a tag are data. Every file is replaced whole,
durably, by a rename. A snapshot exists from the rename of its manifest on.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TextIO, TypeVar

import msgspec

from calotype.errors import ConflictError, HostError, NotFoundError, StoreError
from calotype.model.labels import Labels
from calotype.model.snapshot import Manifest
from calotype.model.vm import Process, VmRecord
from calotype.store.files import (
    TEMPORARY_PREFIX,
    host_errors,
    make_private_directory,
    sync_directory,
    write_atomically,
)
from calotype.store.index import Index

_Kept = TypeVar("_Kept", VmRecord, Process, Manifest, Labels)


class Store:
    """All that is kept, below one folder.

    Args:
        root: The folder; made if it is not there, for its owner alone.
        make: Make what is not there yet. Who looks does not: a store that is not there is empty.

    Attributes:
        damage: The files that could not be read when the index was made anew, just now.

    Raises:
        HostError: The folder cannot be made, or holds other things.
    """

    def __init__(self, root: Path, *, make: bool = True) -> None:
        self.root = root
        self.damage: list[StoreError] = []
        _refuse_other_things(root)
        if not make and not self._vms.is_dir():
            self.index = Index(None)
            return
        try:
            for folder in (root, self._vms, self._forgotten):
                make_private_directory(folder)
        except OSError as error:
            raise HostError(
                f"cannot keep a store in {root}: {error.strerror}", "name another with --store"
            ) from error
        self.index = Index(root / "index.sqlite")
        if not self.index.is_current(self._ids_on_disk()):
            self.rebuild_index()

    @classmethod
    def looking(cls, root: Path) -> "Store":
        """A store to be looked at alone: nothing is made, and the index is read from the files.

        There need not be one at *root*: it is empty then.

        Raises:
            HostError: What is there is no store.
        """
        _refuse_other_things(root)
        store = cls.__new__(cls)
        store.root, store.damage, store.index = root, [], Index(None)
        store.rebuild_index()
        return store

    @property
    def _vms(self) -> Path:
        return self.root / "vms"

    @property
    def _forgotten(self) -> Path:
        return self.root / "forgotten"

    def folder(self, vm_id: str) -> Path:
        """The folder of one VM."""
        return self._vms / vm_id

    def snapshot_folder(self, vm_id: str, snapshot: str) -> Path:
        """The folder of a snapshot's own files."""
        return self.folder(vm_id) / "snapshots" / snapshot

    # --- VMs -------------------------------------------------------------------------------------

    def find(self, name: str) -> VmRecord:
        """The VM called *name*.

        Raises:
            NotFoundError: There is none.
        """
        vm_id = self.index.vm_named(name)
        if vm_id is None:
            raise NotFoundError(f"there is no VM called {name!r}", "see `calotype ps`", vm=name)
        return self.record(vm_id)

    def record(self, vm_id: str) -> VmRecord:
        """A VM's record, from its file."""
        return _read(self.folder(vm_id) / "record.json", VmRecord)

    def records(self) -> list[VmRecord]:
        """Every VM, by name."""
        return [self.record(vm_id) for vm_id in self.index.vm_ids()]

    def sound_records(self) -> tuple[list[VmRecord], list[StoreError]]:
        """Every VM whose record can be read, by name; and what is wrong with the others."""
        return _sound(self.record, self.index.vm_ids())

    def forgotten(self) -> list[VmRecord]:
        """The VMs that were forgotten; their images may still be immutable."""
        folders = sorted(self._forgotten.glob("*/"))
        return [_read(folder / "record.json", VmRecord) for folder in folders]

    def forgotten_manifests(self, vm_id: str) -> list[Manifest]:
        """The snapshots of a VM that was forgotten."""
        paths = sorted((self._forgotten / vm_id).glob("snapshots/*/manifest.json"))
        return [_read(path, Manifest) for path in paths]

    def make_vm_folder(self, vm_id: str) -> None:
        """Make the folder for a VM; one that is there is no error."""
        make_private_directory(self.folder(vm_id))
        make_private_directory(self.folder(vm_id) / "snapshots")

    def save(self, record: VmRecord) -> None:
        """Keep a record, in place of the one before.

        The index knows of a VM its name alone, which stays: so but for the first time nothing else
        is written, and who does it while a guest stands still waits for no database.
        """
        path = self.folder(record.id) / "record.json"
        is_new = not path.exists()
        _write(path, record)
        if is_new:
            self.index.put_vm(record)

    def drop(self, record: VmRecord) -> None:
        """Remove all of a VM that could not be started the first time."""
        self.index.remove_vm(record.id)
        shutil.rmtree(self.folder(record.id))

    def forget(self, record: VmRecord) -> Path:
        """Take a VM out of the catalogue; its files stay, in the folder that is returned."""
        kept = self._forgotten / record.id
        self.folder(record.id).rename(kept)
        sync_directory(self._forgotten)
        sync_directory(self._vms)
        self.index.remove_vm(record.id)
        return kept

    # --- processes -------------------------------------------------------------------------------

    def process(self, vm_id: str) -> Process | None:
        """The process that was started last for this VM; it may be gone by now."""
        path = self.folder(vm_id) / "process.json"
        return _read(path, Process) if path.exists() else None

    def save_process(self, vm_id: str, qemu: Process) -> None:
        """Keep who runs this VM."""
        _write(self.folder(vm_id) / "process.json", qemu)

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Be the only one who gives names and images to VMs; held for moments, so waited for."""
        with _opened_lock(self.root / "naming.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def locked(self, record: VmRecord, word: str) -> Iterator[None]:
        """Be the only one who changes this VM, for the length of a `with` block.

        The lock dies with its holder: what is written in it tells who it is, and locks nothing.

        Args:
            record: The VM.
            word: What is being done to it.

        Raises:
            ConflictError: Another process is at it.
        """
        path = self.folder(record.id) / "lock"
        with _opened_lock(path) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                pid, _, words = lock.read().strip().partition(" ")
                raise ConflictError(
                    f"process {pid or 'unknown'} is changing the VM {record.name!r}:"
                    f" {words.partition(' (')[0]}",
                    "wait until it is done",
                    holder=pid,
                ) from error
            lock.truncate(0)
            lock.write(f"{os.getpid()} {word} (start time {_start_ticks()})\n")
            lock.flush()
            yield

    def is_held(self, vm_id: str) -> bool:
        """Whether somebody holds the lock on a VM now, by the kernel's list (proc(5), locks).

        Trying the lock would be in the way of whoever wants it just then.
        """
        try:
            inode = (self.folder(vm_id) / "lock").stat().st_ino
            lines = Path("/proc/locks").read_text().splitlines()
        except OSError:
            return False
        rows = [line.split() for line in lines]
        return any("FLOCK" in row and row[-3].endswith(f":{inode}") for row in rows)

    # --- snapshots -------------------------------------------------------------------------------

    def manifest(self, vm_id: str, snapshot: str) -> Manifest:
        """A snapshot's manifest, from its file."""
        return _read(self.snapshot_folder(vm_id, snapshot) / "manifest.json", Manifest)

    def manifests(self, vm_id: str) -> list[Manifest]:
        """Every snapshot of a VM, oldest first."""
        return [self.manifest(vm_id, entry.id) for entry in self.index.snapshots(vm_id)]

    def sound_manifests(self, vm_id: str) -> tuple[list[Manifest], list[StoreError]]:
        """Every snapshot of a VM that can be read, oldest first; and what is wrong with the others.

        Who removes what no snapshot stands on must heed the others: nobody knows what they need.
        """
        found, damage = _sound(
            lambda snapshot: self.manifest(vm_id, snapshot), sorted(self._snapshots_of(vm_id))
        )
        return sorted(found, key=lambda manifest: (manifest.instant, manifest.id)), damage

    def is_under_way(self, vm_id: str, snapshot: str) -> bool:
        """Whether a snapshot has begun, and is not complete: it has a folder, and no manifest."""
        folder = self.snapshot_folder(vm_id, snapshot)
        return folder.is_dir() and not (folder / "manifest.json").exists()

    def make_snapshot_folder(self, vm_id: str, snapshot: str) -> None:
        """Make the folder for a snapshot's own files."""
        make_private_directory(self.snapshot_folder(vm_id, snapshot))

    def remove_snapshot_folder(self, vm_id: str, snapshot: str) -> None:
        """Undo `make_snapshot_folder`; a folder that is gone is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.snapshot_folder(vm_id, snapshot).rmdir()

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest: from its rename on the snapshot exists."""
        folder = self.snapshot_folder(manifest.vm_id, manifest.id)
        _write(folder / "manifest.json", manifest)
        sync_directory(folder.parent)
        self.index.put_snapshot(manifest, self.labels(manifest.vm_id, manifest.id))

    def drop_snapshot(self, vm_id: str, snapshot: str) -> None:
        """Make a snapshot not exist, durably, though its other files stay; idempotent."""
        folder = self.snapshot_folder(vm_id, snapshot)
        (folder / "manifest.json").unlink(missing_ok=True)
        if folder.exists():
            sync_directory(folder)
        self.index.remove_snapshot(snapshot)

    def remove_snapshot_files(self, vm_id: str, snapshot: str) -> None:
        """Remove the folder of a snapshot that does not exist; one that is gone is no error."""
        folder = self.snapshot_folder(vm_id, snapshot)
        assert not (folder / "manifest.json").exists()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        sync_directory(folder.parent)

    def labels(self, vm_id: str, snapshot: str) -> Labels:
        """What the user said of a snapshot since it was taken."""
        path = self.snapshot_folder(vm_id, snapshot) / "labels.json"
        return _read(path, Labels) if path.exists() else Labels()

    def save_labels(self, manifest: Manifest, labels: Labels) -> None:
        """Keep what the user says of a snapshot, in place of what was said before."""
        _write(self.snapshot_folder(manifest.vm_id, manifest.id) / "labels.json", labels)
        self.index.put_snapshot(manifest, labels)

    def has_manifest(self, vm_id: str, snapshot: str) -> bool:
        """Whether a snapshot exists."""
        return bool(snapshot) and (self.snapshot_folder(vm_id, snapshot) / "manifest.json").exists()

    # --- operations ------------------------------------------------------------------------------

    def unfinished(self, vm_id: str) -> list[Path]:
        """The journals of operations on a VM that are under way or were cut off, oldest first."""
        return _journals(self.folder(vm_id) / "journal")

    def history(self, vm_id: str) -> list[Path]:
        """The journals of operations on a VM that have ended, oldest first."""
        return _journals(self.folder(vm_id) / "history")

    def sweep(self, vm_id: str) -> None:
        """Remove temporary files and the folders of snapshots that have no manifest.

        The caller holds the VM's lock, and no journal refers to them any more.
        """
        folder = self.folder(vm_id)
        for path in folder.rglob(f"{TEMPORARY_PREFIX}*"):
            path.unlink(missing_ok=True)
        for path in (folder / "snapshots").glob("*"):
            if not (path / "manifest.json").exists():
                shutil.rmtree(path)

    # --- index -----------------------------------------------------------------------------------

    def index_fault(self) -> str:
        """What is wrong with the index's file, in words; "" if nothing is, or if there is none."""
        return Index.fault_of(self.root / "index.sqlite", self._ids_on_disk())

    def rebuild_index(self) -> int:
        """Make the index anew from what can be read; return how many snapshots there are.

        What cannot be read is noted in `damage`, and is in the way of nothing else.
        """
        vm_ids, snapshots = self._ids_on_disk()
        records, spoiled_records = _sound(self.record, sorted(vm_ids))
        manifests, spoiled_manifests = _sound(
            lambda snapshot: _read(snapshots[snapshot] / "manifest.json", Manifest),
            sorted(snapshots),
        )
        self.damage = spoiled_records + spoiled_manifests
        read = {record.id for record in records} | {manifest.id for manifest in manifests}
        labelled = [(each, self._sound_labels(each)) for each in manifests]
        self.index.rebuild(records, labelled, {*vm_ids, *snapshots} - read)
        return len(manifests)

    def _sound_labels(self, manifest: Manifest) -> Labels:
        """What the user said of a snapshot, as far as it can be read."""
        found, damage = _sound(lambda each: self.labels(manifest.vm_id, each), [manifest.id])
        self.damage += damage
        return found[0] if found else Labels()

    def _ids_on_disk(self) -> tuple[set[str], dict[str, Path]]:
        """The ids of the VMs, and the folders of the snapshots that have a manifest, by id."""
        vm_ids = {path.parent.name for path in self._vms.glob("*/record.json")}
        return vm_ids, self._snapshots_of("*")

    def _snapshots_of(self, vm_id: str) -> dict[str, Path]:
        """The folders of the snapshots of a VM, or of all (`*`), that have a manifest, by id."""
        manifests = self._vms.glob(f"{vm_id}/snapshots/*/manifest.json")
        return {path.parent.name: path.parent for path in manifests}


_OURS = frozenset({"vms", "forgotten", "index.sqlite", "naming.lock"})
_OF_ANY_FILE_SYSTEM = frozenset({"lost+found"})


def _refuse_other_things(root: Path) -> None:
    """Refuse to keep a store, and to make private, what is no store of ours and not empty.

    Raises:
        HostError: It is no folder, or it holds other things and nothing of ours.
    """
    remedy = "name another with --store"
    if root.exists() and not root.is_dir():
        raise HostError(f"cannot keep a store in {root}: it is no folder", remedy, path=str(root))
    with host_errors(root):
        found = {entry.name for entry in root.iterdir()} if root.is_dir() else set()
    if found - _OF_ANY_FILE_SYSTEM and not found & _OURS:
        raise HostError(f"{root} is no store: it holds other things", remedy, path=str(root))


def _sound(
    read: Callable[[str], _Kept], ids: Iterable[str]
) -> tuple[list[_Kept], list[StoreError]]:
    """What can be read of *ids*, and what is wrong with the others."""
    sound, damage = [], []
    for each in ids:
        try:
            sound.append(read(each))
        except StoreError as error:
            damage.append(error)
    return sound, damage


def _opened_lock(path: Path) -> TextIO:
    """A lock's file, for its owner alone; made if it is not there, never removed."""
    with host_errors(path):
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")


def _journals(folder: Path) -> list[Path]:
    found = folder.glob("*.jsonl") if folder.is_dir() else ()
    return sorted(found, key=lambda path: (_written_ns(path), path.name))


def _written_ns(path: Path) -> int:
    """When a file was written; 0 where it is gone: its operation has ended meanwhile."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _start_ticks() -> str:
    """When this process was started, in clock ticks since boot (proc(5), stat)."""
    return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]


def _write(path: Path, value: msgspec.Struct) -> None:
    """Keep *value* as canonical JSON: sorted members, so that equal values are equal bytes."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(value, order="sorted")))


def _read(path: Path, kind: type[_Kept]) -> _Kept:
    try:
        value = msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise _damaged(path, f"cannot read {path}: {error.strerror}", kind) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, f"{path} is not what it should be: {error}", kind) from error
    return value


_REMEDIES: Mapping[type[msgspec.Struct], str] = {
    VmRecord: "put it back from a copy; other VMs are not affected",
    Process: "remove it if no QEMU runs this VM, else write its pid and start time into it again",
    Manifest: "put it back from a copy; or, to give that snapshot up, move {folder} away and run"
    " `calotype doctor --rebuild`",
    Labels: "put it back from a copy, or remove it: then the manifest's own tag counts again",
}


def _damaged(path: Path, problem: str, kind: type[msgspec.Struct]) -> StoreError:
    return StoreError(problem, _REMEDIES[kind].format(folder=path.parent), path=str(path))

"""The store: one folder that holds all that Calotype knows.

::

    STORE/
        index.sqlite                    a picture of the rest; may be deleted at any time
        vms/VM-ID/
            record.json                 the definition, and which images hold the newest content
            process.json                the QEMU that runs it, if one does
            lock                        held by the one operation that changes this VM
            control.sock query.sock console.sock
            qemu.log console.log
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
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from calotype.errors import ConflictError, HostError, NotFoundError, StoreError
from calotype.model.labels import Labels
from calotype.model.snapshot import Manifest
from calotype.model.vm import Process, VmRecord
from calotype.store.files import make_private_directory, sync_directory, write_atomically
from calotype.store.index import Index

_Kept = TypeVar("_Kept", VmRecord, Process, Manifest, Labels)


class Store:
    """All that is kept, below one folder.

    Args:
        root: The folder; made if it is not there, for its owner alone.

    Raises:
        HostError: The folder cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
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

    def forgotten(self) -> list[VmRecord]:
        """The VMs that were forgotten; their images may still be immutable."""
        folders = sorted(self._forgotten.iterdir())
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
        """Keep a record, in place of the one before."""
        _write(self.folder(record.id) / "record.json", record)
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
    def locked(self, record: VmRecord) -> Iterator[None]:
        """Be the only one who changes this VM, for the length of a `with` block.

        The lock dies with its holder.

        Raises:
            ConflictError: Another process is at it.
        """
        path = self.folder(record.id) / "lock"
        with path.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise ConflictError(
                    f"process {holder} is changing the VM {record.name!r}",
                    "wait until it is done",
                    holder=holder,
                ) from error
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            yield

    # --- snapshots -------------------------------------------------------------------------------

    def manifest(self, vm_id: str, snapshot: str) -> Manifest:
        """A snapshot's manifest, from its file."""
        return _read(self.snapshot_folder(vm_id, snapshot) / "manifest.json", Manifest)

    def manifests(self, vm_id: str) -> list[Manifest]:
        """Every snapshot of a VM, oldest first."""
        return [self.manifest(vm_id, entry.id) for entry in self.index.snapshots(vm_id)]

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

    def revoke(self, vm_id: str, snapshot: str) -> None:
        """Undo `commit`."""
        (self.snapshot_folder(vm_id, snapshot) / "manifest.json").unlink(missing_ok=True)
        self.index.remove_snapshot(snapshot)

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

    # --- index -----------------------------------------------------------------------------------

    def rebuild_index(self) -> int:
        """Make the index anew from records and manifests; return how many snapshots there are."""
        vm_ids, snapshots = self._ids_on_disk()
        manifests = [_read(path / "manifest.json", Manifest) for path in snapshots.values()]
        labelled = [(each, self.labels(each.vm_id, each.id)) for each in manifests]
        self.index.rebuild(map(self.record, vm_ids), labelled)
        return len(manifests)

    def _ids_on_disk(self) -> tuple[set[str], dict[str, Path]]:
        """The ids of the VMs, and the folders of the snapshots that have a manifest, by id."""
        vm_ids = {path.parent.name for path in self._vms.glob("*/record.json")}
        manifests = self._vms.glob("*/snapshots/*/manifest.json")
        return vm_ids, {path.parent.name: path.parent for path in manifests}


def _write(path: Path, value: msgspec.Struct) -> None:
    """Keep *value* as canonical JSON: sorted members, so that equal values are equal bytes."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(value, order="sorted")))


def _read(path: Path, kind: type[_Kept]) -> _Kept:
    try:
        value = msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}", path=str(path)) from error
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise StoreError(f"{path} is not what it should be: {error}", path=str(path)) from error
    return value

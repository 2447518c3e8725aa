"""The index: what `ps` and `list` need of every VM and snapshot, in one SQLite file.

It is a picture of records and manifests and holds nothing that they do not. It notices by itself
when it is out of date, for it may lag behind after a crash, or be deleted.
"""

import contextlib
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import msgspec

from calotype.model.labels import UNLABELLED, Labels, labelled
from calotype.model.snapshot import Manifest
from calotype.model.vm import VmRecord

SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE vms (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, parent TEXT);
CREATE TABLE snapshots (
    id TEXT PRIMARY KEY, vm_id TEXT NOT NULL, parent TEXT, tag TEXT NOT NULL,
    description TEXT NOT NULL, instant TEXT NOT NULL, method TEXT NOT NULL,
    run_state TEXT NOT NULL, machine_state TEXT NOT NULL, bytes INTEGER NOT NULL, pause_ms REAL,
    is_protected INTEGER NOT NULL
);
CREATE INDEX by_vm ON snapshots (vm_id, instant);
"""


class SnapshotEntry(msgspec.Struct, frozen=True):
    """What a list says of one snapshot."""

    id: str
    vm_id: str
    parent: str | None
    tag: str
    description: str
    instant: str
    method: str
    run_state: str
    machine_state: str
    bytes: int
    pause_ms: float | None
    is_protected: bool = False


def entry_of(manifest: Manifest, labels: Labels = UNLABELLED) -> SnapshotEntry:
    """The entry of a manifest, with what the user said of it since."""
    manifest = labelled(manifest, labels)
    return SnapshotEntry(
        id=manifest.id,
        vm_id=manifest.vm_id,
        parent=manifest.parent,
        tag=manifest.tag,
        description=manifest.description,
        instant=manifest.instant,
        method=manifest.method,
        run_state=manifest.run_state,
        machine_state=manifest.machine_state.kind if manifest.machine_state else "none",
        bytes=manifest.bytes_written,
        pause_ms=manifest.timings.pause_ms,
        is_protected=labels.is_protected,
    )


class Index:
    """The index in the file *path*; a file that is no index of this version counts as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._make()

    def _make(self) -> None:
        """Make the tables, unless they are there; others may be doing the same."""
        try:
            with self._open() as database:
                if _version(database) != SCHEMA_VERSION:
                    database.execute("BEGIN IMMEDIATE")
                    _make_tables(database)
        except sqlite3.DatabaseError as error:
            self._remove_damaged(error)
            with self._open() as database:
                database.execute("BEGIN IMMEDIATE")
                _make_tables(database)
        self._path.chmod(0o600)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self._path, timeout=10, isolation_level=None)
        try:
            with database:
                yield database
        finally:
            database.close()

    def rebuild(
        self, records: Iterable[VmRecord], manifests: Iterable[tuple[Manifest, Labels]]
    ) -> None:
        """Make it anew, in one transaction: others see the old one or the new one."""
        kept = (list(records), list(manifests))
        try:
            self._fill(*kept)
        except sqlite3.DatabaseError as error:
            self._remove_damaged(error)
            self._make()
            self._fill(*kept)

    def _remove_damaged(self, error: sqlite3.DatabaseError) -> None:
        """Remove the file; but one that is only in use by others is sound."""
        if "locked" in str(error):
            raise error
        self._path.unlink(missing_ok=True)

    def _fill(
        self, records: Iterable[VmRecord], manifests: Iterable[tuple[Manifest, Labels]]
    ) -> None:
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("DELETE FROM vms")
            database.execute("DELETE FROM snapshots")
            for record in records:
                _put_vm(database, record)
            for manifest, labels in manifests:
                _put_snapshot(database, manifest, labels)

    def is_current(self, on_disk: tuple[Collection[str], Collection[str]]) -> bool:
        """Whether it holds just the VMs and snapshots that are *on_disk*, by their ids."""
        vm_ids, snapshots = on_disk
        try:
            with self._open() as database:
                known_vms = {row[0] for row in database.execute("SELECT id FROM vms")}
                known = {row[0] for row in database.execute("SELECT id FROM snapshots")}
        except sqlite3.DatabaseError:
            return False
        return known_vms == set(vm_ids) and known == set(snapshots)

    def put_vm(self, record: VmRecord) -> None:
        """Add or replace a VM."""
        with self._open() as database:
            _put_vm(database, record)

    def remove_vm(self, vm_id: str) -> None:
        """Remove a VM and its snapshots."""
        with self._open() as database:
            database.execute("DELETE FROM vms WHERE id = ?", (vm_id,))
            database.execute("DELETE FROM snapshots WHERE vm_id = ?", (vm_id,))

    def put_snapshot(self, manifest: Manifest, labels: Labels = UNLABELLED) -> None:
        """Add or replace a snapshot."""
        with self._open() as database:
            _put_snapshot(database, manifest, labels)

    def remove_snapshot(self, snapshot: str) -> None:
        """Remove a snapshot."""
        with self._open() as database:
            database.execute("DELETE FROM snapshots WHERE id = ?", (snapshot,))

    def vm_named(self, name: str) -> str | None:
        """The id of the VM called *name*; bytes that are no text name none."""
        if not _is_text(name):
            return None
        with self._open() as database:
            row = database.execute("SELECT id FROM vms WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else None

    def vm_ids(self) -> list[str]:
        """All VMs, by name."""
        with self._open() as database:
            return [row[0] for row in database.execute("SELECT id FROM vms ORDER BY name")]

    def snapshots(self, vm_id: str) -> list[SnapshotEntry]:
        """All snapshots of a VM, oldest first."""
        fields = SnapshotEntry.__struct_fields__
        columns = ", ".join(fields)
        with self._open() as database:
            rows = database.execute(
                f"SELECT {columns} FROM snapshots WHERE vm_id = ? ORDER BY instant, id",  # noqa: S608
                (vm_id,),
            ).fetchall()
        members = (dict(zip(fields, row, strict=True)) for row in rows)
        return [msgspec.convert(each, SnapshotEntry, strict=False) for each in members]


def _version(database: sqlite3.Connection) -> int:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    return int(version)


def _make_tables(database: sqlite3.Connection) -> None:
    """Make the tables anew, inside a transaction that is open."""
    if _version(database) == SCHEMA_VERSION:
        return
    for table in ("vms", "snapshots"):
        database.execute(f"DROP TABLE IF EXISTS {table}")
    for statement in filter(str.strip, _SCHEMA.split(";")):
        database.execute(statement)
    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _is_text(name: str) -> bool:
    """Whether SQLite can hold it: an argument that is not UTF-8 reaches Python as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _put_vm(database: sqlite3.Connection, record: VmRecord) -> None:
    database.execute(
        "INSERT OR REPLACE INTO vms VALUES (?, ?, ?)", (record.id, record.name, record.parent)
    )


def _put_snapshot(database: sqlite3.Connection, manifest: Manifest, labels: Labels) -> None:
    row = msgspec.structs.astuple(entry_of(manifest, labels))
    places = ", ".join("?" * len(row))
    database.execute(f"INSERT OR REPLACE INTO snapshots VALUES ({places})", row)  # noqa: S608

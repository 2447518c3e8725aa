"""The index: what `ps` and `list` need of every VM and snapshot, in one SQLite file.

It is a picture of records and manifests and holds nothing that they do not. It notices by itself
when it is out of date, for it may lag behind after a crash, or be deleted.

A file that is damaged is removed and made anew. A full disk, a lock and a missing permission are no
damage: the file stays, and whoever only reads gets the same picture in memory. Which it is is told
by SQLite's error codes (https://sqlite.org/rescode.html), never by its texts.
"""

import contextlib
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import msgspec

from calotype.errors import HostError, StoreError
from calotype.model.labels import UNLABELLED, Labels, labelled
from calotype.model.names import is_text
from calotype.model.snapshot import Consistency, Manifest
from calotype.model.vm import VmRecord
from calotype.store.files import host_errors

SCHEMA_VERSION = 4
_SCHEMA = """
CREATE TABLE vms (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE snapshots (
    id TEXT PRIMARY KEY, vm_id TEXT NOT NULL, parent TEXT, tag TEXT NOT NULL,
    description TEXT NOT NULL, instant TEXT NOT NULL, method TEXT NOT NULL,
    run_state TEXT NOT NULL, machine_state TEXT NOT NULL, bytes INTEGER NOT NULL, pause_ms REAL,
    consistency TEXT NOT NULL, is_protected INTEGER NOT NULL
);
CREATE INDEX by_vm ON snapshots (vm_id, instant);
"""


_PATIENCE_S = 4.0
"""How long another may hold it: its transactions take milliseconds."""

_DAMAGE = frozenset({
    sqlite3.SQLITE_ERROR,  # no such table, no such column: none of ours
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_FORMAT,
})  # fmt: skip
"""The codes that say that the file is no index of ours, or not any more."""

_MAY_WRITE = "run as a user who may write it, or grant the permission"
_REMEDIES = {
    sqlite3.SQLITE_FULL: "free some space on that file system",
    sqlite3.SQLITE_BUSY: "wait until the other command is done",
    sqlite3.SQLITE_LOCKED: "wait until the other command is done",
    sqlite3.SQLITE_PERM: _MAY_WRITE,
    sqlite3.SQLITE_READONLY: _MAY_WRITE,
    sqlite3.SQLITE_AUTH: _MAY_WRITE,
    sqlite3.SQLITE_CANTOPEN: "see what is at that path: it must be a file that we may write to, on"
    " a file system with some space",
    sqlite3.SQLITE_IOERR: "see whether that file system is full, and look into the kernel log",
}
_OTHER_REMEDY = "see what is at that path; the file may be removed, and is made anew then"


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
    consistency: Consistency
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
        consistency=manifest.consistency,
        is_protected=labels.is_protected,
    )


class Index:
    """The index in the file *path*; a file that is no index of this version counts as empty.

    Without a path there is nothing to be kept an index of: it is empty, and in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path or Path()
        self._memory: sqlite3.Connection | None = None
        self.fault: HostError | None = None
        """Why the file cannot be used; the index is in memory then, and cannot be changed."""
        try:
            if path is None:
                self._hold_in_memory()
            else:
                self._repaired(self._make)
        except HostError as error:
            self._turn_to_memory(error)

    @staticmethod
    def fault_of(path: Path, on_disk: tuple[Collection[str], Collection[str]]) -> str:
        """What is wrong with an index, in words, without mending it; "" if nothing is."""
        if not path.exists():
            return ""
        try:
            uri = f"{path.absolute().as_uri()}?mode=ro"
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=1)) as database:
                if _version(database) != SCHEMA_VERSION:
                    return f"{path} is of another version"
                known = [{row[0] for row in database.execute(f"SELECT id FROM {table}")}  # noqa: S608
                         for table in ("vms", "snapshots")]  # fmt: skip
        except sqlite3.Error as error:
            return f"{path} is damaged, or cannot be read: {error}"
        return "" if known == [set(ids) for ids in on_disk] else f"{path} is out of date"

    def _make(self) -> None:
        """Make the tables, unless they are there; others may be doing the same."""
        with self._open() as database:
            if _version(database) == SCHEMA_VERSION:
                return
            database.execute("BEGIN IMMEDIATE")
            _make_tables(database)
        self._path.chmod(0o600)

    def _turn_to_memory(self, fault: HostError) -> None:
        """Go on with an empty index that nobody else sees."""
        self.fault = fault
        self._hold_in_memory()

    def _hold_in_memory(self) -> None:
        self._memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        _make_tables(self._memory)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """The index, for a `with` block, which is a transaction if it begins one.

        Raises:
            HostError: The host does not let us, or not now.
            StoreError: It is damaged.
        """
        with _our_errors(self._path, self.fault):
            if self._memory is not None:
                yield self._memory
                return
            database = sqlite3.connect(self._path, timeout=_PATIENCE_S, isolation_level=None)
            try:
                with database:
                    yield database
            finally:
                database.close()

    def _repaired(self, act: Callable[[], None]) -> None:
        """Do *act*; on an index that is damaged once more, on one that is made anew."""
        try:
            act()
        except StoreError:
            with host_errors(self._path):
                self._path.unlink(missing_ok=True)
            self._make()
            act()

    def rebuild(
        self,
        records: Iterable[VmRecord],
        manifests: Iterable[tuple[Manifest, Labels]],
        unread: Collection[str] = (),
    ) -> None:
        """Make it anew, in one transaction: others see the old one or the new one.

        Args:
            records: Every VM.
            manifests: Every snapshot, with what the user said of it since.
            unread: Ids of VMs and snapshots that are there but cannot be read; they stay as known.
        """
        kept = (list(records), list(manifests), list(unread))
        try:
            self._repaired(lambda: self._fill(*kept))
        except HostError as error:
            if self.fault is None:
                self._turn_to_memory(error)
            self._fill(*kept)

    def _fill(
        self,
        records: Iterable[VmRecord],
        manifests: Iterable[tuple[Manifest, Labels]],
        unread: Collection[str],
    ) -> None:
        with self._open() as database:
            database.execute("PRAGMA query_only = OFF")
            database.execute("BEGIN IMMEDIATE")
            for table in ("vms", "snapshots"):
                for (known,) in database.execute(f"SELECT id FROM {table}").fetchall():  # noqa: S608
                    if known not in unread:
                        database.execute(f"DELETE FROM {table} WHERE id = ?", (known,))  # noqa: S608
            for record in records:
                _put_vm(database, record)
            for manifest, labels in manifests:
                _put_snapshot(database, manifest, labels)
            if self._memory is not None:
                database.execute("COMMIT")
                database.execute("PRAGMA query_only = ON")

    def is_current(self, on_disk: tuple[Collection[str], Collection[str]]) -> bool:
        """Whether it holds just the VMs and snapshots that are *on_disk*, by their ids."""
        vm_ids, snapshots = on_disk
        try:
            with self._open() as database:
                known_vms = {row[0] for row in database.execute("SELECT id FROM vms")}
                known = {row[0] for row in database.execute("SELECT id FROM snapshots")}
        except (HostError, StoreError):
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
        if not is_text(name):
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


@contextlib.contextmanager
def _our_errors(path: Path, fault: HostError | None) -> Iterator[None]:
    """Tell SQLite's errors as ours: damage, or *fault*, or what the host does not let us do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & 0xFF
        if fault is not None:
            raise fault from error
        if code in _DAMAGE:
            raise StoreError(
                f"{path} is damaged: {error}", "`calotype doctor --rebuild`", path=str(path)
            ) from error
        remedy = _REMEDIES.get(code, _OTHER_REMEDY)
        raise HostError(f"{path}: {error}", remedy, path=str(path)) from error


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


def _put_vm(database: sqlite3.Connection, record: VmRecord) -> None:
    database.execute("INSERT OR REPLACE INTO vms VALUES (?, ?)", (record.id, record.name))


def _put_snapshot(database: sqlite3.Connection, manifest: Manifest, labels: Labels) -> None:
    row = msgspec.structs.astuple(entry_of(manifest, labels))
    places = ", ".join("?" * len(row))
    database.execute(f"INSERT OR REPLACE INTO snapshots VALUES ({places})", row)  # noqa: S608

"""The store: files are the truth, the index is a picture, names are data, locks die with us."""

import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from builders import OTHER, SNAPSHOT, VM_ID, make_manifest, make_record
from calotype.cli.main import main
from calotype.errors import ConflictError, HostError, NotFoundError, StoreError
from calotype.model.vm import Process, VmRecord
from calotype.qemu.process import start_ticks
from calotype.store.store import Store

SECOND_VM = "00000000000000a1"

NAMES = [
    "web",
    "a/b",
    "../../x",
    "..",
    "/etc/passwd",
    " ",
    "two words",
    "it's",
    '"quoted"',
    "'; DROP TABLE vms; --",
    "%s {0} $HOME `id`",
    "Grüße-☃",
    "e\u0301",
    "%",
]


def kept(store: Store, record: VmRecord | None = None) -> VmRecord:
    record = record or make_record()
    store.make_vm_folder(record.id)
    store.save(record)
    return record


def take(store: Store, snapshot: str = SNAPSHOT, vm_id: str = VM_ID, **changes: Any) -> None:
    store.make_snapshot_folder(vm_id, snapshot)
    store.commit(make_manifest(id=snapshot, vm_id=vm_id, **changes))


def filled(root: Path) -> Store:
    """Two VMs, three snapshots."""
    store = Store(root)
    kept(store, make_record(parent=OTHER))
    kept(store, make_record(id=SECOND_VM, name="it's mail"))
    take(store, tag="first")
    take(store, OTHER, parent=SNAPSHOT, instant="2025-01-03T00:00:00+00:00", description="x")
    take(store, "00000000000000d1", SECOND_VM, machine_state=None, method="left-behind")
    return store


def paths(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


# --- VMs -----------------------------------------------------------------------------------------


def test_a_record_is_found_by_name_and_by_id(tmp_path: Path) -> None:
    record = kept(Store(tmp_path))
    assert Store(tmp_path).find("web") == record
    assert Store(tmp_path).record(VM_ID) == record
    assert Store(tmp_path).records() == [record]


def test_a_vm_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no VM called 'web'") as caught:
        Store(tmp_path).find("web")
    assert caught.value.data == {"vm": "web"}


def test_a_record_is_replaced_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept(store)
    after = kept(store, make_record(parent=SNAPSHOT, disks=()))
    assert store.find("web") == after
    assert paths(store.folder(VM_ID)) == {"record.json", "snapshots"}


def test_vms_are_listed_by_name(tmp_path: Path) -> None:
    store = filled(tmp_path)
    assert [record.name for record in store.records()] == ["it's mail", "web"]


def test_a_forgotten_vm_leaves_the_catalogue_with_all_its_files(tmp_path: Path) -> None:
    store = filled(tmp_path)
    before, record = paths(store.folder(VM_ID)), store.find("web")
    folder = store.forget(record)
    assert paths(folder) == before
    assert store.index.snapshots(VM_ID) == []
    assert Store(tmp_path).forgotten() == [record]
    assert [left.name for left in Store(tmp_path).records()] == ["it's mail"]
    assert Store(tmp_path).index.snapshots(VM_ID) == []
    with pytest.raises(NotFoundError):
        store.find("web")


def test_a_forgotten_name_can_be_given_again(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.forget(store.find("web"))
    anew = kept(store, make_record(id="00000000000000a9"))
    assert Store(tmp_path).find("web") == anew


def test_a_vm_that_never_started_is_dropped_with_its_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    before = paths(tmp_path)
    store.drop(kept(store))
    assert paths(tmp_path) == before
    assert store.records() == []


def test_the_process_is_kept_beside_the_record(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept(store)
    assert store.process(VM_ID) is None
    store.save_process(VM_ID, Process(42, 4242))
    assert Store(tmp_path).process(VM_ID) == Process(42, 4242)


def test_everything_is_for_its_owner_alone(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "store"
    before = os.umask(0)
    try:
        store = filled(root)
        with store.locked(store.find("web"), "take"):
            pass
    finally:
        os.umask(before)
    for path in (root, *root.rglob("*")):
        if path.is_dir() or path.name != "lock":
            assert path.stat().st_mode & 0o077 == 0, path


def test_a_place_that_cannot_be_a_store_is_a_host_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError):
        Store(tmp_path / "file")
    with pytest.raises(HostError):
        Store(tmp_path / "file" / "below")


# --- names are data ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_data_and_never_a_path_or_a_query(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "one" / "two" / "store"
    plain = tmp_path / "plain"
    for root, given in ((inner, name), (plain, "web")):
        store = Store(root)
        kept(store, make_record(name=given))
        take(store, tag=given, description=given, vm_name=given)
    assert Store(inner).find(name).name == name
    assert Store(inner).index.snapshots(VM_ID)[0].tag == name
    assert Store(inner).manifest(VM_ID, SNAPSHOT).description == name
    assert paths(inner) == paths(plain)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "plain"]
    (inner / "index.sqlite").unlink()
    assert Store(inner).find(name).name == name


@pytest.mark.parametrize("wanted", [*NAMES, "WEB", "we", "we%", "w_b", "web ", ""])
def test_a_name_is_compared_whole(tmp_path: Path, wanted: str) -> None:
    store = Store(tmp_path)
    kept(store, make_record(name="web2"))
    with pytest.raises(NotFoundError):
        store.find(wanted)


def test_names_that_look_alike_are_two(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept(store, make_record(name="é"))
    kept(store, make_record(id=SECOND_VM, name="e\u0301"))
    assert store.find("é").id == VM_ID
    assert store.find("e\u0301").id == SECOND_VM


# --- snapshots -----------------------------------------------------------------------------------


def test_a_snapshot_exists_from_its_manifest_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept(store)
    store.make_snapshot_folder(VM_ID, SNAPSHOT)
    (store.snapshot_folder(VM_ID, SNAPSHOT) / "machine-state").write_bytes(b"x")
    assert Store(tmp_path).manifests(VM_ID) == []
    store.commit(make_manifest())
    assert Store(tmp_path).manifests(VM_ID) == [make_manifest()]
    store.drop_snapshot(VM_ID, SNAPSHOT)
    assert Store(tmp_path).manifests(VM_ID) == []
    assert store.index.snapshots(VM_ID) == []


def test_undoing_is_right_for_what_never_happened(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept(store)
    before = paths(tmp_path)
    store.make_snapshot_folder(VM_ID, OTHER)
    for _ in range(2):
        store.drop_snapshot(VM_ID, OTHER)
        store.remove_snapshot_folder(VM_ID, OTHER)
    assert paths(tmp_path) == before


def test_snapshots_are_oldest_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept(store)
    for snapshot, second in (("c" * 16, 1), ("a" * 16, 3), ("b" * 16, 2)):
        take(store, snapshot, instant=f"2025-01-02T03:04:0{second}+00:00")
    assert [manifest.id[0] for manifest in store.manifests(VM_ID)] == ["c", "b", "a"]


def test_an_entry_of_the_index_says_what_the_manifest_says(tmp_path: Path) -> None:
    store = filled(tmp_path)
    first, second = store.index.snapshots(VM_ID)
    manifest = store.manifest(VM_ID, SNAPSHOT)
    assert (first.id, first.tag, first.parent) == (SNAPSHOT, "first", None)
    assert (first.bytes, first.pause_ms) == (1 << 20, 12.5)
    assert (first.machine_state, first.method, first.run_state) == ("external", "live", "running")
    assert first.instant == manifest.instant
    assert (second.parent, second.description) == (SNAPSHOT, "x")
    (left,) = store.index.snapshots(SECOND_VM)
    assert (left.machine_state, left.bytes, left.method) == ("none", 0, "left-behind")


# --- index ---------------------------------------------------------------------------------------


def spoil(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def older_schema(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE vms (other)")
        database.execute("PRAGMA user_version = 99")
    database.close()


def damage_inside(path: Path) -> None:
    """What a bad disk does: the header is sound, the pages are not."""
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes(len(content) - 100))


def without_tables(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 1")
    database.close()


def forget_a_row(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM snapshots WHERE parent IS NULL")
    database.close()


def add_a_row(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("INSERT INTO vms VALUES ('dead', 'beef')")
    database.close()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": lambda path: spoil(path, b""),
    "garbage": lambda path: spoil(path, b"\0\xffgarbage" * 1000),
    "text": lambda path: spoil(path, b"not a database\n"),
    "of another version": older_schema,
    "lagging behind": forget_a_row,
    "ahead": add_a_row,
}

UNSOUND: dict[str, Callable[[Path], object]] = {
    "damaged inside": damage_inside,
    "without tables": without_tables,
}


def listed(root: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> bytes:
    """The bytes that `calotype list --json` prints."""
    capfdbinary.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["list", "--json", "--store", str(root)])
    assert caught.value.code == 0
    return capfdbinary.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        *(pytest.param(damage, id=name) for name, damage in DAMAGES.items()),
        *(
            pytest.param(
                damage,
                id=name,
            )
            for name, damage in UNSOUND.items()
        ),
    ],
)
def test_an_index_is_made_anew_and_says_the_same(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], damage: Callable[[Path], object]
) -> None:
    filled(tmp_path)
    before = listed(tmp_path, capfdbinary)
    assert before.count(b'"instant"') == 3
    damage(tmp_path / "index.sqlite")
    assert listed(tmp_path, capfdbinary) == before
    assert (tmp_path / "index.sqlite").stat().st_mode & 0o077 == 0


def test_an_index_that_is_current_is_left_alone(tmp_path: Path) -> None:
    filled(tmp_path)
    before = (tmp_path / "index.sqlite").stat()
    Store(tmp_path)
    after = (tmp_path / "index.sqlite").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_making_the_index_anew_counts_the_snapshots(tmp_path: Path) -> None:
    assert filled(tmp_path).rebuild_index() == 3


def test_a_new_store_may_be_opened_by_several_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        for attempt in range(10):
            opened = [threads.submit(Store, tmp_path / str(attempt)) for _ in range(4)]
            assert [each.result().records() for each in opened] == [[]] * 4


def test_snapshots_can_be_kept_while_others_look(tmp_path: Path) -> None:
    """Whoever looks between a manifest's rename and its entry makes the index anew meanwhile."""
    store = Store(tmp_path)
    kept(store)
    is_done = threading.Event()

    def look() -> int:
        looks = 0
        while not is_done.is_set():
            Store(tmp_path).index.snapshots(VM_ID)
            looks += 1
        return looks

    with ThreadPoolExecutor(1) as threads:
        looking = threads.submit(look)
        try:
            for number in range(100):
                take(store, f"{number:016x}")
        finally:
            is_done.set()
        assert looking.result() > 0
    assert len(Store(tmp_path).index.snapshots(VM_ID)) == 100


# --- an index that cannot be used -----------------------------------------------------------------

Connect = Callable[..., sqlite3.Connection]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """Let SQLite find no room for another page from now on."""

    def fill() -> None:
        connect: Connect = sqlite3.connect

        def connected(path: object, **settings: Any) -> sqlite3.Connection:
            database = connect(path, **settings)
            if path != ":memory:":
                database.execute("PRAGMA max_page_count = 1")
            return database

        monkeypatch.setattr(sqlite3, "connect", connected)

    return fill


def many_snapshots(root: Path) -> Store:
    """Enough of them that one more needs a page of its own."""
    store = filled(root)
    for number in range(30):
        take(store, f"{number:016x}", description="x" * 2000)
    return store


def test_a_full_disk_is_no_damage(tmp_path: Path, full_disk: Callable[[], object]) -> None:
    store = many_snapshots(tmp_path)
    before = (tmp_path / "index.sqlite").stat()
    full_disk()
    with pytest.raises(HostError, match="full") as caught:
        store.index.put_snapshot(make_manifest(id="f" * 16, description="y" * 90_000))
    assert "free some space" in caught.value.remedy
    assert (tmp_path / "index.sqlite").stat().st_ino == before.st_ino
    assert len(Store(tmp_path).index.snapshots(VM_ID)) == 32


def test_an_index_that_cannot_be_brought_up_to_date_is_read_from_memory(
    tmp_path: Path, full_disk: Callable[[], object]
) -> None:
    store = many_snapshots(tmp_path)
    entries = store.index.snapshots(VM_ID)
    database = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    for statement in ("DELETE FROM snapshots", "DELETE FROM vms", "VACUUM"):
        database.execute(statement)
    database.close()
    before = (tmp_path / "index.sqlite").read_bytes()
    full_disk()
    store = Store(tmp_path)
    assert store.index.snapshots(VM_ID) == entries
    assert store.find("web").id == VM_ID
    assert (tmp_path / "index.sqlite").read_bytes() == before
    with pytest.raises(HostError, match="full"):
        store.index.put_vm(make_record())


def in_the_way(path: Path) -> None:
    path.unlink()
    path.mkdir()


def without_room(path: Path) -> None:
    """A name that is there, and that nothing can be written to."""
    path.unlink()
    path.symlink_to("/dev/full")


def to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nosuch/folder/index")


UNUSABLE: dict[str, Callable[[Path], object]] = {
    "a folder in its place": in_the_way,
    "a disk that is full": without_room,
    "a link to nowhere": to_nowhere,
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_who_only_reads_needs_no_index_file(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], name: str
) -> None:
    filled(tmp_path)
    before = listed(tmp_path, capfdbinary)
    UNUSABLE[name](tmp_path / "index.sqlite")
    assert listed(tmp_path, capfdbinary) == before
    store = Store(tmp_path)
    changes: list[Callable[[], object]] = [
        lambda: store.index.put_vm(make_record()),
        lambda: store.index.put_snapshot(make_manifest()),
        lambda: store.index.remove_vm(VM_ID),
    ]
    for change in changes:
        with pytest.raises(HostError) as caught:
            change()
        assert caught.value.remedy
        assert caught.value.data["path"] == str(tmp_path / "index.sqlite")
    assert store.rebuild_index() == 3
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--rebuild", "--store", str(tmp_path)])
    assert ended.value.code == 9


def test_an_index_that_others_hold_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path)
    connect: Connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda path, **settings: connect(path, **{**settings, "timeout": 0.01})
    )
    holder = connect(tmp_path / "index.sqlite", isolation_level=None)
    try:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(HostError, match="locked") as caught:
            store.index.put_vm(make_record())
        assert "wait" in caught.value.remedy
        changed = make_record(parent=OTHER)
        store.save(changed)  # a guest may stand still meanwhile
        assert store.record(VM_ID) == changed
        assert len(Store(tmp_path).records()) == 2
    finally:
        holder.close()
    assert (tmp_path / "index.sqlite").stat().st_size > 0


def test_damage_that_is_found_late_is_told_with_its_cure(tmp_path: Path) -> None:
    store = many_snapshots(tmp_path)
    damage_inside(tmp_path / "index.sqlite")
    with pytest.raises(StoreError) as caught:
        store.index.snapshots(VM_ID)
    assert "doctor --rebuild" in caught.value.remedy


# --- files that are not what they should be -------------------------------------------------------

NOT_JSON = b"{"
WRONG_TYPE = b'{"id": 1}'
NOT_TEXT = b"\xff\xfe\x00"
NOT_UTF8 = b'{"id": "\x80"}'


@pytest.mark.parametrize("content", [b"", NOT_JSON, WRONG_TYPE, NOT_TEXT, NOT_UTF8, b"null"])
@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("record.json", lambda store: store.find("web")),
        ("record.json", lambda store: store.records()),
        ("process.json", lambda store: store.process(VM_ID)),
        (f"snapshots/{SNAPSHOT}/manifest.json", lambda store: store.manifest(VM_ID, SNAPSHOT)),
        (f"snapshots/{SNAPSHOT}/manifest.json", lambda store: store.manifests(VM_ID)),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(
    tmp_path: Path, file: str, read: Callable[[Store], object], content: bytes
) -> None:
    store = filled(tmp_path)
    path = store.folder(VM_ID) / file
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        read(store)
    assert caught.value.data == {"path": str(path)}
    assert str(path) in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize("content", [b"", NOT_JSON, WRONG_TYPE, NOT_TEXT, NOT_UTF8, b"null"])
@pytest.mark.parametrize("is_indexed", [True, False])
def test_a_damaged_file_is_in_the_way_of_nothing_else(
    tmp_path: Path, content: bytes, is_indexed: bool
) -> None:
    store = filled(tmp_path)
    spoiled = store.snapshot_folder(VM_ID, SNAPSHOT) / "manifest.json"
    spoiled.write_bytes(content)
    record = store.folder(SECOND_VM) / "record.json"
    record.write_bytes(content)
    if not is_indexed:
        (tmp_path / "index.sqlite").unlink()
    store = Store(tmp_path)
    assert [each.data["path"] for each in store.damage] == (
        [] if is_indexed else [str(record), str(spoiled)]
    )
    manifests, damage = store.sound_manifests(VM_ID)
    assert [manifest.id for manifest in manifests] == [OTHER]
    assert [error.data["path"] for error in damage] == [str(spoiled)]
    records, damage = store.sound_records()
    assert [record.name for record in records] == ["web"]
    assert [error.data["path"] for error in damage] == ([str(record)] if is_indexed else [])
    assert store.find("web").id == VM_ID


def test_a_manifest_that_is_not_there_is_named(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with pytest.raises(StoreError, match="No such file") as caught:
        store.manifest(VM_ID, "ffffffffffffffff")
    assert caught.value.data["path"].endswith("ffffffffffffffff/manifest.json")


def test_a_spoiled_manifest_does_not_hide_the_list(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    store = filled(tmp_path)
    before = listed(tmp_path, capfdbinary)
    (store.snapshot_folder(VM_ID, SNAPSHOT) / "manifest.json").write_bytes(NOT_JSON)
    told, before = (msgspec.json.decode(each) for each in (listed(tmp_path, capfdbinary), before))
    assert (told["vms"], len(told["damaged"])) == (before["vms"], 1)


def test_members_that_a_later_version_adds_do_no_harm(tmp_path: Path) -> None:
    store = filled(tmp_path)
    path = store.folder(VM_ID) / "record.json"
    value = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode({**value, "colour": "blue"}))
    assert store.find("web").id == VM_ID


# --- locks ---------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from calotype.store.store import Store
store = Store(Path(sys.argv[1]))
with store.locked(store.find("web"), "take"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_holder_is_refused_and_told_who_is_first_until_that_one_dies(
    tmp_path: Path,
) -> None:
    store = filled(tmp_path)
    record = store.find("web")
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(ConflictError) as caught, store.locked(record, "take"):
                pytest.fail("two hold one lock")
        finally:
            holder.send_signal(signal.SIGKILL)
    assert caught.value.data == {"holder": str(holder.pid)}
    assert caught.value.problem.startswith(f"process {holder.pid} is changing the VM 'web': ")
    assert "start time" not in caught.value.problem
    with store.locked(record, "take"):
        pass


def test_a_lock_is_let_go_of_by_an_error_too(tmp_path: Path) -> None:
    store = filled(tmp_path)
    record = store.find("web")
    with pytest.raises(ValueError, match="inside"), store.locked(record, "take"):
        raise ValueError("inside")
    with (
        store.locked(record, "take"),
        pytest.raises(ConflictError) as caught,
        store.locked(record, "take"),
    ):
        pytest.fail("two hold one lock")
    assert caught.value.data == {"holder": str(os.getpid())}


def test_each_vm_has_a_lock_of_its_own(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with store.locked(store.find("web"), "take"), store.locked(store.find("it's mail"), "take"):
        pass


def test_a_holder_that_has_not_said_who_it_is_is_unknown(tmp_path: Path) -> None:
    store = filled(tmp_path)
    record = store.find("web")
    with (store.folder(VM_ID) / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConflictError, match="process unknown"), store.locked(record, "take"):
            pytest.fail("two hold one lock")


def test_a_lock_names_its_present_holder_and_not_those_before(tmp_path: Path) -> None:
    store = filled(tmp_path)
    record = store.find("web")
    (store.folder(VM_ID) / "lock").write_text("123456789\n")
    with store.locked(record, "take"):
        told = (store.folder(VM_ID) / "lock").read_text()
    ticks = start_ticks(os.getpid())
    assert told == f"{os.getpid()} take (start time {ticks})\n"

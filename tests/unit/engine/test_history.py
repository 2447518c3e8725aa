"""What was done to a VM is told from its journals, those that are under way included."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from builders import OTHER, SNAPSHOT, VM_ID, make_began, make_record
from calotype.engine.history import Past, history
from calotype.errors import HostError, StoreError
from calotype.plan.steps import AwaitSave, Commit
from calotype.store import journal as journals
from calotype.store import store as stores
from calotype.store.journal import Journal
from calotype.store.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    store.make_vm_folder(VM_ID)
    store.save(make_record())
    return store


def begin(store: Store, **changes: Any) -> Journal:
    return Journal.begin(store.folder(VM_ID), make_began(**changes))


def told(store: Store) -> list[Past]:
    return history(store, store.find("web"))


def test_a_vm_that_nothing_was_done_to_has_no_history(store: Store) -> None:
    assert told(store) == []


def test_an_operation_is_told_whole(store: Store) -> None:
    steps = (AwaitSave(SNAPSHOT, 1), AwaitSave(SNAPSHOT, 2), Commit(SNAPSHOT))
    journal = begin(store, id=OTHER, steps=steps)
    for place, spent_ms in enumerate((1.25, 2.5, 4.0)):
        journal.note_doing(place)
        journal.note_done(place, spent_ms)
    journal.end("done")
    (past,) = told(store)
    assert (past.operation, past.id, past.snapshot) == ("take", OTHER, SNAPSHOT)
    assert (past.outcome, past.error) == ("done", "")
    assert past.at == make_began().at
    assert past.plan == ("AwaitSave", "AwaitSave", "Commit")
    assert past.phases_ms == {"AwaitSave": 3.75, "Commit": 4.0}
    assert past.total_ms is not None
    assert past.total_ms > 0


def test_how_long_it_took_is_from_its_beginning_to_its_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begin(store, at="2025-01-02T03:04:05+00:00")
    monkeypatch.setattr(journals, "_now", lambda: "2025-01-02T03:04:06.500250+00:00")
    journal.end("done")
    assert told(store)[0].total_ms == 1500.25


def test_operations_are_told_oldest_first_however_they_ended(store: Store) -> None:
    for day in (4, 2, 3, 1):
        journal = begin(store, id=f"{day:016}", at=f"2025-01-0{day}T00:00:00+00:00")
        if day % 2:
            journal.end("done")
    assert [(past.id[-1], past.outcome) for past in told(store)] == [
        ("1", "done"), ("2", "unfinished"), ("3", "done"), ("4", "unfinished"),
    ]  # fmt: skip


ERRORS: list[tuple[list[tuple[str, Any]], str, str]] = [
    # what is noted -> how it ended, what went wrong
    ([], "unfinished", ""),
    ([("note_doing", 0)], "unfinished", ""),
    ([("end", "done")], "done", ""),
    ([("note_undoing", "it broke")], "unfinished", "it broke"),
    ([("note_undoing", "it broke"), ("end", "undone")], "undone", "it broke"),
    ([("note_unfinished", ("one", "two"))], "unfinished", "one; two"),
    ([("note_undoing", "it broke"), ("note_unfinished", ("a bug",))], "unfinished", "a bug"),
    ([("note_unfinished", ("a bug",)), ("note_undoing", "again")], "unfinished", "again"),
    ([("note_unfinished", ("a bug",)), ("note_doing", 1)], "unfinished", "a bug"),
]


@pytest.mark.parametrize(("notes", "outcome", "error"), ERRORS)
def test_what_went_wrong_last_is_told(
    store: Store, notes: list[tuple[str, Any]], outcome: str, error: str
) -> None:
    journal = begin(store)
    for note, value in notes:
        getattr(journal, note)(value)
    (past,) = told(store)
    assert (past.outcome, past.error) == (outcome, error)


def test_the_error_of_an_end_is_told_before_what_led_to_it(store: Store) -> None:
    journal = begin(store)
    journal.note_undoing("it broke")
    journal.end("undone", "cut off")
    assert told(store)[0].error == "cut off"


def test_an_end_that_found_no_room_to_be_told_is_unknown(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begin(store)
    journal.note_doing(0)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(HostError):
        journal.note_doing(1)
    journal.end("done")
    (past,) = told(store)
    assert (past.outcome, past.total_ms) == ("unknown", None)


def test_an_altered_journal_is_named(store: Store) -> None:
    path = begin(store).path
    path.write_bytes(path.read_bytes().replace(b"web", b"wab"))
    with pytest.raises(StoreError, match=f"{path} was altered"):
        told(store)


def test_an_operation_that_ends_while_it_is_told_is_told_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begin(store)
    read = journals.read

    def ends_before(path: Path) -> tuple[journals.Entry, ...]:
        if journal.path.exists():
            journal.end("done")
        return read(path)

    monkeypatch.setattr(journals, "read", ends_before)
    (past,) = told(store)
    assert past.outcome == "done"


def test_an_operation_that_ends_while_all_are_listed_is_told_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begin(store)
    listed = Store.history

    def ends_before(store: Store, vm_id: str) -> list[Path]:
        journal.end("done")
        return listed(store, vm_id)

    monkeypatch.setattr(Store, "history", ends_before)
    (past,) = told(store)
    assert past.outcome == "done"


def test_a_journal_that_moves_while_the_folder_is_read_is_no_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = begin(store)
    glob = Path.glob

    def ends_after(folder: Path, pattern: str) -> list[Path]:
        found = list(glob(folder, pattern))
        if journal.path in found:
            journal.end("done")
        return found

    monkeypatch.setattr(Path, "glob", ends_after)
    assert stores._journals(journal.path.parent) == [journal.path]

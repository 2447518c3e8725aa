"""A journal is durable before what it announces, and is believed only as it was written."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from msgspec import Struct

from builders import OTHER, make_began
from calotype.errors import HostError, StoreError
from calotype.plan.steps import AnyStep, Step
from calotype.store import journal as journals
from calotype.store.journal import Began, Did, Doing, Ended, Entry, Journal, Undoing, Unfinished

STEPS = get_args(AnyStep)


def filled(folder: Path) -> Journal:
    """The journal of an operation that fails in its second step, without an end."""
    journal = Journal.begin(folder, make_began())
    journal.note_doing(0)
    journal.note_done(0, 1.5)
    journal.note_doing(1)
    journal.note_undoing("no space")
    journal.note_unfinished(("undoing AwaitSave failed: a bug",))
    return journal


FILLED: tuple[Entry, ...] = (
    make_began(),
    Doing(0),
    Did(0, 1.5),
    Doing(1),
    Undoing("no space"),
    Unfinished(("undoing AwaitSave failed: a bug",)),
)


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def refused_line(path: Path, content: bytes) -> object:
    """The line that is named when a journal of this content is refused."""
    path.write_bytes(content)
    with pytest.raises(StoreError, match="was altered: line ") as refused:
        journals.read(path)
    assert refused.value.remedy
    assert f"line {refused.value.data['line']} " in refused.value.problem
    assert refused.value.data["path"] == str(path)
    return refused.value.data["line"]


# --- what is written is read ---------------------------------------------------------------------


def test_what_is_noted_is_read_in_order(tmp_path: Path) -> None:
    assert journals.read(filled(tmp_path).path) == FILLED


def test_an_end_moves_it_to_the_history(tmp_path: Path) -> None:
    journal = filled(tmp_path)
    journal.end("undone", "no space")
    assert list((tmp_path / "journal").iterdir()) == []
    (path,) = (tmp_path / "history").iterdir()
    *before, end = journals.read(path)
    assert tuple(before) == FILLED
    assert isinstance(end, Ended)
    assert (end.outcome, end.error) == ("undone", "no space")


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type as steps have them."""
    origin, inner = get_origin(hint), get_args(hint)
    composed: dict[Any, Callable[[], st.SearchStrategy[Any]]] = {
        tuple: lambda: (
            st.lists(values(inner[0]), max_size=2).map(tuple)
            if inner[-1] is ...
            else st.tuples(*map(values, inner))
        ),
        dict: lambda: st.dictionaries(*map(values, inner), max_size=2),
        UnionType: lambda: st.one_of(*map(values, inner)),
        Literal: lambda: st.sampled_from(inner),
    }
    if origin in composed:
        return composed[origin]()
    if isinstance(hint, type) and issubclass(hint, Struct):
        fields = {name: values(field) for name, field in get_type_hints(hint).items()}
        return st.builds(hint, **{name: fields[name] for name in hint.__struct_fields__})
    plain: dict[Any, st.SearchStrategy[Any]] = {
        str: st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        int: st.integers(-(1 << 63), (1 << 63) - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        NoneType: st.none(),
    }
    return plain[hint]


PATIENT = settings(
    max_examples=15,
    deadline=None,  # whole records are drawn, twice: how long that takes is the machine's business
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("kind", STEPS)
@PATIENT
@given(data=st.data())
def test_every_kind_of_step_is_read_back(
    tmp_path: Path, kind: type[Step], data: st.DataObject
) -> None:
    began = make_began(steps=(data.draw(values(kind)), data.draw(values(kind))))
    journal = Journal.begin(tmp_path, began)
    (read,) = journals.read(journal.path)
    assert read == began
    assert isinstance(read, Began)
    assert {type(step) for step in read.steps} == {kind}


@pytest.mark.parametrize("kind", [each for each in get_args(Entry) if each is not Began])
@PATIENT
@given(data=st.data())
def test_every_kind_of_entry_is_read_back(
    tmp_path: Path, kind: type[Struct], data: st.DataObject
) -> None:
    entry = data.draw(values(kind))
    journal = Journal.begin(tmp_path, make_began())
    journal._write(entry)
    assert journals.read(journal.path) == (make_began(), entry)


def test_words_of_many_lines_stay_one_entry(tmp_path: Path) -> None:
    journal = Journal.begin(tmp_path, make_began())
    journal.note_undoing("one\ntwo\r\n\0 three")
    assert journals.read(journal.path)[1:] == (Undoing("one\ntwo\r\n\0 three"),)


# --- cut short -----------------------------------------------------------------------------------


def test_a_last_line_that_is_cut_short_at_any_byte_is_passed_over(tmp_path: Path) -> None:
    path = filled(tmp_path).path
    whole = path.read_bytes()
    for cut in range(1, len(lines_of(path)[-1]) + 1):
        path.write_bytes(whole[:-cut])
        assert journals.read(path) == FILLED[:-1]


@pytest.mark.parametrize("cut", [0, 1, 2, 20])
def test_it_is_gone_on_with_where_it_was_cut_off(tmp_path: Path, cut: int) -> None:
    path = filled(tmp_path).path
    path.write_bytes(path.read_bytes()[: -cut or None])
    entries = journals.read(path)
    again = Journal.reopen(path, make_began(), entries)
    assert (again.doing, again.done, again.is_undoing) == (1, frozenset({0}), True)
    again.note_doing(2)
    again.note_undoing("cut off")
    assert journals.read(path) == (*entries, Doing(2), Undoing("cut off"))


def test_nothing_was_begun_where_nothing_was_noted(tmp_path: Path) -> None:
    path = Journal.begin(tmp_path, make_began()).path
    again = Journal.reopen(path, make_began(), journals.read(path))
    assert (again.doing, again.done, again.is_undoing) == (-1, frozenset(), False)


# --- altered -------------------------------------------------------------------------------------


def test_a_byte_that_was_flipped_is_named_by_its_line(tmp_path: Path) -> None:
    path = filled(tmp_path).path
    lines = lines_of(path)
    whole = b"".join(lines)
    at = 0
    for number, line in enumerate(lines, 1):
        for place in range(at, at + len(line)):
            for mask in (0x01, 0x80, whole[place] ^ ord("\n")):
                flipped = bytes([whole[place] ^ mask])
                if mask:
                    content = whole[:place] + flipped + whole[place + 1 :]
                    assert refused_line(path, content) == number, (place, mask)
        at += len(line)


@pytest.mark.parametrize("place", range(len(FILLED) - 1))
def test_a_line_that_was_removed_is_named(tmp_path: Path, place: int) -> None:
    path = filled(tmp_path).path
    lines = lines_of(path)
    assert refused_line(path, b"".join(lines[:place] + lines[place + 1 :])) == place + 1


@pytest.mark.parametrize("place", range(len(FILLED)))
def test_a_line_that_stands_twice_is_named(tmp_path: Path, place: int) -> None:
    path = filled(tmp_path).path
    lines = lines_of(path)
    assert refused_line(path, b"".join(lines[: place + 1] + lines[place:])) == place + 2


def test_a_line_of_another_journal_is_named(tmp_path: Path) -> None:
    path = filled(tmp_path).path
    other = Journal.begin(tmp_path / "other", make_began(id=OTHER))
    other.note_doing(0)
    lines = lines_of(path)
    assert refused_line(path, lines[0] + lines_of(other.path)[1]) == 2


@pytest.mark.parametrize("length", [0, 1, 100])
def test_a_journal_without_a_whole_first_line_is_none(tmp_path: Path, length: int) -> None:
    path = filled(tmp_path).path
    assert refused_line(path, path.read_bytes()[:length]) == 1


@pytest.mark.parametrize("content", [b"\n", b"\n\n", b"{}\n", b"\xff\xfe\n", b" \n", bytes(99)])
def test_what_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    assert refused_line(tmp_path / "x.jsonl", content) == 1


@pytest.mark.parametrize("text", [b"{}", b"[]", b"null", b'{"type":"Nosuch"}', b'{"type":"Doing"}'])
def test_a_line_that_is_no_entry_is_refused_though_its_digest_is_right(
    tmp_path: Path, text: bytes
) -> None:
    path = Journal.begin(tmp_path, make_began()).path
    (first,) = lines_of(path)
    line = journals._digest_of(first.partition(b" ")[0], text) + b" " + text + b"\n"
    assert refused_line(path, first + line) == 2


def test_a_journal_begins_with_what_it_is_about(tmp_path: Path) -> None:
    text = msgspec.json.encode(Doing(0))
    line = journals._digest_of(b"", text) + b" " + text + b"\n"
    assert refused_line(tmp_path / "x.jsonl", line) == 1


def test_a_journal_that_cannot_be_read_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot read") as refused:
        journals.read(tmp_path / "none.jsonl")
    assert refused.value.remedy


# --- durable -------------------------------------------------------------------------------------


class Syncs:
    """Notes what a journal held each time that its bytes were made durable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: list[tuple[Entry, ...]] = []
        self.failing = False

    def __call__(self, _: int) -> None:
        if self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.held.append(journals.read(self.path))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.begin(tmp_path, make_began())


@pytest.fixture
def syncs(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> Syncs:
    syncs = Syncs(journal.path)
    monkeypatch.setattr(os, "fdatasync", syncs)
    return syncs


def test_what_is_about_to_happen_is_durable_before_it_may(journal: Journal, syncs: Syncs) -> None:
    journal.note_doing(0)
    assert syncs.held == [(make_began(), Doing(0))]
    journal.note_undoing("no space")
    assert syncs.held[1:] == [(make_began(), Doing(0), Undoing("no space"))]
    journal.note_unfinished(("a bug",))
    assert syncs.held[2:] == [journals.read(journal.path)]


def test_what_is_done_becomes_durable_with_the_next_entry(journal: Journal, syncs: Syncs) -> None:
    journal.note_doing(0)
    journal.note_done(0, 1.0)
    assert len(syncs.held) == 1
    journal.note_doing(1)
    assert syncs.held[1] == (make_began(), Doing(0), Did(0, 1.0), Doing(1))


def test_an_end_is_durable_before_it_is_moved(journal: Journal, syncs: Syncs) -> None:
    journal.end("done")
    ((_, end),) = syncs.held
    assert isinstance(end, Ended)


def test_what_cannot_be_made_durable_may_not_happen(journal: Journal, syncs: Syncs) -> None:
    syncs.failing = True
    with pytest.raises(HostError) as failed:
        journal.note_doing(0)
    assert failed.value.data["errno"] == "EIO"
    assert journal.doing == -1
    syncs.failing = False
    journal.note_undoing("it failed")
    assert journals.read(journal.path) == (make_began(), Doing(0), Undoing("it failed"))


def test_it_is_there_with_its_first_entry_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        fsync(fd)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            synced.append(Path(f"/proc/self/fd/{fd}").read_bytes())
            assert list((tmp_path / "journal").glob("*.jsonl")) == []

    monkeypatch.setattr(os, "fsync", note)
    journal = Journal.begin(tmp_path, make_began())
    assert synced == [journal.path.read_bytes()]


def test_it_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        journal = Journal.begin(tmp_path, make_began())
        assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600
        journal.end("done")
    finally:
        os.umask(before)
    (path,) = (tmp_path / "history").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in ("journal", "history"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700


# --- a full disk ---------------------------------------------------------------------------------


@pytest.fixture(params=[0, 1, 30])
def full_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """No disk has room for more than these bytes."""
    write, room = os.write, request.param

    def written(fd: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(fd, data[:room])
        room -= count
        return count

    monkeypatch.setattr(os, "write", written)
    return int(request.param)


@pytest.mark.usefixtures("full_disk")
def test_a_journal_is_not_begun_on_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(HostError) as failed:
        Journal.begin(tmp_path, make_began())
    assert failed.value.data["errno"] == "ENOSPC"
    assert list((tmp_path / "journal").iterdir()) == []


def test_an_entry_that_finds_no_room_leaves_what_was_there(
    journal: Journal, full_disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = journal.path.read_bytes()
    with pytest.raises(HostError) as failed:
        journal.note_doing(0)
    assert failed.value.data["errno"] == "ENOSPC", full_disk
    assert failed.value.remedy
    assert journal.doing == -1
    assert journal.path.read_bytes() == before
    monkeypatch.undo()
    journal.note_doing(0)
    assert journals.read(journal.path) == (make_began(), Doing(0))


def test_an_end_on_a_full_disk_is_an_end_all_the_same(
    tmp_path: Path, journal: Journal, full_disk: int
) -> None:
    journal.end(f"done with {full_disk} bytes left")
    assert list((tmp_path / "journal").iterdir()) == []
    (path,) = (tmp_path / "history").iterdir()
    assert journals.read(path) == (make_began(),)


def test_an_end_that_cannot_be_moved_is_told(tmp_path: Path, journal: Journal) -> None:
    (tmp_path / "history").rmdir()
    with pytest.raises(HostError):
        journal.end("done")
    assert journal.path.exists()

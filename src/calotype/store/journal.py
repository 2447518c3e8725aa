"""The journal: what an operation is about to do, durable before it does it.

One file for each operation, below the VM's folder::

    journal/ID.jsonl        the operation is under way, or was cut off
    history/ID.jsonl        it has ended; the rename from the one to the other is its end

A file is a line for each entry: a digest, a blank, and JSON. The digest is of the JSON and of the
digest in the line before, so that no line can be altered, left out or put elsewhere unnoticed. The
first entry (`Began`) holds all steps, each of which names everything that undoing it needs; it is
there as a whole, or there is no journal. Then comes a `Doing` before each effect. A last line that
is cut short was being written when its writer died: its effect had not begun, and it is passed
over. Any other line that is not what its digest says makes the journal untrue, and nothing is done
by it.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import msgspec
from blake3 import blake3
from msgspec import Struct

from calotype.errors import HostError, StoreError
from calotype.model.vm import Process, VmRecord
from calotype.plan.recovery import OperationKind
from calotype.plan.steps import AnyStep
from calotype.store.files import (
    host_errors,
    make_private_directory,
    sync_directory,
    write_atomically,
)

SUFFIX = ".jsonl"
_DIGEST_LENGTH = 16


class Began(Struct, frozen=True, tag=True):
    """An operation begins."""

    operation: OperationKind
    id: str
    """The operation's own id."""
    snapshot: str
    """The snapshot that it is about."""
    at: str
    owner: Process
    """Who carries it out."""
    qemu: Process | None
    """The QEMU that ran the VM then."""
    record: VmRecord
    """The VM's record from before."""
    steps: tuple[AnyStep, ...]
    format: int = 1


class Doing(Struct, frozen=True, tag=True):
    """The effect of a step is about to begin."""

    step: int


class Did(Struct, frozen=True, tag=True):
    """The effect of a step is done; told for the history, and not relied upon."""

    step: int
    spent_ms: float


class Undoing(Struct, frozen=True, tag=True):
    """What was begun is about to be undone."""

    error: str


class Unfinished(Struct, frozen=True, tag=True):
    """Not everything could be undone, or finished, yet; these are the reasons."""

    reasons: tuple[str, ...]


class Ended(Struct, frozen=True, tag=True):
    """The operation is over: "done", or "undone" because of *error*."""

    outcome: str
    at: str
    error: str = ""


Entry = Began | Doing | Did | Undoing | Unfinished | Ended


class Journal:
    """The journal of one operation, open for writing.

    Args:
        path: Its file, in a folder called `journal`.
        began: Its first entry.
    """

    def __init__(self, path: Path, began: Began) -> None:
        self.path = path
        self.began = began
        self.doing = -1
        """The last step that was begun."""
        self.done: frozenset[int] = frozenset()
        """The steps that an earlier writer is known to have done."""
        self.is_undoing = False
        """Whether an earlier writer had begun to undo it."""
        self._digest = b""
        """Of the last line."""

    @classmethod
    def begin(cls, folder: Path, began: Began) -> "Journal":
        """Begin a journal in the VM's *folder*; it is durable when this returns.

        Raises:
            HostError: It cannot be written.
        """
        journal = cls(folder / "journal" / f"{began.id}{SUFFIX}", began)
        make_private_directory(journal.path.parent)
        make_private_directory(folder / "history")
        line = journal._line(began)
        write_atomically(journal.path, line)
        journal._digest = _digest_in(line)
        return journal

    @classmethod
    def reopen(cls, path: Path, began: Began, entries: tuple[Entry, ...]) -> "Journal":
        """Go on with a journal that was cut off; a line that was cut short is cut off first."""
        journal = cls(path, began)
        journal.doing = max(
            (entry.step for entry in entries if isinstance(entry, Doing)), default=-1
        )
        journal.done = frozenset(entry.step for entry in entries if isinstance(entry, Did))
        journal.is_undoing = any(isinstance(entry, Undoing) for entry in entries)
        with host_errors(path):
            whole = path.read_bytes().rpartition(b"\n")[0]
            os.truncate(path, len(whole) + 1)
        journal._digest = _digest_in(whole.rpartition(b"\n")[2])
        return journal

    def note_doing(self, step: int) -> None:
        """Note, durably, that the effect of *step* begins now."""
        self._write(Doing(step))
        self.doing = step

    def note_done(self, step: int, spent_ms: float) -> None:
        """Note that the effect of *step* is done; becomes durable with the next entry."""
        self._write(Did(step, spent_ms), durable=False)

    def note_undoing(self, error: str) -> None:
        """Note that what was begun is being undone, because of *error*."""
        self._write(Undoing(error))

    def note_unfinished(self, reasons: tuple[str, ...]) -> None:
        """Note that it is not over, and why."""
        self._write(Unfinished(reasons))

    def end(self, outcome: str, error: str = "") -> None:
        """End it: the file goes from `journal` to `history`, even without room to say how.

        Raises:
            HostError: It cannot be moved.
        """
        with contextlib.suppress(HostError):  # a full disk must not keep alive what is over
            self._write(Ended(outcome, _now(), error))
        with host_errors(self.path):
            self.path.rename(self.path.parent.parent / "history" / self.path.name)
        sync_directory(self.path.parent.parent / "history")
        sync_directory(self.path.parent)

    def _write(self, entry: Entry, *, durable: bool = True) -> None:
        line = self._line(entry)
        with host_errors(self.path):
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            try:
                size_bytes = os.fstat(fd).st_size
                if os.write(fd, line) != len(line):
                    os.ftruncate(fd, size_bytes)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._digest = _digest_in(line)
                if durable:
                    os.fdatasync(fd)
            finally:
                os.close(fd)

    def _line(self, entry: Entry) -> bytes:
        """The line that an entry would be, were it the next."""
        text = msgspec.json.encode(entry)
        return _digest_of(self._digest, text) + b" " + text + b"\n"


def read(path: Path) -> tuple[Entry, ...]:
    """The entries of a journal, without a last line that was cut short.

    Raises:
        StoreError: It was altered, or is none.
    """
    try:
        *lines, cut_short = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StoreError(
            f"cannot read {path}: {error.strerror}",
            "look at the disk that it is on",
            path=str(path),
        ) from error
    entries = tuple(_entries(path, lines))
    if not entries or not isinstance(entries[0], Began):
        raise _untrue(path, 1)
    if _follows(cut_short[:-1], lines[-1]):  # it is whole: something is where its end should be
        raise _untrue(path, len(lines) + 1)
    return entries


def _entries(path: Path, lines: list[bytes]) -> Iterator[Entry]:
    for number, (before, line) in enumerate(pairwise([b"", *lines]), 1):
        if not _follows(line, before):
            raise _untrue(path, number)
        try:
            yield msgspec.json.decode(line.partition(b" ")[2], type=Entry)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _untrue(path, number) from error


def _untrue(path: Path, number: int) -> StoreError:
    return StoreError(
        f"the journal {path} was altered: line {number} is not what was written",
        "put it back from a copy; or move it away, and look after what it was about by hand",
        path=str(path),
        line=number,
    )


def _follows(line: bytes, before: bytes) -> bool:
    """Whether *line* is what was written after the line *before*."""
    text = line.partition(b" ")[2]
    return _digest_in(line) == _digest_of(_digest_in(before), text)


def _digest_in(line: bytes) -> bytes:
    return line.partition(b" ")[0]


def _digest_of(before: bytes, text: bytes) -> bytes:
    return blake3(before + text).hexdigest(_DIGEST_LENGTH // 2).encode()


def _now() -> str:
    return datetime.now(UTC).isoformat()

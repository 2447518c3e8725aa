"""Bad input changes nothing: one line says what is wrong, one what to do, the code by whose fault.

Words that can be no name, requests that contradict themselves, a store that is none, others who are
at it at the same time; files that are not what they were are in `test_bad_files.py`. The codes are
those of `docs/exit-codes.md`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from calotype.testing.machine import Machine
from calotype.testing.whole import is_on, picture
from crashing import Subject
from refusing import (
    BLOCKED,
    CONFLICT,
    HOST,
    NOT_FOUND,
    REQUEST,
    WRITERS,
    Word,
    assert_refused,
    everything,
    held_at,
    say,
    tree_and_qemu,
)

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

# --- words ---------------------------------------------------------------------------------------

ODD: dict[str, Word] = {
    "empty": "",
    "long": "x" * 10_000,
    "control": "a\x1b[31m\nb",
    "path": "../x",
    "percent": "%s%n",
    "braces": "{0}{settings}",
    "shell": "$(touch x);`touch x`",
    "dash": "-x",
    "bytes": b"\xff\xfe",
}
NEVER = ("empty", "long", "control", "dash", "bytes")
"""What nothing may be called; the others are names like any other."""

PLACES: dict[str, tuple[tuple[Word, ...], dict[str, int]]] = {
    "the VM to take of": (("take", "ODD"), {"dash": REQUEST}),
    "the VM to delete of": (("delete", "ODD", "--tag", "first"), {"dash": REQUEST}),
    "the VM to recover": (("recover", "ODD"), {"dash": REQUEST}),
    "the VM to look at": (("show", "ODD"), {"dash": REQUEST}),
    "the tag to restore": (("restore", "small", "--tag", "ODD"), {}),
    "the tag to delete": (("delete", "small", "--tag", "ODD"), {}),
    "the tag to look at": (("show", "small", "--tag", "ODD"), {}),
    "the id to restore": (("restore", "small", "--id", "ODD"), dict.fromkeys(ODD, REQUEST)),
    "the id to delete": (("delete", "small", "--id", "ODD"), dict.fromkeys(ODD, REQUEST)),
}
"""Where a word stands -> the command, and the codes that differ from not found."""


def _with(words: tuple[Word, ...], odd: Word) -> list[Word]:
    return [odd if word == "ODD" else word for word in words]


@pytest.mark.parametrize("place", PLACES)
def test_a_word_that_names_nothing_is_told_and_nothing_is_changed(off: Machine, place: str) -> None:
    words, codes = PLACES[place]
    before = everything(off)
    for kind, odd in ODD.items():
        assert_refused(say(off, *_with(words, odd)), codes.get(kind, NOT_FOUND))
    assert everything(off) == before


@pytest.mark.parametrize("kind", NEVER)
def test_what_nothing_may_be_called_is_refused(on: Machine, kind: str) -> None:
    before = tree_and_qemu(on)
    odd = ODD[kind]
    commands: list[tuple[Word, ...]] = [("run", odd, "--", *on.argv())]
    if kind in ("long", "control", "bytes"):  # no tag at all is one, and an option takes any word
        commands += [("take", "small", "--tag", odd), ("tag", "small", odd, "--tag", "first")]
    for words in commands:
        assert_refused(say(on, *words), REQUEST)
    assert tree_and_qemu(on) == before


WRONG: dict[str, tuple[tuple[Word, ...], int]] = {
    "a disk that is not there": (("take", "small", "--disk", "nosuch=skip"), BLOCKED),
    "no kind": (("take", "small", "--disk", "virtio0"), REQUEST),
    "no such kind": (("take", "small", "--disk", "virtio0=deep"), REQUEST),
    "a disk twice": (
        ("take", "small", "--disk", "virtio0=skip", "--disk", "virtio0=internal"), REQUEST,
    ),
    "no limit": (("take", "small", "--pause-limit", "nan"), REQUEST),
    "a limit below any": (("take", "small", "--pause-limit", "0"), REQUEST),
    "no such command": (("tkae", "small"), REQUEST),
    "a VM that runs": (("start", "small"), CONFLICT),
    "an image of another": (("run", "other", "--", "qemu-system-x86_64", "zero.qcow2"), CONFLICT),
    "no disk on a command line": (("run", "other", "--", "qemu-system-x86_64", "-hda"), REQUEST),
    "an image that is not there": (("run", "other", "--", "qemu-system-x86_64", "no.qcow2"), HOST),
    "a take with an empty tag": (("take", "small", "--tag", ""), REQUEST),
    "two ways to name one": (("restore", "small", "--latest", "--tag", "first"), REQUEST),
    "no way to name one": (("delete", "small"), REQUEST),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_request_that_is_wrong_is_refused(on: Machine, name: str) -> None:
    words, code = WRONG[name]
    before = tree_and_qemu(on)
    assert_refused(say(on, *words), code)
    assert tree_and_qemu(on) == before


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind not in NEVER])
def test_an_odd_tag_is_kept_as_it_is_and_is_nothing_else(off: Machine, kind: str) -> None:
    odd = str(ODD[kind])
    before = everything(off)
    assert say(off, "tag", "small", odd, "--tag", "first").code == 0
    shown = json.loads(say(off, "show", "small", "--tag", odd, "--json").told)
    assert shown["snapshot"]["tag"] == odd
    assert odd in say(off, "list", "small").told.decode()
    assert say(off, "tag", "small", "first", "--tag", odd).code == 0
    labels = [name for name in everything(off) if name.endswith("labels.json")]
    for path in labels:
        (off.folder / path).unlink()
    assert everything(off) == before


# --- a store that is none ------------------------------------------------------------------------

READERS: tuple[tuple[Word, ...], ...] = (
    ("ps",),
    ("list",),
    ("show", "small"),
    ("doctor", "--rebuild"),
)


@pytest.mark.parametrize("words", [*READERS, ("take", "small"), ("recover",)])
def test_a_store_that_is_a_file_is_told(off: Machine, words: tuple[Word, ...]) -> None:
    path = off.folder / "file"
    path.write_bytes(b"mine")
    assert_refused(say(off, "--store", str(path), *words), HOST)
    assert path.read_bytes() == b"mine"
    path.unlink()


@pytest.mark.parametrize("words", [*READERS, ("take", "small"), ("recover",)])
def test_a_folder_that_holds_other_things_is_not_made_a_store(
    off: Machine, words: tuple[Word, ...]
) -> None:
    path = off.folder / "other"
    path.mkdir(0o755)
    (path / "mine").write_bytes(b"mine")
    before = everything(off)
    assert_refused(say(off, "--store", str(path), *words), HOST)
    assert everything(off) == before
    assert [entry.name for entry in path.iterdir()] == ["mine"]
    shutil.rmtree(path)


@pytest.fixture
def read_only(off: Machine) -> Iterator[Path]:
    """The store of a machine, by a way on which nothing can be written."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    place = off.folder / "mounted"
    place.mkdir()
    subprocess.run(["mount", "--bind", off.store, place], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)
    place.rmdir()


def test_a_store_that_cannot_be_written_can_be_looked_at(off: Machine, read_only: Path) -> None:
    before = everything(off)
    for words in (("ps",), ("list",), ("show", "small"), ("history", "small")):
        assert say(off, "--store", str(read_only), *words).code == 0, words
    for written in (*WRITERS.values(), ("tag", "small", "new", "--tag", "first")):
        assert_refused(say(off, "--store", str(read_only), *written), HOST)
    assert everything(off) == before


@pytest.mark.parametrize("words", [*READERS, ("take", "small"), ("recover",)])
def test_a_store_that_is_not_there_is_not_made_by_who_looks(
    off: Machine, words: tuple[Word, ...]
) -> None:
    path = off.folder / "nowhere" / "store"
    said = say(off, "--store", str(path), *words)
    assert said.code in (0, NOT_FOUND), said
    assert not path.parent.exists()


# --- others, at the same time --------------------------------------------------------------------


def test_a_second_writer_is_refused_and_the_first_is_named(subject: Subject) -> None:
    subject.take("--tag", "first")
    struck, line = held_at(subject, "done:5", "take", "small")
    with line:
        before = tree_and_qemu(subject)
        for words in (*WRITERS.values(), ("take", "small"), ("stop", "small", "--now")):
            said = say(subject, *words)
            assert_refused(said, CONFLICT)
            assert f"process {struck.pid} is changing the VM 'small': take" in said.lines[0]
        assert tree_and_qemu(subject) == before
        line.sendall(b"!")
        _, said_last = struck.communicate(timeout=60)
    assert struck.returncode == 0, said_last


def test_a_second_ctrl_c_is_told_that_the_undo_is_in_progress(subject: Subject) -> None:
    before = picture(subject)
    struck, line = held_at(subject, "done:9+undoing:2", "take", "small")
    with line:
        struck.send_signal(signal.SIGINT)
        line.sendall(b"!")
        assert line.recv(1) == b"?"
        struck.send_signal(signal.SIGINT)
        line.sendall(b"!")
        _, said = struck.communicate(timeout=60)
    lines = said.decode().splitlines()
    assert struck.returncode == 130, said
    assert lines == [
        "calotype: undoing what was begun; please wait",
        "calotype: stopped: what was begun has been undone",
        "calotype: what to do: give the command again when it suits",
    ]
    assert picture(subject) == before


def test_nothing_needs_standard_input(subject: Subject) -> None:
    """Not even a number that is free for other files: each command is begun with it closed."""
    commands = (
        ("take", "small", "--tag", "first"),
        ("stop", "small", "--now"),
        ("restore", "small", "--tag", "first"),
        ("recover", "small"),
        ("stop", "small", "--now"),
        ("start", "small"),
        ("delete", "small", "--tag", "first"),
    )
    for words in commands:
        closed = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "calotype", *words]
        done = subprocess.run(
            closed,
            cwd=subject.folder,
            env={**os.environ, "CALOTYPE_STORE": str(subject.store)},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, (words, done)
    assert is_on(subject)
    assert subject.qmp("query-status")["running"]

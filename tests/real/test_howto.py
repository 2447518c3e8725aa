"""The how-to pages, typed by a user: each command of theirs is run, and says what the page says.

In a block of a page a line that begins with `$ ` is typed, into one shell for each page, and what
follows is what it must say, but for ids, dates, pids and measures, which are others each time; and
`...` stands for anything. What is not on the page must not be said.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from calotype.qemu import process
from calotype.store.store import Store

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "howto").glob("*.md"))
OVMF = next(
    (each for each in (ROOT / ".deps/firmware/usr/share/OVMF", Path("/usr/share/OVMF"))
     if each.is_dir()), Path("/usr/share/OVMF"),
)  # fmt: skip
_END = "--- said ---"
OTHERS = (
    (r"\b[0-9a-f]{16}\b", "ID"),
    (r"\d{4}-\d\d-\d\d.\d\d:\d\d:\d\d(\.\d+\+00:00)?", "DATE"),
    (r"\b(process|inode|instead of) \d+", r"\1 NUMBER"),
    (r"\b\d+(\.\d+)? (ms|s|min|B|KiB|MiB|GiB|TiB)\b( \d+ s\b)?", "MEASURE"),
)
"""What is another each time, and what it is compared as."""


class Typed(NamedTuple):
    """One command of a page, and what it must say."""

    command: str
    answer: str


def typed(page: Path) -> Iterator[Typed]:
    """The commands of a page, in their order."""
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for each in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = each.split("\n")
            ends = next(place for place, line in enumerate(lines) if not line.endswith("\\"))
            yield Typed("\n".join(lines[: ends + 1]), "\n".join(lines[ends + 1 :]))


class Shell:
    """A shell in a folder of its own, as a user has it open for the length of a page."""

    def __init__(self, folder: Path) -> None:
        bin_folder = Path(sys.executable).parent
        self.bash = subprocess.Popen(
            ["bash", "--norc"],
            cwd=folder,
            env={
                **os.environ,
                "PATH": f"{bin_folder}:{os.environ['PATH']}",
                "XDG_DATA_HOME": str(folder / "data"),
                "OVMF": str(OVMF),
                "TERM": "dumb",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def say(self, command: str) -> str:
        """Type a command; all that is said until it has ended."""
        assert self.bash.stdin
        assert self.bash.stdout
        self.bash.stdin.write(f"{command}\necho {_END}\n")
        self.bash.stdin.flush()
        said = ""
        for line in self.bash.stdout:
            before, mark, _ = line.partition(_END)
            said += before
            if mark:
                return said
        raise AssertionError(f"the shell ended after {command!r}, which said {said!r}")


@pytest.fixture
def shell(folder: Path) -> Iterator[Shell]:
    opened = Shell(folder)
    yield opened
    opened.bash.communicate(timeout=60)
    store = Store(folder / "data" / "calotype")
    for record in store.records():
        qemu = store.process(record.id)
        if qemu is not None and process.is_alive(qemu):
            process.kill(qemu)


def alike(text: str) -> str:
    """A text without what is another each time."""
    for pattern, word in OTHERS:
        text = re.sub(pattern, word, text)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def is_as_the_page_says(answer: str, said: str) -> bool:
    """Whether *said* is the answer on a page, where `...` stands for anything."""
    pattern = ".*".join(map(re.escape, alike(answer).split("...")))
    return re.fullmatch(pattern, alike(said), re.DOTALL) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_true(shell: Shell, folder: Path, page: Path) -> None:
    commands = list(typed(page))
    assert len(commands) >= 3
    home = str(folder)
    for command, answer in commands:
        said = shell.say(command).replace(home, "/home/me")
        assert is_as_the_page_says(answer, said), f"$ {command}\n{said}"


def test_a_page_that_is_not_true_is_caught(shell: Shell) -> None:
    assert is_as_the_page_says("a ... c\n...\nend", "a b c\nmore\nend\n")
    assert is_as_the_page_says("0123456789abcdef in 3 ms", "fedcba9876543210 in 4.5 ms")
    assert not is_as_the_page_says("exit code 5", "exit code 6")
    assert not is_as_the_page_says("a", "a\nb")
    assert not is_as_the_page_says("", shell.say("calotype start nosuch"))
    assert is_as_the_page_says("calotype: there is no VM...", shell.say("calotype start nosuch"))

"""A session says what QEMU's monitor says, byte for byte, whatever a client writes."""

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from calotype.qemu.monitor import open_socket
from calotype.qmp.parser import UNDECIDED
from calotype.qmp.server import Server
from calotype.testing.machine import wait
from qmp_corpus import CASES, DIFFERENT, END, END_MARK, NEGOTIATION, Case, answered

pytestmark = [pytest.mark.qemu, pytest.mark.xdist_group("qmp_corpus")]

QEMU = ("qemu-system-x86_64", "-M", "none", "-display", "none", "-S", "-nodefaults")


class Reached:
    """A monitor of a QEMU that has no machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.greeting: dict[str, Any] = json.loads(self.say(Case(()))[0])

    def say(self, case: Case) -> list[bytes]:
        """The lines that QEMU answers *case* with, after its greeting."""
        with open_socket(self.path) as connection:
            connection.settimeout(30)
            lines = connection.makefile("rb")
            greeting = lines.readline()
            if not case.chunks:
                return [greeting]
            if NEGOTIATION[case.mode]:
                connection.sendall(NEGOTIATION[case.mode])
                assert lines.readline() == b'{"return": {}}\r\n'
            for chunk in (*case.chunks, END):
                connection.sendall(chunk)
            return list(_up_to_the_end(lines))


def _up_to_the_end(lines: Any) -> Iterator[bytes]:
    for line in lines:
        yield line
        if END_MARK in line:
            return
    raise AssertionError("QEMU hung up")


@contextlib.contextmanager
def _reached(folder: Path) -> Iterator[Reached]:
    path = folder / "qmp.sock"
    words = [*QEMU, "-qmp", f"unix:{path},server=on,wait=off"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as qemu:
        try:
            wait(path.exists, "the monitor")
            yield Reached(path)
        finally:
            qemu.kill()


@pytest.fixture(scope="module")
def monitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reached]:
    with _reached(tmp_path_factory.mktemp("monitor")) as reached:
        yield reached


@pytest.mark.parametrize("name", CASES)
def test_a_session_says_what_qemu_says(monitor: Reached, name: str) -> None:
    assert answered(monitor.greeting, CASES[name]) == monitor.say(CASES[name])


@pytest.mark.parametrize("name", DIFFERENT)
def test_where_it_does_not_it_says_as_much_and_the_rest_is_the_same(
    monitor: Reached, name: str
) -> None:
    case = DIFFERENT[name].case
    ours, theirs = answered(monitor.greeting, case), monitor.say(case)
    assert ours[0] != theirs[0]
    assert ours[1:] == theirs[1:]
    assert len(ours[0]) < len(theirs[0]) + 4


def lax(line: bytes) -> Any:
    """A document as Python reads it."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return UNDECIDED


BREAKS: Mapping[str, Callable[[Any], Any]] = {
    "calotype.qmp.writer._bucket": len,
    "calotype.qmp.decoder.strict": lax,
}
"""Members in another order than QEMU's; JSON as Python reads it."""


@pytest.mark.parametrize("broken", BREAKS)
def test_a_session_that_says_something_else_is_caught(
    monitor: Reached, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broken, BREAKS[broken])
    assert differing(monitor)


def differing(monitor: Reached) -> list[str]:
    """The cases to which QEMU and a session do not say the same."""
    greeting = monitor.greeting
    return [name for name, case in CASES.items() if answered(greeting, case) != monitor.say(case)]


@pytest.mark.usefixtures("qemu_7_2")
def test_it_says_what_qemu_7_2_says(tmp_path: Path) -> None:
    with _reached(tmp_path) as monitor:
        assert monitor.greeting["QMP"]["version"]["qemu"]["major"] == 7
        assert differing(monitor) == []


def test_the_greeting_is_written_as_qemu_writes_it(monitor: Reached) -> None:
    assert Server(monitor.greeting).greeting() == monitor.say(Case(()))[0]

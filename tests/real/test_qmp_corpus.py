"""A session says what QEMU's monitor says, byte for byte, whatever a client writes."""

import contextlib
import functools
import json
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from calotype.qemu.monitor import open_socket
from calotype.qmp.client import Client, Event, Greeting, Message, Refused, Returned
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

    @functools.cached_property
    def greeting(self) -> dict[str, Any]:
        """What QEMU says first."""
        said: dict[str, Any] = json.loads(self.say(Case(()))[0])
        return said

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
def _reached(folder: Path, option: str = "-qmp") -> Iterator[Reached]:
    path = folder / "qmp.sock"
    words = [*QEMU, option, f"unix:{path},server=on,wait=off"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as qemu:
        try:
            wait(path.exists, "the monitor")
            yield Reached(path)
        finally:
            qemu.kill()


def told(connection: socket.socket, client: Client) -> Message:
    """The next message that comes, read a few bytes at a time."""
    while True:
        data = connection.recv(7)
        assert data, "QEMU hung up"
        if messages := client.receive(data):
            (message,) = messages
            return message


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


@pytest.mark.parametrize("option", ["-qmp", "-qmp-pretty"])
def test_the_other_session_reads_what_qemu_writes(tmp_path: Path, option: str) -> None:
    client = Client()
    with _reached(tmp_path, option) as reached, open_socket(reached.path) as connection:
        connection.settimeout(30)

        def asked(command: str, arguments: dict[str, Any] | None = None) -> Message:
            number, line = client.send(command, arguments)
            connection.sendall(line)
            message = told(connection, client)
            assert isinstance(message, Returned | Refused)
            assert message.id == number
            return message

        greeting = told(connection, client)
        assert isinstance(greeting, Greeting)
        assert isinstance(asked("qmp_capabilities"), Returned)
        version = asked("query-version")
        assert isinstance(version, Returned)
        assert version.value() == greeting.value()["QMP"]["version"]
        refused = asked("no-such-command", {"a": 1.0})
        assert isinstance(refused, Refused)
        assert refused.value()["desc"] == "The command no-such-command has not been found"
        schema = asked("query-qmp-schema")
        assert isinstance(schema, Returned)
        assert len(schema.value()) > 500
        connection.sendall(client.send("quit")[1])
        messages = [told(connection, client), told(connection, client)]
        (event,) = [message for message in messages if isinstance(message, Event)]
        assert event.name == "SHUTDOWN"
        assert event.value()["reason"] == "host-qmp-quit"
        assert event.at_us > 1_600_000_000_000_000

"""Sockets that are not a monitor that is free: told in a few seconds, with who is in the way."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from calotype.errors import ConflictError, QemuError
from calotype.qemu import monitor
from calotype.qemu.monitor import connect, listen_socket, open_socket
from calotype.qemu.peers import clients
from calotype.testing.machine import CommandFailed
from crashing import Subject

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(60)]

HOLD = """
import socket, sys, time
held = socket.socket(socket.AF_UNIX)
held.connect(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(subject: Subject) -> Iterator[int]:
    """A program that is connected to the monitor for those who act."""
    path = os.path.relpath(subject.home / "control.sock", subject.folder)
    command = [sys.executable, "-c", HOLD, path]
    with subprocess.Popen(command, cwd=subject.folder, stdout=subprocess.PIPE) as holding:
        assert holding.stdout
        assert holding.stdout.readline() == b"held\n"
        yield holding.pid
        holding.kill()


def test_who_holds_a_monitor_is_named_in_seconds(subject: Subject, holder: int) -> None:
    with pytest.raises(CommandFailed, match=f"process {holder} is connected to it") as refused:
        subject.calotype("take", "small")
    assert refused.value.data["exit_code"] == 6
    assert refused.value.data["error"]["holders"] == [holder]


def test_those_who_look_are_not_in_the_way(subject: Subject, holder: int) -> None:
    assert holder
    assert subject.run_state() == "running"


def test_only_the_clients_of_this_very_socket_are_told(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    with listen_socket(one) as first, listen_socket(other) as second, open_socket(other):
        with second.accept()[0]:
            assert clients(one) == []
            assert clients(other) == []
        assert first.fileno() != second.fileno()
    assert clients(tmp_path / "none") == []


async def test_a_socket_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "GREETING_TIMEOUT_S", 0.2)
    with listen_socket(tmp_path / "mute"), pytest.raises(ConflictError, match="no greeting"):
        async with connect(tmp_path / "mute", timeout_s=0.2):
            pass


@pytest.mark.parametrize(
    "words", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff\xfe{}\n", b"[]\n"]
)
async def test_a_socket_that_is_no_monitor(tmp_path: Path, words: bytes) -> None:
    path = tmp_path / "strange"
    listener = listen_socket(path)

    def answer() -> None:
        connection: socket.socket
        connection, _ = listener.accept()
        with connection:
            connection.sendall(words)

    speaking = threading.Thread(target=answer)
    speaking.start()
    with listener, pytest.raises(QemuError) as refused:
        async with connect(path, timeout_s=3.0):
            pass
    speaking.join()
    assert "\n" not in str(refused.value.remedy)


async def test_nothing_where_a_socket_should_be(tmp_path: Path) -> None:
    with pytest.raises(QemuError, match="no QEMU answers"):
        async with connect(tmp_path / "none"):
            pass

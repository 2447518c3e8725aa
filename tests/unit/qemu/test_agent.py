"""The connection to the guest's agent: every wait ends, and nothing that it says hurts."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from calotype.qemu import agent as guest_agent
from calotype.qemu.agent import AgentRefused, AgentSilent, AgentTaken, connect
from calotype.qemu.monitor import listen_socket, open_socket
from fake_agent import FakeAgent, refused

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_agent, "ANSWER_TIMEOUT_S", 0.3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ("long" * 30) / "agent.sock"


@pytest.fixture
def agent(path: Path) -> Iterator[FakeAgent]:
    path.parent.mkdir()
    played = FakeAgent(path)
    yield played
    played.end()


async def test_it_says_what_it_can_do(agent: FakeAgent, path: Path) -> None:
    async with connect(path) as asked:
        info = await asked.info()
    assert (info.version, info.commands, info.is_frozen) == ("10.0.0", agent.commands, False)


async def test_it_freezes_and_thaws(agent: FakeAgent, path: Path) -> None:
    async with connect(path) as asked:
        assert await asked.freeze(5.0) == 2
        assert (await asked.info()).is_frozen
        assert await asked.thaw(5.0) == 2
        assert await asked.thaw(5.0) == 0
        await asked.thaw_surely(5.0)
    assert agent.asked.count("guest-sync-delimited") == 1


async def test_its_clock_is_set(agent: FakeAgent, path: Path) -> None:
    async with connect(path) as asked:
        await asked.set_time(12345)
    assert agent.time_ns == 12345


STALE = {
    "answers to another": b'{"return": "frozen"}\n{"return": 2}\n',
    "half a line": b'{"return": {"version": "0',
    "noise": bytes(range(256)) * 40,
    "a huge line": b"x" * 300_000,
    "deeply nested": b"[" * 100_000 + b"\n",
    "delimiters": b'\xff{"return": 0}\n\xff\xff\n',
}


@pytest.mark.parametrize("kind", STALE)
async def test_what_it_said_before_is_of_no_account(
    agent: FakeAgent, path: Path, kind: str
) -> None:
    agent.stale = STALE[kind]
    async with connect(path) as asked:
        assert await asked.ask("guest-fsfreeze-status", 5.0) == "thawed"


async def test_an_answer_that_comes_too_late_is_not_taken_for_the_next(
    agent: FakeAgent, path: Path
) -> None:
    agent.instead["guest-info"] = lambda _: None
    async with connect(path) as asked:
        with pytest.raises(AgentSilent, match=r"does not answer guest-info in 0\.2 s"):
            await asked.ask("guest-info", 0.2)
        agent.instead["guest-ping"] = lambda _: b'{"return": "late"}\n{"return": {}}\n'
        assert await asked.ask("guest-fsfreeze-status", 5.0) == "thawed"
    assert agent.asked.count("guest-sync-delimited") == 2


async def test_its_own_text_is_told(agent: FakeAgent, path: Path) -> None:
    agent.instead["guest-fsfreeze-freeze"] = lambda _: refused("failed to freeze /home: I/O error")
    async with connect(path) as asked:
        with pytest.raises(AgentRefused, match="failed to freeze /home: I/O error") as raised:
            await asked.freeze(5.0)
        assert raised.value.data["agent"] == "failed to freeze /home: I/O error"
        assert await asked.ask("guest-fsfreeze-status") == "thawed"


def _die(connection: socket.socket) -> Any:
    connection.shutdown(socket.SHUT_RDWR)


SILENT: dict[str, Callable[[socket.socket], Any]] = {
    "says nothing": lambda _: None,
    "says noise": lambda _: b"\x00\xfe\n" * 1000,
    "says another number": lambda _: b'\xff{"return": -1}\n',
    "hangs up": _die,
}


@pytest.mark.parametrize("kind", SILENT)
async def test_one_that_does_not_answer_is_waited_for_no_longer(
    agent: FakeAgent, path: Path, kind: str
) -> None:
    agent.instead["guest-sync-delimited"] = SILENT[kind]
    async with connect(path) as asked:
        with pytest.raises(AgentSilent) as raised:
            await asked.ask("guest-ping", 0.3)
    assert "qemu-guest-agent" in raised.value.remedy


@pytest.mark.parametrize("value", [b'{"return": 1}\n', b'{"return": {"version": 1}}\n'])
async def test_nonsense_is_told_as_such(agent: FakeAgent, path: Path, value: bytes) -> None:
    agent.instead["guest-info"] = lambda _: value
    async with connect(path) as asked:
        with pytest.raises(AgentSilent, match="nonsense"):
            await asked.info()


async def test_a_thaw_that_does_not_help_is_told(agent: FakeAgent, path: Path) -> None:
    agent.frozen = 1
    agent.instead["guest-fsfreeze-thaw"] = lambda _: refused("the hook failed")
    async with connect(path) as asked:
        with pytest.raises(AgentRefused, match="still frozen") as raised:
            await asked.thaw_surely(5.0)
    assert "fsfreeze --unfreeze" in raised.value.remedy


@pytest.fixture
def other(agent: FakeAgent, path: Path) -> Iterator[int]:
    """The pid of another process that is connected."""
    assert not agent.asked
    code = (
        "import pathlib, sys, time; from calotype.qemu.monitor import open_socket;"
        " open_socket(pathlib.Path(sys.argv[1])); print(flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code.replace("; open", "; c = open"), str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.kill()


async def test_a_socket_that_serves_another_client_is_told_so(other: int, path: Path) -> None:
    async with connect(path) as asked:
        with pytest.raises(AgentTaken, match=f"serves process {other}") as raised:
            await asked.ask("guest-ping", 0.3)
    assert raised.value.data["holders"] == [other]


async def test_a_socket_that_more_wait_for_than_it_takes_in_is_told_so(path: Path) -> None:
    path.parent.mkdir()
    with closing(listen_socket(path)) as listener, contextlib.ExitStack() as stack:
        listener.listen(0)
        stack.enter_context(open_socket(path))
        with pytest.raises(AgentTaken):
            await connect(path).__aenter__()


async def test_where_there_is_no_socket_is_told(path: Path) -> None:
    path.parent.mkdir()
    with pytest.raises(AgentSilent, match="no QEMU answers on"):
        async with connect(path):
            pass

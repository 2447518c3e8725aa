"""File systems are frozen for a snapshot of disks alone, and never stay so, whatever happens.

The agent is played; that the real one does what this one does is what `test_agent_guest.py` shows.
"""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calotype.testing.machine import CommandFailed, wait
from calotype.testing.whole import picture
from crashing import OPERATIONS, Subject
from fake_agent import FREEZING, FakeAgent, refused

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

TAKE = ("take", "small", "--machine-state", "none", "--quiesce")
QUICKLY = (*TAKE, "--freeze-limit", "700")
FROZEN = OPERATIONS["take quiesced"].steps.index("FreezeFileSystems")


@pytest.fixture
def subject(folder: Path) -> Iterator[Subject]:
    """A machine with a port for an agent, and an agent that is played."""
    vm = Subject(folder, disks=("zero.qcow2",))
    vm.make_disks()
    vm.give_agent()
    yield vm
    vm.clean_up()


@pytest.fixture
def agent(subject: Subject) -> FakeAgent:
    assert subject.agent
    return subject.agent


def failing(vm: Subject, *words: str) -> dict[str, Any]:
    """The error that a command tells."""
    with pytest.raises(CommandFailed) as raised:
        vm.calotype(*words)
    return {"exit_code": raised.value.data["exit_code"], **raised.value.data["error"]}


# --- it works ------------------------------------------------------------------------------------


def test_a_snapshot_says_what_it_is_worth(subject: Subject, agent: FakeAgent) -> None:
    told = subject.calotype(*TAKE)
    assert told["consistency"] == "filesystem"
    assert agent.asked[-3:] == [
        "guest-ping",
        *[f"guest-fsfreeze-{verb}" for verb in ("freeze", "thaw")],
    ]
    quiesced = subject.manifest(told["id"]).quiesced
    assert quiesced
    assert (quiesced.file_systems, quiesced.agent) == (2, "10.0.0")
    subject.take("--machine-state", "none")
    subject.take()
    (vm,) = subject.calotype("list")["vms"]
    worth = [each["consistency"] for each in vm["snapshots"]]
    assert worth == ["filesystem", "crash", "machine"]
    shown = subject.calotype("show", "small", "--id", told["id"])["snapshot"]
    assert (shown["consistency"], shown["quiesced"]["file_systems"]) == ("filesystem", 2)


def test_who_does_not_ask_for_it_leaves_the_agent_alone(subject: Subject, agent: FakeAgent) -> None:
    subject.take("--machine-state", "none")
    subject.take()
    assert agent.asked == []


# --- it is refused beforehand --------------------------------------------------------------------


def test_without_a_port_it_is_refused_with_what_to_do(subject: Subject) -> None:
    subject.stop()
    subject.run()
    before = picture(subject)
    error = failing(subject, *TAKE)
    assert (error["exit_code"], error["family"]) == (4, "blocked")
    assert "no port for a guest agent" in error["problem"]
    assert "-device virtserialport" in error["remedy"]
    assert picture(subject) == before


def _say_nothing(_: socket.socket) -> Any:
    return None


def _hang_up(connection: socket.socket) -> Any:
    connection.shutdown(socket.SHUT_RDWR)


REFUSALS: dict[str, tuple[Callable[[FakeAgent], Any], str]] = {
    "does not answer": (
        lambda agent: agent.instead.update({"guest-sync-delimited": _say_nothing}),
        "does not answer",
    ),
    "hangs up": (
        lambda agent: agent.instead.update({"guest-sync-delimited": _hang_up}),
        "QEMU closed",
    ),
    "may not freeze": (
        lambda agent: setattr(agent, "commands", FREEZING[1:]),
        "does not carry out guest-fsfreeze-freeze",
    ),
    "has frozen already": (lambda agent: setattr(agent, "frozen", 1), "frozen already"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_agent_that_is_not_fit_is_refused(subject: Subject, agent: FakeAgent, name: str) -> None:
    change, problem = REFUSALS[name]
    change(agent)
    frozen = agent.frozen
    before = picture(subject)
    error = failing(subject, *TAKE)
    assert error["family"] == "blocked"
    assert problem in error["problem"]
    assert picture(subject) == before
    assert agent.frozen == frozen, "what somebody else had frozen is his"


def test_a_port_that_nobody_has_opened_is_refused(subject: Subject, agent: FakeAgent) -> None:
    agent.end()
    error = failing(subject, *TAKE)
    assert (error["exit_code"], error["family"]) == (4, "blocked")


# --- it is undone --------------------------------------------------------------------------------


def _freeze_one_of_two(agent: FakeAgent) -> None:
    def freeze(_: socket.socket) -> Any:
        agent.frozen = 1
        return refused("failed to freeze /home: Input/output error")

    agent.instead["guest-fsfreeze-freeze"] = freeze


def _freeze_none(agent: FakeAgent) -> None:
    agent.instead["guest-fsfreeze-freeze"] = lambda _: b'{"return": 0}\n'


def _freeze_too_slowly(agent: FakeAgent) -> None:
    def freeze(_: socket.socket) -> Any:
        time.sleep(1.5)
        agent.frozen = 2
        return b'{"return": 2}\n'

    agent.instead["guest-fsfreeze-freeze"] = freeze


def _thaw_by_itself(agent: FakeAgent) -> None:
    def freeze(_: socket.socket) -> Any:
        return b'{"return": 2}\n'

    agent.instead["guest-fsfreeze-freeze"] = freeze


def _fail_to_thaw_once(agent: FakeAgent) -> None:
    def thaw(_: socket.socket) -> Any:
        del agent.instead["guest-fsfreeze-thaw"]
        return refused("the hook failed")

    agent.instead["guest-fsfreeze-thaw"] = thaw


def _answer_the_thaw_not_at_all_once(agent: FakeAgent) -> None:
    agent.instead["guest-fsfreeze-thaw"] = lambda _: agent.instead.clear()


LATE = "could not be frozen and thawed in 0.7 s"
FAILURES: dict[str, tuple[Callable[[FakeAgent], None], int, str]] = {
    "half-way": (_freeze_one_of_two, 7, "failed to freeze /home: Input/output error"),
    "nothing to freeze": (_freeze_none, 7, "froze no file system"),
    "too slowly": (_freeze_too_slowly, 8, LATE),
    "thawed meanwhile": (_thaw_by_itself, 7, "2 frozen file systems 0 were still frozen"),
    "a thaw that fails": (_fail_to_thaw_once, 7, "the hook failed"),
    "a thaw without an answer": (_answer_the_thaw_not_at_all_once, 8, LATE),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_freeze_that_fails_is_undone_and_told_in_the_agents_own_words(
    subject: Subject, agent: FakeAgent, name: str
) -> None:
    change, code, problem = FAILURES[name]
    before = picture(subject)
    change(agent)
    error = failing(subject, *QUICKLY)
    assert error["exit_code"] == code
    assert problem in error["problem"]
    assert error["notes"] == []
    assert agent.is_thawed()
    assert picture(subject) == before


def test_an_agent_that_dies_while_frozen_is_told_and_thawed_through_when_it_is_back(
    subject: Subject, agent: FakeAgent
) -> None:
    before = picture(subject)

    def freeze(_: socket.socket) -> Any:
        agent.frozen = 2
        agent.instead |= dict.fromkeys((*FREEZING, "guest-sync-delimited"), _say_nothing)

    agent.instead["guest-fsfreeze-freeze"] = freeze
    error = failing(subject, *QUICKLY)
    assert LATE in error["problem"]
    assert any("may still be frozen" in note for note in error["notes"])
    assert agent.frozen
    assert "not over yet" in failing(subject, "take", "small")["problem"]

    agent.instead.clear()
    assert agent.is_thawed(), "the guard had not gone on asking"
    subject.calotype("recover", "small")
    assert picture(subject) == before


def test_a_qemu_that_is_started_anew_has_nothing_frozen(subject: Subject, agent: FakeAgent) -> None:
    subject.killed_at(f"done:{FROZEN}", QUICKLY, without="guard")
    assert agent.frozen
    agent.end()
    subject.kill()
    subject.calotype("recover", "small")
    subject.calotype("start", "small")


# --- the taker dies or hangs ---------------------------------------------------------------------


def test_a_taker_that_hangs_keeps_nothing_frozen(subject: Subject, agent: FakeAgent) -> None:
    hanging = subject.struck(f"done:{FROZEN}", "stop-self", QUICKLY)
    wait(lambda: "guest-fsfreeze-freeze" in agent.asked, "the freeze")
    assert agent.is_thawed()
    assert hanging.poll() is None
    hanging.send_signal(signal.SIGCONT)
    _, said = hanging.communicate(timeout=60)
    assert hanging.returncode == 8, said
    assert LATE.encode() in said
    assert subject.calotype("list")["vms"][0]["snapshots"] == []


def test_a_taker_that_is_interrupted_thaws(subject: Subject, agent: FakeAgent) -> None:
    before = picture(subject)
    agent.instead["guest-fsfreeze-freeze"] = lambda _: setattr(agent, "frozen", 2)
    taking = subject.struck("never", "kill-self", TAKE)
    wait(lambda: bool(agent.frozen), "the freeze")
    os.kill(taking.pid, signal.SIGINT)
    _, said = taking.communicate(timeout=60)
    assert taking.returncode == 130, said
    assert not agent.frozen
    assert picture(subject) == before


def once(agent: FakeAgent, answer: Any) -> Callable[[Any], Any]:
    """Give this answer the first time, and its own ever after."""

    def answered(_: Any) -> Any:
        agent.instead.clear()
        return answer

    return answered


def test_a_guard_that_dies_is_not_missed(subject: Subject, agent: FakeAgent) -> None:
    before = picture(subject)
    agent.instead["guest-fsfreeze-thaw"] = once(agent, refused("not now"))
    striking = subject.struck(f"done:{FROZEN}", "kill-guard", QUICKLY)
    _, said = striking.communicate(timeout=60)
    assert striking.returncode == 7, said
    assert agent.is_thawed()
    subject.calotype("recover", "small")
    assert picture(subject) == before

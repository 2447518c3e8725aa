"""Whose turn it is and who gets the answer: a relay between clients and a QEMU that is played."""

import json
import os
from collections.abc import Sequence
from typing import Any

import pytest

from calotype.qmp.client import Client
from calotype.qmp.server import Command
from calotype.service.relay import MOST_WAITING, WENT_AWAY, Peer, Relay

GREETING = {"QMP": {"version": {"qemu": {}, "package": ""}, "capabilities": ["oob"]}}
NEGOTIATE = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}'


class Line:
    """What is sent is kept."""

    def __init__(self) -> None:
        self.sent = b""
        self.descriptors: list[int] = []
        self.holds = 0
        self.ends = 0

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        self.sent += data
        self.descriptors += descriptors

    def hold(self) -> None:
        self.holds += 1

    def go_on(self) -> None:
        self.holds -= 1

    def end(self) -> None:
        self.ends += 1

    def told(self) -> list[dict[str, Any]]:
        """What was sent since this was asked last."""
        lines, self.sent = self.sent.splitlines(), b""
        return [json.loads(line) for line in lines]


class Scene:
    """A relay, its QEMU, and the commands that were taken as ours."""

    def __init__(self) -> None:
        self.own: list[tuple[Peer, Command]] = []
        self.relay = Relay(GREETING, self._is_own, {"query-version": lambda value: [value]})
        self.qemu = Line()
        self.reach()

    def reach(self) -> None:
        self.relay.qemu_here(self.qemu, Client())

    def client(self) -> tuple[Peer, Line]:
        line = Line()
        peer = self.relay.join(line)
        self.relay.heard(peer, NEGOTIATE, [])
        line.told()
        return peer, line

    def say(self, peer: Peer, command: str, **more: Any) -> None:
        line = json.dumps({"execute": command, "id": command, **more}).encode()
        self.relay.heard(peer, line, [])

    def answer(self, number: int, **members: Any) -> None:
        told = members or {"return": {}}
        self.relay.qemu_said(json.dumps({**told, "id": number}).encode() + b"\r\n")

    def _is_own(self, peer: Peer, command: Command) -> bool:
        if command.name == "ours":
            self.own.append((peer, command))
        return command.name == "ours"


@pytest.fixture
def scene() -> Scene:
    return Scene()


def names(told: list[dict[str, Any]]) -> list[str]:
    return [each.get("execute", each.get("exec-oob", "")) for each in told]


def test_an_answer_goes_to_who_asked_with_the_id_that_was_given(scene: Scene) -> None:
    (one, one_line), (two, two_line) = scene.client(), scene.client()
    scene.say(one, "a")
    scene.say(two, "b")
    first, second = scene.qemu.told()
    scene.answer(second["id"], **{"return": 2})
    scene.answer(first["id"], **{"return": 1})
    assert one_line.told() == [{"return": 1, "id": "a"}]
    assert two_line.told() == [{"return": 2, "id": "b"}]


def test_a_client_has_one_command_under_way_and_others_are_not_kept_waiting(scene: Scene) -> None:
    (one, _), (two, _) = scene.client(), scene.client()
    for name in ("a", "b"):
        scene.say(one, name)
    scene.say(two, "c")
    sent = scene.qemu.told()
    assert names(sent) == ["a", "c"]
    scene.answer(sent[0]["id"])
    assert names(scene.qemu.told()) == ["b"]


def test_answers_of_our_own_commands_keep_the_order(scene: Scene) -> None:
    peer, line = scene.client()
    scene.say(peer, "ours")
    scene.say(peer, "a")
    assert scene.qemu.told() == []
    (_, command) = scene.own.pop()
    scene.relay.answer(peer, command, peer.session.answer(command, {}))
    (sent,) = scene.qemu.told()
    scene.answer(sent["id"])
    assert [each["id"] for each in line.told()] == ["ours", "a"]


def test_what_is_out_of_band_does_not_wait(scene: Scene) -> None:
    peer, line = scene.client()
    scene.say(peer, "slow")
    scene.relay.heard(peer, b'{"exec-oob": "quick", "id": 1}', [])
    slow, quick = scene.qemu.told()
    assert quick["exec-oob"] == "quick"
    scene.answer(quick["id"])
    scene.answer(slow["id"])
    assert [each["id"] for each in line.told()] == [1, "slow"]


def test_who_has_much_waiting_is_not_read_from_until_it_has_less(scene: Scene) -> None:
    peer, line = scene.client()
    for _ in range(MOST_WAITING + 2):
        scene.say(peer, "a")
    assert line.holds == 1
    while line.holds:
        (sent,) = scene.qemu.told()
        scene.answer(sent["id"])
    assert len(peer.waiting) == MOST_WAITING


def test_an_answer_for_one_who_left_is_dropped(scene: Scene) -> None:
    (one, one_line), (two, two_line) = scene.client(), scene.client()
    scene.say(one, "a")
    scene.say(one, "b")
    scene.relay.leave(one)
    (sent,) = scene.qemu.told()
    scene.answer(sent["id"])
    assert one_line.told() == []
    assert scene.qemu.told() == []
    scene.say(two, "c")
    assert names(scene.qemu.told()) == ["c"]
    assert two_line.told() == []


def test_who_has_said_all_is_hung_up_on_when_all_is_answered(scene: Scene) -> None:
    peer, line = scene.client()
    scene.say(peer, "a")
    scene.relay.finish(peer)
    assert line.ends == 0
    (sent,) = scene.qemu.told()
    scene.answer(sent["id"])
    assert line.ends == 1


def test_what_was_under_way_when_qemu_went_is_refused_and_the_rest_waits(scene: Scene) -> None:
    peer, line = scene.client()
    scene.say(peer, "a")
    scene.say(peer, "b")
    scene.qemu.told()
    scene.relay.qemu_gone()
    (refused,) = line.told()
    assert (refused["id"], refused["error"]["desc"]) == ("a", WENT_AWAY)
    scene.reach()
    (sent,) = scene.qemu.told()
    assert sent["execute"] == "b"
    scene.answer(sent["id"])
    assert line.told() == [{"return": {}, "id": "b"}]


def test_in_the_end_what_waits_is_refused_and_all_are_hung_up_on(scene: Scene) -> None:
    peer, line = scene.client()
    scene.relay.qemu_gone()
    scene.say(peer, "a")
    scene.relay.hang_up()
    (refused,) = line.told()
    assert refused["error"]["desc"] == WENT_AWAY
    assert line.ends == 1


def test_that_one_qemu_said_goodbye_is_not_held_for_the_next_one_having_done_so(
    scene: Scene,
) -> None:
    event = {"event": "SHUTDOWN", "timestamp": {"seconds": 1, "microseconds": 2}}
    scene.relay.qemu_said(json.dumps(event).encode() + b"\n")
    assert scene.relay.said_shutdown
    scene.relay.qemu_gone()
    scene.reach()
    assert not scene.relay.said_shutdown


def test_what_is_asked_of_ours_is_answered_also_when_qemu_goes_away(scene: Scene) -> None:
    told: list[Any] = []
    scene.relay.ask("query-jobs", told.append)
    (sent,) = scene.qemu.told()
    scene.answer(sent["id"], **{"return": []})
    scene.relay.ask("query-jobs", told.append)
    scene.relay.qemu_gone()
    scene.relay.ask("query-jobs", told.append)
    assert [type(each).__name__ for each in told] == ["Returned", "Refused", "Refused"]


def test_events_reach_those_who_have_negotiated(scene: Scene) -> None:
    _, line = scene.client()
    silent = Line()
    scene.relay.join(silent)
    silent.told()
    event = {"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}
    scene.relay.qemu_said(json.dumps(event).encode() + b"\n")
    scene.relay.tell("OURS", {"a": 1}, 1_000_002)
    assert [each["event"] for each in line.told()] == ["STOP", "OURS"]
    assert silent.told() == []


def test_what_we_add_is_added_and_all_else_stays_as_qemu_wrote_it(scene: Scene) -> None:
    peer, line = scene.client()
    scene.say(peer, "query-version")
    (sent,) = scene.qemu.told()
    scene.answer(sent["id"], **{"return": 1})
    assert line.told() == [{"return": [1], "id": "query-version"}]
    scene.say(peer, "a")
    (sent,) = scene.qemu.told()
    odd = b'{"return":{"b" :  1e0},"id": %d}\r\n' % sent["id"]
    scene.relay.qemu_said(odd)
    assert b'{"b" :  1e0}' in line.sent


def test_descriptors_go_with_their_command_and_one_at_a_time(scene: Scene) -> None:
    (one, _), (two, _) = scene.client(), scene.client()
    given = os.open(os.devnull, os.O_RDONLY)
    scene.relay.heard(one, b'{"execute": "getfd", "id": 1}', [given])
    scene.say(two, "add-fd")
    (sent,) = scene.qemu.told()
    assert (sent["execute"], scene.qemu.descriptors) == ("getfd", [given])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(given)
    scene.answer(sent["id"])
    assert names(scene.qemu.told()) == ["add-fd"]
    assert scene.qemu.descriptors == [given]


def test_a_descriptor_is_taken_once_by_the_command_that_it_came_with(scene: Scene) -> None:
    peer, _ = scene.client()
    first, second = os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_RDONLY)
    scene.relay.heard(peer, b'{"execute": "getfd", "id": 1}', [first])
    scene.relay.heard(peer, b'{"execute": "getfd", "id": 2}', [second])
    scene.relay.heard(peer, b'{"execute": "getfd", "id": 3}', [])
    passed = []
    for _ in range(3):
        (sent,) = scene.qemu.told()
        passed.append(list(scene.qemu.descriptors))
        scene.qemu.descriptors.clear()
        scene.answer(sent["id"])
    assert passed == [[first], [second], []]


def test_a_descriptor_that_a_refused_command_left_is_taken_away(scene: Scene) -> None:
    (one, one_line), (two, _) = scene.client(), scene.client()
    given = os.open(os.devnull, os.O_RDONLY)
    scene.relay.heard(one, b'{"execute": "add-fd", "id": 1}', [given])
    scene.say(two, "getfd")
    (sent,) = scene.qemu.told()
    scene.answer(sent["id"], error={"class": "GenericError", "desc": "no"})
    assert names(scene.qemu.told()) == ["getfd", "closefd", "getfd"]
    assert [each["id"] for each in one_line.told()] == [1]

"""What a client is told before a command is looked up; the two sessions joined in memory."""

import json
from typing import Any

import pytest

from calotype.qmp.client import Client, Event, Greeting, Message, Refused, Returned, Unreadable
from calotype.qmp.server import Answer, Command, Server

GREETING: dict[str, Any] = {
    "QMP": {
        "version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian"},
        "capabilities": ["oob"],
    }
}
NEGOTIATION = b'{"execute": "qmp_capabilities"}\n'
OOB = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}\n'
NOT_FOUND, GENERIC = "CommandNotFound", "GenericError"


def session(negotiation: bytes = NEGOTIATION, *capabilities: str) -> Server:
    greeting = {"QMP": {**GREETING["QMP"], "capabilities": list(capabilities or ("oob",))}}
    server = Server(greeting)
    server.receive(negotiation)
    return server


def told(server: Server, data: bytes) -> dict[str, Any]:
    (answer,) = server.receive(data)
    assert isinstance(answer, Answer)
    assert answer.line[-3:] == b"}\r\n"
    message: dict[str, Any] = json.loads(answer.line)
    return message


ERRORS: dict[str, tuple[bytes, bytes, str, str]] = {
    "early": (
        b"", b'{"execute": "stop"}',
        NOT_FOUND, "Expecting capabilities negotiation with 'qmp_capabilities'",
    ),
    "again": (
        NEGOTIATION, NEGOTIATION,
        NOT_FOUND, "Capabilities negotiation is already complete, command ignored",
    ),
    "no JSON": (NEGOTIATION, b"{stop}", GENERIC, "JSON parse error, invalid keyword 'stop'"),
    "no object": (NEGOTIATION, b"[1]", GENERIC, "QMP input must be a JSON object"),
    "no command": (NEGOTIATION, b"{}", GENERIC, "QMP input lacks member 'execute'"),
    "no name": (
        NEGOTIATION, b'{"execute": 1}', GENERIC, "QMP input member 'execute' must be a string",
    ),
    "no arguments": (
        NEGOTIATION, b'{"execute": "stop", "arguments": 1}',
        GENERIC, "QMP input member 'arguments' must be an object",
    ),
    "one too many": (
        NEGOTIATION, b'{"execute": "stop", "x": 1}', GENERIC, "QMP input member 'x' is unexpected",
    ),
    "oob not enabled": (
        NEGOTIATION, b'{"exec-oob": "stop"}', GENERIC, "QMP input member 'exec-oob' is unexpected",
    ),
    "oob and not": (
        OOB, b'{"exec-oob": "stop", "execute": "stop"}',
        GENERIC, "QMP input member 'execute' clashes with 'exec-oob'",
    ),
    "oob without a name": (
        OOB, b'{"exec-oob": 1}', GENERIC, "QMP input member 'exec-oob' must be a string",
    ),
    "oob negotiation": (
        OOB, b'{"exec-oob": "qmp_capabilities"}',
        GENERIC, "The command qmp_capabilities does not support OOB",
    ),
    "no list": (
        b"", b'{"execute": "qmp_capabilities", "arguments": {"enable": {}}}',
        GENERIC, "Invalid parameter type for 'enable', expected: array",
    ),
    "no strings": (
        b"", b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob", 1]}}',
        GENERIC, "Invalid parameter type for 'enable[1]', expected: string",
    ),
    "no capability": (
        b"", b'{"execute": "qmp_capabilities", "arguments": {"enable": ["x"]}}',
        GENERIC, "Parameter 'null' does not accept value 'x'",
    ),
    "unexpected argument": (
        b"", b'{"execute": "qmp_capabilities", "arguments": {"x": 1}}',
        GENERIC, "Parameter 'x' is unexpected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_refused_before_a_command_is_looked_up(name: str) -> None:
    before, data, kind, desc = ERRORS[name]
    assert told(session(before), data) == {"error": {"class": kind, "desc": desc}}


def test_oob_can_be_had_only_where_it_is_offered() -> None:
    server = session(b"", "other")
    assert told(server, OOB)["error"]["desc"] == "Capability oob not available"
    assert server.is_negotiating
    assert told(session(b""), OOB) == {"return": {}}


def test_a_refused_negotiation_ends_nothing() -> None:
    server = session(b'{"execute": "qmp_capabilities", "arguments": {"enable": 1}}')
    assert server.is_negotiating
    assert told(server, NEGOTIATION) == {"return": {}}
    assert (server.is_negotiating, server.is_out_of_band_enabled) == (False, False)


@pytest.mark.parametrize("value", [None, 0, "", [], {"b": [1.5]}, False, "\u2603"])
def test_any_id_is_repeated(value: Any) -> None:
    server = session()
    (command,) = server.receive(json.dumps({"execute": "x", "id": value}).encode())
    assert isinstance(command, Command)
    assert json.loads(server.answer(command, {})) == {"return": {}, "id": value}
    assert json.loads(server.refuse(command, "GenericError", "no"))["id"] == value
    assert told(server, json.dumps({"id": value}).encode())["id"] == value


def test_who_gives_no_id_gets_none() -> None:
    server = session()
    (command,) = server.receive(b'{"execute": "x", "arguments": {"y": 1}}')
    assert command == Command("x", {"y": 1}, None, has_id=False, is_out_of_band=False)
    assert server.answer(command, [1, {"b": 2, "a": 3}]) == b'{"return": [1, {"b": 2, "a": 3}]}\r\n'


def test_what_is_json_already_is_passed_on_as_it_is() -> None:
    server = session()
    (command,) = server.receive(b'{"execute": "x", "id": 1}')
    assert isinstance(command, Command)
    assert server.answer_raw(command, b'{"a":1}') == b'{"return": {"a":1}, "id": 1}\r\n'
    assert server.refuse_raw(command, b'{"class":"X"}') == b'{"id": 1, "error": {"class":"X"}}\r\n'
    assert server.event_raw(b'{"event":1}') == b'{"event":1}\r\n'


def test_what_is_out_of_band_is_marked_even_if_it_is_refused() -> None:
    server = session(OOB)
    first, second, third = server.receive(
        b'{"exec-oob": "a"}{"exec-oob": "a", "x": 1}{"execute": "a"}'
    )
    assert isinstance(first, Command)
    assert isinstance(second, Answer)
    assert [each.is_out_of_band for each in (first, second, third)] == [True, True, False]


def test_no_event_before_the_negotiation() -> None:
    server = Server(GREETING)
    assert server.event("STOP", None, 1) == b""
    assert server.event_raw(b"{}") == b""
    server.receive(NEGOTIATION)
    assert server.event("STOP", {"a": 1}, 3_000_004) == (
        b'{"timestamp": {"seconds": 3, "microseconds": 4}, "event": "STOP", "data": {"a": 1}}\r\n'
    )


def test_text_of_others_is_written_so_that_a_client_can_read_it() -> None:
    server = session()
    (command,) = server.receive(b'{"execute": "x"}')
    assert isinstance(command, Command)
    line = server.refuse(command, "GenericError", "no file '\udcff\ufffe\x7f\n'")
    assert json.loads(line)["error"]["desc"] == "no file '\ufffd\ufffd\x7f\n'"
    assert line.isascii()


# --- both sessions -------------------------------------------------------------------------------


def heard(client: Client, data: bytes) -> Message:
    (message,) = client.receive(data)
    return message


def test_two_sessions_talk() -> None:
    client, server = Client(), Server(GREETING)
    greeting = heard(client, server.greeting())
    assert isinstance(greeting, Greeting)
    assert greeting.value() == GREETING
    number, line = client.send("qmp_capabilities", {"enable": ["oob"]})
    (answer,) = server.receive(line)
    assert isinstance(answer, Answer)
    assert heard(client, answer.line) == Returned(number, b"{}")
    number, line = client.send("x", {"big": 1e400, "small": [-1, 1.5, 2.0]})
    (command,) = server.receive(line)
    assert isinstance(command, Command)
    assert command.arguments == {"big": float("inf"), "small": [-1, 1.5, 2.0]}
    returned = heard(client, server.answer(command, {"a": [1]}))
    assert isinstance(returned, Returned)
    assert (returned.id, returned.value()) == (number, {"a": [1]})
    refused = heard(client, server.refuse(command, "DeviceNotFound", "no 'é'"))
    assert isinstance(refused, Refused)
    assert refused.value() == {"class": "DeviceNotFound", "desc": "no 'é'"}
    event = heard(client, server.event("STOP", {"x": 1}, 1_500_000))
    assert isinstance(event, Event)
    assert (event.name, event.at_us, event.value()) == ("STOP", 1_500_000, {"x": 1})
    assert server.event_raw(event.raw) == server.event("STOP", {"x": 1}, 1_500_000)


def test_arguments_that_are_json_already_and_out_of_band() -> None:
    client = Client()
    assert client.send("x", b'{"a":1}') == (1, b'{"execute": "x", "arguments": {"a":1}, "id": 1}\n')
    assert client.send("x", {}, is_out_of_band=True) == (2, b'{"exec-oob": "x", "id": 2}\n')


def test_an_error_without_an_id_is_none_of_a_commands() -> None:
    said = b'{"error": {"class": "GenericError", "desc": "x"}}\r\n'
    assert heard(Client(), said) == Refused(None, b'{"class": "GenericError", "desc": "x"}')
    assert heard(Client(), b'{"return": null, "id": "theirs"}\n') == Returned(None, b"null")


def test_a_monitor_that_writes_for_human_eyes() -> None:
    said = json.dumps({"return": {"a": [1, "}"]}, "id": 3}, indent=4).replace("\n", "\r\n") + "\r\n"
    for size in (1, 3, 1000):
        client = Client()
        pieces = [said[at : at + size].encode() for at in range(0, len(said), size)]
        (returned,) = [message for piece in pieces for message in client.receive(piece)]
        assert isinstance(returned, Returned)
        assert (returned.id, returned.value()) == (3, {"a": [1, "}"]})
        assert b"\n" not in returned.raw


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 400 Bad\r\n", b"[]\n", b"{}\n", b"\xff\n", b"[" * 5000 + b"\n", b"x" * 101]
)
def test_what_is_no_qmp_is_told_as_such(said: bytes) -> None:
    client = Client(longest_message_bytes=100)
    assert isinstance(heard(client, said), Unreadable)


def test_blank_lines_are_nothing() -> None:
    assert Client().receive(b"\r\n\n") == []

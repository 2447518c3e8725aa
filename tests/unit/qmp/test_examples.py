"""Every example says what the declarations say: what is sent is taken, what comes could come."""

from typing import Any

import msgspec
import pytest

from calotype.qmp.commands import ACTIONS, COMMANDS, EVENTS
from calotype.qmp.examples import examples
from calotype.qmp.schema import Example
from calotype.qmp.visiting import ParameterError, visit


@pytest.mark.parametrize("name", [*COMMANDS, *ACTIONS, *EVENTS])
def test_there_is_an_example(name: str) -> None:
    assert [each for each in examples() if each.of == name]


def test_there_is_no_example_of_what_there_is_not() -> None:
    assert {each.of for each in examples()} <= {*COMMANDS, *ACTIONS, *EVENTS}


@pytest.mark.parametrize("example", list(examples()), ids=lambda each: each.of)
def test_an_example_is_as_declared(example: Example) -> None:
    asked = ""
    refused = ""
    for way, message in example.lines:
        match way, message:
            case "->", {"execute": "transaction", "arguments": {"actions": actions}}:
                assert [judge(ACTIONS[each["type"]].data, each["data"]) for each in actions
                        if each["type"] in ACTIONS] == [""]  # fmt: skip
            case "->", {"execute": asked, "arguments": arguments}:
                refused = judge(COMMANDS[asked].arguments, arguments)
            case "<-", {"return": returned}:
                assert refused == ""
                returns = COMMANDS[asked].returns if asked else None
                assert returned == {} if returns is None else judge(returns, returned) == ""
            case "<-", {"error": {"class": "GenericError", "desc": desc}}:
                assert desc == refused
            case "<-", {"event": name, "data": data, "timestamp": _}:
                assert judge(EVENTS[name].data, data) == ""
            case _:
                pytest.fail(f"{message} is nothing that QMP has")


def judge(declared: Any, value: Any) -> str:
    """What *value* is refused with, if it is; else it comes out as it went in."""
    try:
        made = visit(declared, value)
    except ParameterError as error:
        return error.problem
    assert msgspec.json.decode(msgspec.json.encode(made)) == value
    return ""

"""What `query-qmp-schema` would say of ours, and how it grows into what QEMU says of its own."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest

from calotype.errors import ConflictError
from calotype.qmp import introspection
from calotype.qmp.commands import ACTIONS, COMMANDS, EVENTS, JOB_TYPES
from calotype.qmp.examples import examples
from calotype.qmp.introspection import merged, schema
from introspecting import by_name, conforms, referenced


def enum(name: str, *values: str) -> dict[str, Any]:
    members = [{"name": value} for value in values]
    return {"name": name, "meta-type": "enum", "members": members, "values": list(values)}


def struct(name: str, **members: str) -> dict[str, Any]:
    listed = [{"name": member, "type": kind} for member, kind in members.items()]
    return {"name": name, "meta-type": "object", "members": listed}


QEMU: list[dict[str, Any]] = [
    {"name": "transaction", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
    {"name": "query-jobs", "meta-type": "command", "arg-type": "0", "ret-type": "[5]"},
    struct("0"),
    struct("1", actions="[2]"),
    {"name": "[2]", "meta-type": "array", "element-type": "2"},
    {**struct("2", type="3"), "tag": "type", "variants": [{"case": "abort", "type": "4"}]},
    enum("3", "abort"),
    struct("4", data="0"),
    {"name": "[5]", "meta-type": "array", "element-type": "5"},
    struct("5", id="str", type="6"),
    enum("6", "commit"),
    {"name": "str", "meta-type": "builtin", "json-type": "string"},
]
"""As much of a QEMU's schema as ours grows into."""


def test_no_name_has_two_meanings() -> None:
    told: dict[str, Any] = {}
    for entity in introspection._ours():
        assert told.setdefault(entity["name"], entity) == entity


@pytest.mark.parametrize("entities", [schema(), merged(QEMU)], ids=["ours", "merged"])
def test_every_name_that_is_referenced_is_there_once(entities: list[dict[str, Any]]) -> None:
    named = by_name(entities)
    assert {name for each in entities for name in referenced(each)} <= named.keys()


def test_no_type_is_told_of_that_nothing_uses() -> None:
    used = {name for each in schema() for name in referenced(each)}
    types = {each["name"] for each in schema() if each["meta-type"] not in ("command", "event")}
    wrappers = {"MachineStateSaveWrapper"}  # which a branch of QEMU's union refers to
    assert types - used == wrappers


def test_commands_and_events_are_there_with_their_types() -> None:
    named = by_name(schema())
    for name in COMMANDS:
        assert named[name]["meta-type"] == "command"
        assert named[named[name]["arg-type"]]["meta-type"] == "object"
    for name in EVENTS:
        assert named[name]["meta-type"] == "event"
    assert named["query-system-snapshots"]["ret-type"] == "[SystemSnapshotInfo]"
    assert named["system-snapshot-save"]["ret-type"] == "q_empty"


def test_optional_members_have_a_default_of_null_and_others_none() -> None:
    members = by_name(by_name(schema())["LoadArguments"]["members"])
    assert members["tag"] == {"name": "tag", "type": "str", "default": None}
    assert members["job-id"] == {"name": "job-id", "type": "str"}


def test_a_union_says_what_each_value_of_its_discriminator_brings() -> None:
    union = by_name(schema())["MachineStateDestination"]
    assert union["tag"] == "type"
    assert union["members"] == [{"name": "type", "type": "MachineStateType"}]
    assert {each["case"]: each["type"] for each in union["variants"]} == {
        "none": "q_empty",
        "internal": "MachineStateInternal",
        "image": "MachineStateImage",
        "external": "q_empty",
    }


def test_transaction_gains_our_actions_and_query_jobs_our_jobs() -> None:
    named = by_name(merged(QEMU))
    cases = {each["case"] for each in named["2"]["variants"]}
    assert cases == {"abort", *ACTIONS}
    for name, values in (("3", {"abort", *ACTIONS}), ("6", {"commit", *JOB_TYPES})):
        assert set(named[name]["values"]) == values
        assert {each["name"] for each in named[name]["members"]} == values


def test_what_qemu_said_is_left_as_it_is() -> None:
    before = deepcopy(QEMU)
    named = by_name(merged(QEMU))
    assert before == QEMU
    assert [each for each in QEMU if each["name"] not in ("2", "3", "6")] == [
        named[each["name"]] for each in QEMU if each["name"] not in ("2", "3", "6")
    ]


def rivals() -> Iterator[tuple[list[dict[str, Any]], str]]:
    yield [*QEMU, struct("SaveMethod")], "SaveMethod"
    yield [*QEMU, {**QEMU[0], "name": "system-snapshot-save"}], "system-snapshot-save"
    union = {**QEMU[5], "variants": [{"case": "machine-state-save", "type": "4"}]}
    yield [*QEMU[:5], union, *QEMU[6:]], "machine-state-save"


@pytest.mark.parametrize(("qemu", "name"), list(rivals()), ids=["type", "command", "action"])
def test_a_qemu_that_has_one_of_our_names_is_refused(qemu: list[dict[str, Any]], name: str) -> None:
    with pytest.raises(ConflictError, match=name) as raised:
        merged(qemu)
    assert raised.value.data == {"names": [name]}


@pytest.mark.parametrize("example", list(examples()), ids=lambda each: each.of)
def test_examples_are_of_the_types_that_are_told(example: Any) -> None:
    named = by_name(merged(QEMU))
    command: dict[str, Any] = {}
    is_refused = "error" in example.lines[-1][1]
    for _, message in example.lines:
        match message:
            case {"execute": "transaction", "arguments": {"actions": actions}}:
                ours = [each for each in actions if each["type"] in ACTIONS]
                assert ours
                assert all(conforms(each, "2", named) for each in ours)
            case {"execute": name, **rest}:
                command = dict(named[name])
                arguments = rest.get("arguments", {})
                has_all = conforms(arguments, command["arg-type"], named)
                assert has_all or is_refused
            case {"return": returned}:
                assert conforms(returned, command.get("ret-type", "0"), named)
            case {"event": name, "data": data}:
                assert conforms(data, named[name]["arg-type"], named)
            case _:
                assert is_refused

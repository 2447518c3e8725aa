"""Arguments become values, or are refused in QEMU's words; that they are its, tests/real sees."""

import math
from typing import Any

import pytest

from calotype.qmp.commands import (
    DeleteArguments,
    LoadArguments,
    MachineStateSave,
    QueryArguments,
    SaveArguments,
)
from calotype.qmp.schema import QmpStruct
from calotype.qmp.visiting import ParameterError, visit
from calotype.qmp.vocabulary import (
    MachineStateImage,
    MachineStateNone,
    StorageSnapshotSpec,
)

NOWHERE = {"type": "none"}


class Scalars(QmpStruct, frozen=True, kw_only=True):
    """One of each builtin type, and arrays."""

    text: str = ""
    whole: int = 0
    real: float = 0.0
    claim: bool = False
    wholes: tuple[int, ...] = ()
    nested: tuple[tuple[int, ...], ...] = ()


def refusal(declared: Any, value: Any, at: str = "") -> str:
    with pytest.raises(ParameterError) as raised:
        visit(declared, value, at)
    return raised.value.problem


def test_what_is_left_out_has_its_default() -> None:
    assert visit(SaveArguments, {"job-id": "j", "machine-state": NOWHERE}) == SaveArguments(
        job_id="j",
        machine_state=MachineStateNone(),
        tag=None,
        description=None,
        storage=(),
        method="auto",
        pause_limit_ms=2000.0,
        on_conflict="fail",
    )


def test_what_is_there_is_taken() -> None:
    given = {
        "job-id": "j",
        "tag": "%s {x} ../' \x7f",
        "machine-state": {"type": "image", "filename": "/i"},
        "storage": [{"node-name": "a", "kind": "skip"}, {"node-name": "b", "kind": "internal"}],
        "pause-limit-ms": 7,
        "on-conflict": "replace",
    }
    assert visit(SaveArguments, given) == SaveArguments(
        job_id="j",
        tag="%s {x} ../' \x7f",
        machine_state=MachineStateImage(filename="/i"),
        storage=(
            StorageSnapshotSpec(node_name="a", kind="skip"),
            StorageSnapshotSpec(node_name="b", kind="internal"),
        ),
        pause_limit_ms=7.0,
        on_conflict="replace",
    )


def test_what_is_given_is_left_as_it_is() -> None:
    given = {"job-id": "j", "machine-state": {"type": "image", "filename": "/i"}}
    visit(SaveArguments, given)
    assert given["machine-state"] == {"type": "image", "filename": "/i"}


@pytest.mark.parametrize(
    "value", [{"whole": 2**63 - 1}, {"whole": -(2**63)}, {"real": 3}, {"real": -0.5}]
)
def test_numbers_are_accepted_in_their_range(value: dict[str, Any]) -> None:
    (name,) = value
    assert getattr(visit(Scalars, value), name) == value[name]


def test_an_integer_that_no_double_holds_is_infinite_as_a_number() -> None:
    assert visit(Scalars, {"real": 10**400}).real == math.inf
    assert visit(Scalars, {"real": -(10**400)}).real == -math.inf


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"text": 1}, "Invalid parameter type for 'text', expected: string"),
        ({"text": None}, "Invalid parameter type for 'text', expected: string"),
        ({"whole": "1"}, "Invalid parameter type for 'whole', expected: integer"),
        ({"whole": 1.0}, "Invalid parameter type for 'whole', expected: integer"),
        ({"whole": True}, "Invalid parameter type for 'whole', expected: integer"),
        ({"whole": 2**63}, "Invalid parameter type for 'whole', expected: integer"),
        ({"real": "1"}, "Invalid parameter type for 'real', expected: number"),
        ({"real": False}, "Invalid parameter type for 'real', expected: number"),
        ({"claim": 1}, "Invalid parameter type for 'claim', expected: boolean"),
        ({"wholes": {}}, "Invalid parameter type for 'wholes', expected: array"),
        ({"wholes": [1, "2"]}, "Invalid parameter type for 'wholes[1]', expected: integer"),
        ({"nested": [[], [1, ""]]}, "Invalid parameter type for 'nested[1][1]', expected: integer"),
        ({"": 1}, "Parameter '' is unexpected"),
        ({"{x}%s": 1}, "Parameter '{x}%s' is unexpected"),
        ([], "Invalid parameter type for '<anonymous>', expected: object"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_told(value: Any, problem: str) -> None:
    assert refusal(Scalars, value) == problem


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "Parameter 'machine-state' is missing"),
        ({"machine-state": "none"}, "Invalid parameter type for 'machine-state', expected: object"),
        ({"machine-state": {}}, "Parameter 'machine-state.type' is missing"),
        ({"machine-state": {"type": 1}},
         "Invalid parameter type for 'machine-state.type', expected: string"),
        ({"machine-state": {"type": "{0}"}}, "Parameter 'type' does not accept value '{0}'"),
        ({"machine-state": {"type": "image"}}, "Parameter 'machine-state.filename' is missing"),
        ({"machine-state": {"type": "none", "filename": "f"}},
         "Parameter 'machine-state.filename' is unexpected"),
        ({"machine-state": NOWHERE}, "Parameter 'job-id' is missing"),
        ({"machine-state": NOWHERE, "job-id": "j", "method": "quick"},
         "Parameter 'method' does not accept value 'quick'"),
        ({"machine-state": NOWHERE, "job-id": "j", "job_id": "j"},
         "Parameter 'job_id' is unexpected"),
        ({"machine-state": NOWHERE, "storage": [{"node-name": "a", "kind": "skip"}, {"kind": "x"}]},
         "Parameter 'storage[1].node-name' is missing"),
        ({"machine-state": NOWHERE, "storage": [{"node-name": "a", "kind": "x"}]},
         "Parameter 'kind' does not accept value 'x'"),
        ({"machine-state": NOWHERE, "storage": [{"node-name": "a", "kind": "skip", "size": 1}]},
         "Parameter 'storage[0].size' is unexpected"),
        ({"machine-state": NOWHERE, "storage": [3]},
         "Invalid parameter type for 'storage[0]', expected: object"),
    ],
)  # fmt: skip
def test_arguments_of_a_save_are_refused_by_name(given: Any, problem: str) -> None:
    assert refusal(SaveArguments, given) == problem


@pytest.mark.parametrize("declared", [LoadArguments, DeleteArguments])
@pytest.mark.parametrize("given", [{}, {"tag": "t", "id": "i"}])
def test_both_or_none_of_tag_and_id_is_refused(declared: Any, given: dict[str, str]) -> None:
    text = "Need exactly one of 'tag' and 'id'"
    assert refusal(declared, {"job-id": "j", **given}) == text


@pytest.mark.parametrize("given", [{"tag": ""}, {"id": "i"}])
def test_one_of_tag_and_id_is_accepted_be_it_empty(given: dict[str, str]) -> None:
    asked = visit(LoadArguments, {"job-id": "j", **given})
    assert (asked.tag, asked.id) == (given.get("tag"), given.get("id"))


def test_a_list_may_be_narrowed_by_both() -> None:
    assert visit(QueryArguments, {"tag": "t", "id": "i"}) == QueryArguments(tag="t", id="i")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"job-id": "j", "destination": NOWHERE}, "Parameter 'actions[2].data.tag' is missing"),
        ({"job-id": "j", "tag": "t", "destination": NOWHERE, "x": 1},
         "Parameter 'actions[2].data.x' is unexpected"),
        (None, "Invalid parameter type for 'actions[2].data', expected: object"),
    ],
)  # fmt: skip
def test_faults_of_an_action_are_told_by_where_it_stands(value: Any, problem: str) -> None:
    assert refusal(MachineStateSave, value, "actions[2].data") == problem


def test_a_refusal_names_the_parameter_and_where_to_look() -> None:
    with pytest.raises(ParameterError) as raised:
        visit(SaveArguments, {"machine-state": {}})
    assert raised.value.data == {"parameter": "machine-state.type"}
    assert "query-qmp-schema" in raised.value.remedy

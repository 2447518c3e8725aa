"""All that our QMP commands are made of is described, and can be found on the page."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from calotype.qmp.commands import ACTIONS, COMMANDS, EVENTS, JOB_TYPES
from calotype.qmp.examples import examples
from calotype.qmp.schema import (
    Array,
    Enumeration,
    Object,
    Shape,
    Variants,
    shape_of,
)

PAGE = (Path(__file__).parents[2] / "docs" / "qmp.md").read_text()
SECTIONS = dict(re.findall(r"^### (.+)\n((?:(?!##).*\n)*)", PAGE, re.MULTILINE))


def declared() -> Iterator[Shape]:
    for command in COMMANDS.values():
        yield shape_of(command.arguments)
        if command.returns is not None:
            yield shape_of(command.returns)
    yield from (shape_of(each.data) for each in ACTIONS.values())
    yield from (shape_of(each.data) for each in EVENTS.values())


def docs(shape: Shape, path: str) -> Iterator[tuple[str, str]]:
    """What is said of a type and all that it is made of, each by its path."""
    match shape:
        case Array():
            yield from docs(shape.element, f"{path}[]")
        case Enumeration():
            yield path, shape.doc
            yield from ((f"{path}={value}", doc) for value, doc in shape.values.items())
        case Object():
            yield path, shape.doc
            for member in shape.members:
                yield f"{path}.{member.name}", member.doc
                yield from docs(member.shape, f"{path}.{member.name}")
        case Variants():
            yield path, shape.doc
            yield path, shape.discriminator.doc
            yield from docs(shape.discriminator.shape, path)
            for value, branch in shape.branches.items():
                yield from docs(branch, f"{path}({value})")


@pytest.mark.parametrize("shape", list(declared()), ids=lambda shape: shape.name)
def test_every_type_member_and_value_is_described(shape: Shape) -> None:
    told = dict(docs(shape, shape.name))
    assert len(told) > 1
    assert [path for path, doc in told.items() if not doc.endswith(".")] == []


@pytest.mark.parametrize("name", [*COMMANDS, *ACTIONS, *EVENTS])
def test_every_command_action_and_event_has_a_section_with_an_example(name: str) -> None:
    assert SECTIONS[name].strip()
    shown = [each for each in examples() if each.of == name]
    assert SECTIONS[name].count("```\n") == 2 * len(shown) > 0


@pytest.mark.parametrize("name", [*COMMANDS, *ACTIONS])
def test_every_error_is_in_the_section_of_its_command(name: str) -> None:
    refusals = (COMMANDS.get(name) or ACTIONS[name]).refusals
    for each in refusals:
        assert f"| `{each.error_class}` | {each.when} | {each.remedy} |" in SECTIONS[name]
        assert each.when
        assert each.remedy


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_says_when_it_is_sent(name: str) -> None:
    assert EVENTS[name].doc.endswith(".")


def test_every_type_that_is_linked_has_a_section() -> None:
    linked = set(re.findall(r"\]\(#([\w-]+)\)", PAGE))
    assert linked
    assert linked <= {head.lower() for head in SECTIONS}


def test_every_type_of_job_is_described() -> None:
    assert all(JOB_TYPES.values())
    assert all(f"| `{name}` | {meaning} |" in PAGE for name, meaning in JOB_TYPES.items())

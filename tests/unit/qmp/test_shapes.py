"""A declaration is read as what it says; one that contradicts itself is refused when it is read."""

from typing import Annotated, Any, Literal

import pytest

from calotype.qmp.schema import (
    Array,
    Branches,
    Builtin,
    Choices,
    Doc,
    Enumeration,
    Object,
    QmpStruct,
    Variants,
    shape_of,
)

Colour = Annotated[
    Literal["red", "blue"], Choices("Colour", "How.", {"red": "As a rose.", "blue": "As the sea."})
]
Kind = Annotated[Literal["here", "there"], Choices("Kind", "", {"here": "", "there": ""})]


class Here(QmpStruct, frozen=True, kw_only=True, tag_field="kind", tag="here"):
    """Nowhere else."""


class There(QmpStruct, frozen=True, kw_only=True, tag_field="kind", tag="there"):
    """Elsewhere."""

    how_far: int


class Thing(QmpStruct, frozen=True, kw_only=True):
    """A thing.

    It is
    described.
    """

    is_big: Annotated[bool, Doc("Whether it fills a room.")]
    colour: Annotated[Colour | None, Doc("Its colour.")] = None
    weight: float = 1.5
    names: tuple[str, ...] = ()


def thing() -> Object:
    shape = shape_of(Thing)
    assert isinstance(shape, Object)
    return shape


def test_a_struct_is_told_by_its_docstring_with_a_line_to_a_paragraph() -> None:
    assert (thing().name, thing().doc) == ("Thing", "A thing.\n\nIt is described.")


def test_members_are_spelled_as_on_the_wire_and_optional_if_they_have_a_default() -> None:
    told = [(each.name, each.attribute, each.is_optional) for each in thing().members]
    assert told == [
        ("is-big", "is_big", False),
        ("colour", "colour", True),
        ("weight", "weight", True),
        ("names", "names", True),
    ]


def test_a_member_has_its_doc_default_and_type() -> None:
    is_big, colour, weight, names = thing().members
    assert is_big.doc == "Whether it fills a room."
    assert weight.default == 1.5
    assert (is_big.shape, weight.shape) == (Builtin("bool"), Builtin("number"))
    assert names.shape == Array(Builtin("str"))
    assert names.shape.name == "[str]"
    assert isinstance(colour.shape, Enumeration)
    assert colour.shape.values == {"red": "As a rose.", "blue": "As the sea."}


def test_a_union_has_the_branches_of_its_discriminator() -> None:
    shape = shape_of(Annotated[Here | There, Branches("Place", "Where.", Kind, "Which.")])
    assert isinstance(shape, Variants)
    assert (shape.name, shape.doc, shape.discriminator.doc) == ("Place", "Where.", "Which.")
    assert shape.discriminator.name == "kind"
    assert {value: branch.kind for value, branch in shape.branches.items()} == {
        "here": Here,
        "there": There,
    }
    assert [each.name for each in shape.branches["there"].members] == ["how-far"]


class BadRule(QmpStruct, frozen=True, kw_only=True):
    """Its rule is about a member that must be there anyway."""

    exactly_one = ("one", "other")
    one: str
    other: str = ""


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        (Annotated[Literal["a", "b"], Choices("Enum", "", {"a": ""})], "Enum is described"),
        (Annotated[Here | There, Branches("Place", "", Colour, "")], "Place has other branches"),
        (BadRule, "BadRule has a rule"),
        (Literal["a"], "says nothing"),
        (bytes, "says nothing"),
        (dict[str, int], "says nothing"),
    ],
)
def test_what_contradicts_itself_is_refused(declared: Any, problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        shape_of(declared)

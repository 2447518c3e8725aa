"""Whatever comes as arguments is taken or refused, and rightly by what is served of the schema."""

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from calotype.qmp.commands import ACTIONS, COMMANDS
from calotype.qmp.examples import examples
from calotype.qmp.introspection import schema
from calotype.qmp.schema import QmpStruct
from calotype.qmp.visiting import ParameterError, visit
from introspecting import by_name, conforms

SCHEMA = by_name(schema())

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
)
names = st.sampled_from(
    sorted({member["name"] for each in schema() for member in each.get("members", ())})
)
json = st.recursive(
    scalars | names,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(names | st.text(), inner, max_size=3)
    ),
    max_leaves=6,
)
Case = tuple[type[QmpStruct], Any]


def sound() -> Iterator[Case]:
    """The arguments of examples, as they stand there."""
    for example in examples():
        for way, message in example.lines:
            if way == "->" and message["execute"] in COMMANDS:
                yield COMMANDS[message["execute"]].arguments, message["arguments"]
            elif way == "->":
                for each in message["arguments"]["actions"]:
                    if each["type"] in ACTIONS:
                        yield ACTIONS[each["type"]].data, each["data"]


def places(value: Any) -> list[Any]:
    """All objects and arrays in a value, itself included."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict | list) else []
    return own + [place for each in inner for place in places(each)]


@st.composite
def spoilt(draw: st.DrawFn) -> Case:
    """Arguments that were sound, but for a few members put in, taken out or altered."""
    declared, arguments = draw(st.sampled_from(list(sound())))
    arguments = copy.deepcopy(arguments)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from(places(arguments)))
        if isinstance(place, list):
            place.append(draw(json))
        elif place and draw(st.booleans()):
            del place[draw(st.sampled_from(sorted(place)))]
        else:
            place[draw(st.sampled_from(sorted(place)) | names if place else names)] = draw(json)
    return declared, arguments


@given(spoilt() | st.tuples(st.sampled_from([each for each, _ in sound()]), json))
def test_what_is_taken_is_what_the_schema_tells_and_nothing_else_goes_wrong(case: Case) -> None:
    declared, arguments = case
    rule = declared.exactly_one
    keeps_rule = not rule or (
        isinstance(arguments, dict) and sum(each in arguments for each in rule) == 1
    )
    try:
        visit(declared, arguments)
    except ParameterError:
        is_taken = False
    else:
        is_taken = True
    assert is_taken == (conforms(arguments, declared.__name__, SCHEMA) and keeps_rule)

"""What came in as arguments, checked against a declaration and made a value of it.

A port of what QEMU's input visitor refuses, in its words, so that a client of ours meets the same
texts for our commands as for QEMU's own. The order is QEMU's too, as far as it has one: members as
they are declared, then the branch of a union, then what nobody asked for, then the rules.

Two things look odd and are QEMU's: an enum's bad value is told with the member's bare name, where
all others are told with the path (`storage[0].kind`), and in an array that name is `null`.

Source: qapi/qobject-input-visitor.c and qapi/qapi-visit-core.c of QEMU 10.0; the texts are those
of 7.2 as well.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar, cast

from calotype.errors import RequestError
from calotype.qmp.schema import (
    Array,
    Builtin,
    Enumeration,
    Member,
    Object,
    QmpStruct,
    Shape,
    Variants,
    shape_of,
)

T = TypeVar("T")

REMEDY = "`query-qmp-schema` and docs/qmp.md say what the command takes"


class Fault(NamedTuple):
    """One kind of refusal: its text, with places for its data, and what it means."""

    text: str
    meaning: str


MISSING = Fault("Parameter '{name}' is missing", "a member that is not optional is not there")
UNEXPECTED = Fault("Parameter '{name}' is unexpected", "there is a member that the type has not")
WRONG_TYPE = Fault(
    "Invalid parameter type for '{name}', expected: {type}",
    "its JSON type is not the expected string, integer, number, boolean, array or object",
)
NOT_ACCEPTED = Fault(
    "Parameter '{name}' does not accept value '{value}'", "the string is no value of the enum"
)
NOT_ONE = Fault(
    "Need exactly one of '{name}' and '{other}'",
    "both are there, or neither is, of two members that stand for each other",
)
FAULTS = (MISSING, UNEXPECTED, WRONG_TYPE, NOT_ACCEPTED, NOT_ONE)


class ParameterError(RequestError):
    """Arguments are not what was declared; `problem` is QEMU's text for that, word for word.

    A service answers with `problem` alone, in the class `GenericError`.
    """


def _refusal(fault: Fault, name: str, **data: str) -> ParameterError:
    return ParameterError(fault.text.format(name=name, **data), REMEDY, parameter=name)


def visit(declared: type[T], value: Any, at: str = "") -> T:
    """Check a value that JSON held, and make what was declared of it.

    Args:
        declared: A `QmpStruct`, or another type that `shape_of` reads.
        value: The JSON value, as Python's own types.
        at: Where it stands, such as `actions[2].data`; "" if it is all of the arguments.

    Raises:
        ParameterError: It is not what was declared.
    """
    return cast("T", _visit(shape_of(declared), value, at, "null"))


def _visit(shape: Shape, value: Any, path: str, name: str) -> Any:
    """Check a value that stands at *path*, as the member *name* of what it stands in."""
    match shape:
        case Builtin():
            word, is_one, made = _SCALARS[shape.name]
            if not is_one(value):
                raise _refusal(WRONG_TYPE, path or _ANONYMOUS, type=word)
            return made(value)
        case Enumeration():
            if _visit(_STRING, value, path, name) not in shape.values:
                raise _refusal(NOT_ACCEPTED, name, value=value)
            return value
        case Array():
            items = expected(list, "array", value, path)
            places = ((each, f"{path}[{index}]") for index, each in enumerate(items))
            return tuple(_visit(shape.element, each, place, "null") for each, place in places)
        case Object():
            return _visit_object(shape, expected(dict, "object", value, path), path)
        case Variants():
            given = expected(dict, "object", value, path)
            chosen = _visit_member(shape.discriminator, given, path)
            rest = {key: given[key] for key in given if key != shape.discriminator.name}
            return _visit_object(shape.branches[chosen], rest, path)


def _visit_object(shape: Object, given: Mapping[str, Any], path: str) -> QmpStruct:
    there = (each for each in shape.members if not each.is_optional or each.name in given)
    values = {each.attribute: _visit_member(each, given, path) for each in there}
    refuse_unexpected(given, {each.name for each in shape.members}, path)
    rivals = shape.kind.exactly_one
    if rivals and sum(each in given for each in rivals) != 1:
        one, other = (_below(path, each) for each in rivals)
        raise _refusal(NOT_ONE, one, other=other)
    return shape.kind(**values)


def _visit_member(member: Member, given: Mapping[str, Any], path: str) -> Any:
    value = required(given, member.name, path)
    return _visit(member.shape, value, _below(path, member.name), member.name)


def refuse_unexpected(given: Mapping[str, Any], known: Collection[str], path: str) -> None:
    """Refuse members that an object, which stands at *path*, is not to have.

    Raises:
        ParameterError: There is one.
    """
    for name in given:
        if name not in known:
            raise _refusal(UNEXPECTED, _below(path, name))


def required(given: Mapping[str, Any], name: str, path: str) -> Any:
    """The member *name* of an object that stands at *path*.

    Raises:
        ParameterError: It is not there.
    """
    if name not in given:
        raise _refusal(MISSING, _below(path, name))
    return given[name]


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def expected(kind: type[T], word: str, value: Any, path: str) -> T:
    """A value that stands at *path*, which must be of a kind that QEMU calls by *word*.

    Raises:
        ParameterError: It is not.
    """
    if not isinstance(value, kind):
        raise _refusal(WRONG_TYPE, path or _ANONYMOUS, type=word)
    return value


_ANONYMOUS = "<anonymous>"
_STRING = Builtin("str")
_INT64_LIMIT = 1 << 63


def _is_integer(value: Any) -> bool:
    """No number with a point or an exponent is one, and none that 64 bits do not hold."""
    return _is_number(value) and isinstance(value, int) and -_INT64_LIMIT <= value < _INT64_LIMIT


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _double(value: float) -> float:
    """As a C double; an integer that none can hold is infinite, as in strtod(3)."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


_SCALARS: Mapping[str, tuple[str, Callable[[Any], bool], Callable[[Any], Any]]] = {
    "str": ("string", lambda value: isinstance(value, str), str),
    "int": ("integer", _is_integer, int),
    "number": ("number", _is_number, _double),
    "bool": ("boolean", lambda value: isinstance(value, bool), bool),
}
"""Of each builtin type: QEMU's word for it, which values are of it, and what is made of one."""

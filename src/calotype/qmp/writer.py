r"""Values to bytes, as QEMU writes them (qobject/json-writer.c, qobject/qdict.c).

A blank after each comma and colon, `\uXXXX` for all that is not printable ASCII, doubles with up to
17 digits. QEMU writes a whole double like an integer; here that is done only where a client hears
its own words again, because QEMU takes no double where it wants an integer, and must see the
difference in arguments that are passed on. An infinite number, which QEMU writes as no JSON reader
reads it, is written as one that every reader takes for infinite.

QEMU keeps the members of an object in a hash table, and goes through them in the order of that. So
what a client wrote comes back in another order, an answer has its `id` after `return` but before
`error`, and of two things that are wrong with a request the order says which one is told.
What is QEMU's already, or ours, stays in the order in which it is.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from calotype.qmp.unicode import NO_CHARACTER, encoded

_BUCKETS = 512
_SPECIAL = re.compile(r"[^ !#-\[\]-~]")
_NAMED = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def written(value: Any) -> bytes:
    """Write a value on one line, members in the order in which they are, a double as a double.

    Args:
        value: Mapping, list or tuple, str, int, float, bool or None, nested to any depth.
    """
    return "".join(_pieces(value, _as_they_are, _double)).encode()


def echoed(value: Any) -> bytes:
    """Write a value that a client wrote exactly as QEMU would."""
    return "".join(_pieces(value, ordered, _shortest)).encode()


def _as_they_are(members: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(members.items())


def ordered(members: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The members of an object in the order in which QEMU goes through them.

    It has 512 buckets and goes through each from the newest to the oldest (qdict.c, tdb_hash).
    """
    if len(members) < 2:  # noqa: PLR2004 - one is in order
        return list(members.items())
    newest_first = list(members.items())[::-1]
    return sorted(newest_first, key=lambda member: _bucket(member[0]))


def _bucket(name: str) -> int:
    text = encoded(name)
    value = 0x238F13AF * len(text)
    for index, byte in enumerate(text):
        value += byte << index * 5 % 24
    return (1103515243 * value + 12345) % _BUCKETS


_Order = Callable[[Mapping[str, Any]], list[tuple[str, Any]]]


class _Mark(str):
    """What stands between values; a str that is a value is written in quotes."""

    __slots__ = ()


def _pieces(value: Any, order: _Order, double: Callable[[float], str]) -> Iterable[str]:
    left: list[Any] = [value]
    while left:
        match left.pop():
            case _Mark() as mark:
                yield mark
            case Mapping() as members:
                left += _marked("{", order(members), "}")
            case list() | tuple() as items:
                left += _marked("[", [("", item) for item in items], "]")
            case float() as number:
                yield double(number)
            case scalar:
                yield _scalar(scalar)


def _marked(begin: str, members: Sequence[tuple[str, Any]], end: str) -> Iterable[Any]:
    """The marks and values of a container, last first."""
    yield _Mark(end)
    for index, (name, value) in reversed(list(enumerate(members))):
        key = f"{_quoted(name)}: " if begin == "{" else ""
        yield value
        yield _Mark((", " if index else "") + key)
    yield _Mark(begin)


def _scalar(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return _quoted(value)
        case int():
            return str(value)
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")


def _double(number: float) -> str:
    told = _shortest(number)
    return f"{told}.0" if told.lstrip("-").isdigit() else told


def _shortest(number: float) -> str:
    if math.isinf(number):
        return "1e999" if number > 0 else "-1e999"
    return f"{number:.17g}"


def _quoted(text: str) -> str:
    return f'"{_SPECIAL.sub(_escaped, text)}"'


def _escaped(special: re.Match[str]) -> str:
    character = special[0]
    if character in _NAMED:
        return _NAMED[character]
    if NO_CHARACTER.match(character):
        character = "\ufffd"
    units = character.encode("utf-16-be").hex().upper()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))

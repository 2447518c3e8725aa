r"""One document to a value, or to QEMU's complaint (qobject/json-parser.c).

QEMU looks at a document only when its brackets balance, and tells the first thing that is wrong in
the order in which a recursive parser finds it. Which is not always what one would say: a key is
parsed as any value, so that `{[}]` is about the list; and a key that is there twice is found
only after its second value. Documents nest 1,024 deep, so the recursion is a stack of our own here.

Numbers are int64, else uint64, else double, as in QEMU; one too large for a double is infinite.

`strict` reads the same at C speed where a document is strict JSON and holds nothing that Python and
QEMU judge differently. Where it says `UNDECIDED`, `parse` decides.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from calotype.qmp.lexer import (
    COLON,
    COMMA,
    FLOAT,
    INTEGER,
    KEYWORD,
    LEFT_CURLY,
    LEFT_SQUARE,
    RIGHT_CURLY,
    RIGHT_SQUARE,
    STRING,
    tokens,
)
from calotype.qmp.unicode import NO_CHARACTER, decoded, shown

_INT64_MIN, _UINT64_MAX = -(1 << 63), (1 << 64) - 1
_LONGEST_INTEGER = 20
_LONGEST_COMPLAINT_BYTES = 1023

_KEYWORDS: Mapping[bytes, Any] = {b"true": True, b"false": False, b"null": None}
_ESCAPES = dict(zip(b"\"'\\/bfnrt", b"\"'\\/\b\f\n\r\t", strict=True))
_HIGH, _LOW = range(0xD800, 0xDC00), range(0xDC00, 0xE000)
_HEXADECIMAL = re.compile(rb"[0-9A-Fa-f]{4}")
_BEFORE_ESCAPE = re.compile(rb"[^\\]*")

# what is expected, a value in all of them but the last three
_TOP, _FIRST_KEY, _KEY, _MEMBER, _FIRST_ITEM, _ITEM, _COLON, _NEXT_MEMBER, _NEXT_ITEM = range(9)

_EXPECTED: Mapping[int, str] = {
    _COLON: "missing : in object pair",
    _NEXT_MEMBER: "expected separator in dict",
    _NEXT_ITEM: "expected separator in list",
}
"""QEMU's words where something else comes."""

_PUNCTUATION: Mapping[tuple[int, int], int] = {
    (_COLON, COLON): _MEMBER,
    (_NEXT_MEMBER, COMMA): _KEY,
    (_NEXT_ITEM, COMMA): _ITEM,
}
_ENDS = frozenset(
    {
        (_FIRST_KEY, RIGHT_CURLY),
        (_NEXT_MEMBER, RIGHT_CURLY),
        (_FIRST_ITEM, RIGHT_SQUARE),
        (_NEXT_ITEM, RIGHT_SQUARE),
    }
)


class Unparsable(Exception):  # noqa: N818 - what a client wrote is no fault of a caller's
    """A document is not as QEMU wants it; the text is what QEMU says of it."""

    def __init__(self, complaint: bytes) -> None:
        super().__init__("JSON parse error, " + shown(complaint[:_LONGEST_COMPLAINT_BYTES]))


def parse(document: bytes) -> Any:
    """Read a document whose tokens are sound and whose brackets balance, or are mismatched.

    Returns:
        dict, list, str, int, float, bool or None.

    Raises:
        Unparsable: It is not as QEMU wants it.
    """
    parser = _Parser()
    for kind, text in tokens(document):
        parser.take(kind, text)
    return parser.value


class _Parser:
    """The stack of a recursive parser, with what is expected on top of it."""

    def __init__(self) -> None:
        self.value: Any = None
        self._expected = _TOP
        self._open: list[tuple[int, Any, Any]] = []
        """Of each container around: what was expected when it began, its container and its key."""
        self._container: Any = None
        self._key: Any = None

    def take(self, kind: int, text: bytes) -> None:
        """Go on by one token."""
        expected = self._expected
        if following := _PUNCTUATION.get((expected, kind)):
            self._expected = following
        elif (expected, kind) in _ENDS:
            ended = self._container
            self._expected, self._container, self._key = self._open.pop()
            self._place(ended)
        elif expected in _EXPECTED:
            _complain(_EXPECTED[expected])
        elif kind in {LEFT_CURLY, LEFT_SQUARE}:
            self._open.append((expected, self._container, self._key))
            is_object = kind == LEFT_CURLY
            self._container = {} if is_object else []
            self._expected = _FIRST_KEY if is_object else _FIRST_ITEM
        else:
            self._place(_scalar(kind, text))

    def _place(self, value: Any) -> None:
        """Put a value where one was expected."""
        expected = self._expected
        if expected == _TOP:
            self.value = value
        elif expected in {_FIRST_KEY, _KEY}:
            if not isinstance(value, str):
                _complain("key is not a string in object")
            self._key, self._expected = value, _COLON
        elif expected == _MEMBER:
            if self._key in self._container:
                _complain("duplicate key")
            self._container[self._key] = value
            self._expected = _NEXT_MEMBER
        else:
            self._container.append(value)
            self._expected = _NEXT_ITEM


def _scalar(kind: int, text: bytes) -> Any:
    if kind == STRING:
        return _string(text)
    if kind == INTEGER:
        return _integer(text.decode())
    if kind == FLOAT:
        return float(text)
    if kind != KEYWORD:
        _complain("expecting value")
    if text not in _KEYWORDS:
        raise Unparsable(b"invalid keyword '" + text + b"'")
    return _KEYWORDS[text]


def _integer(text: str) -> int | float:
    if len(text) <= _LONGEST_INTEGER and _INT64_MIN <= (number := int(text)) <= _UINT64_MAX:
        return number
    return float(text)


def _string(token: bytes) -> str:
    """The characters of a string, without its quotes and escapes."""
    text, at, end = bytearray(), 1, len(token) - 1
    while at < end:
        plain = _BEFORE_ESCAPE.match(token, at, end)
        assert plain is not None, "the pattern matches anything"
        if decoded(plain[0]) is None:
            _complain("invalid UTF-8 sequence in string")
        text += plain[0]
        at = plain.end()
        if at < end:
            at = _escape(token, at, text)
    characters = decoded(bytes(text))
    assert characters is not None, "each of its pieces is text"
    return characters


def _escape(token: bytes, begin: int, text: bytearray) -> int:
    """Append what the escape at *begin* stands for; where what follows it begins."""
    sign = token[begin + 1]
    if sign != ord("u"):
        if sign not in _ESCAPES:
            _complain("invalid escape sequence in string")
        text.append(_ESCAPES[sign])
        return begin + 2
    point, end = _unit(token, begin), begin + 6
    if point in _HIGH and token[end : end + 2] == b"\\u":
        low = _unit(token, end)
        if low in _LOW:
            point = 0x10000 + ((point & 0x3FF) << 10 | low & 0x3FF)
            end += 6
    if point < 0 or NO_CHARACTER.match(chr(point)):
        raise Unparsable(token[begin:end] + b" is not a valid Unicode character")
    text += chr(point).encode().replace(b"\0", b"\xc0\x80")
    return end


def _unit(token: bytes, begin: int) -> int:
    """The four hexadecimal digits of the escape at *begin*; -1 if they are none."""
    digits = _HEXADECIMAL.match(token, begin + 2)
    return int(digits[0], 16) if digits else -1


def _complain(complaint: str) -> NoReturn:
    raise Unparsable(complaint.encode())


# --- the same at C speed -------------------------------------------------------------------------


class _Undecided(Exception):  # noqa: N818 - it is caught here, always
    pass


UNDECIDED: Final = object()
"""What `strict` returns for a document that it leaves to `parse`."""

_DOUBTFUL_ESCAPE = re.compile(r"\\u(?:[dD][89A-Fa-f]|[fF][dDfF])")
"""A surrogate, a noncharacter, or one that only begins like them."""


def strict(document: bytes) -> Any:
    """Read a document if it is strict JSON on which Python and QEMU agree, else `UNDECIDED`.

    The document is an object or an array without blanks around it; how deep it nests and how many
    tokens it has is not looked at.
    """
    try:
        text = document.decode()
        if not document.isascii() and NO_CHARACTER.search(text):
            return UNDECIDED
        if b"\\u" in document and _DOUBTFUL_ESCAPE.search(text):
            return UNDECIDED
        value, end = _DECODER.raw_decode(text)
    except (_Undecided, ValueError, RecursionError):
        return UNDECIDED
    return value if end == len(text) else UNDECIDED


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _Undecided
    return members


def _float(text: str) -> float:
    """A double; QEMU has none that begins with a zero and an exponent."""
    if text.lstrip("-")[:2] in {"0e", "0E"}:
        raise _Undecided
    return float(text)


def _constant(_text: str) -> NoReturn:
    """NaN and the infinities, which JSON does not have."""
    raise _Undecided


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_int=_integer,
    parse_float=_float,
    parse_constant=_constant,
)

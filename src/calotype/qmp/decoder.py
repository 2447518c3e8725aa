"""A stream to documents, as QEMU's monitor takes it (qobject/json-streamer.c).

A document ends where its brackets balance, or where one closes that was never open; it needs no
newline, and may come in any number of pieces. Documents need not be objects. What is wrong is told
in its place among the documents, and the stream goes on after it:

    {"execute": "stop"}    Document
    {"execute": stop}      Malformed "JSON parse error, invalid keyword 'stop'"
    {"execute": @          Malformed "JSON parse error, stray '@'"
    "}                     Malformed "JSON parse error, expecting value"

What is held is bounded whatever comes: a document may have so many bytes, so many tokens, so many
brackets open at once, and beyond the first document that is not whole nothing is kept. What is
returned is not, and neither is the time it takes: each byte may be a complaint (`}`), and what is
no strict JSON is read in Python, at 1 to 5 us a byte. So a caller feeds a few KiB at a time where
others wait, and reads no more from a client that does not read.

Where we differ from QEMU: blanks inside a document count towards its size; what follows one that
grew too large is passed over, where QEMU would read on in the middle of it; a stray token is told
by its first 1,024 bytes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from calotype.qmp.lexer import (
    ERROR,
    LEFT_CURLY,
    LEFT_SQUARE,
    MORE,
    OVERRUN,
    RIGHT_CURLY,
    RIGHT_SQUARE,
    Lexer,
)
from calotype.qmp.parser import UNDECIDED, Unparsable, parse, strict
from calotype.qmp.unicode import shown

_LONGEST_STRAY_BYTES = 1024
_BLANKS = b" \t\r\n"


class Limits(NamedTuple):
    """What one document may be; QEMU's own limits by default.

    Args:
        document_bytes: From its first byte to its last; also the most of a document that is held.
        tokens: Brackets, commas, colons, strings, numbers and keywords.
        nesting: Brackets open at once.
    """

    document_bytes: int = 64 << 20
    tokens: int = 2 << 20
    nesting: int = 1024


QEMU_LIMITS = Limits()


class Document(NamedTuple):
    """A document: dict, list, str, int, float (also an infinite one), bool or None."""

    value: Any


class Malformed(NamedTuple):
    """Something that is no document, in QEMU's words, which it sends as a GenericError."""

    desc: str


class Decoder:
    """A stream of documents, fed in pieces of any size.

    Args:
        limits: What a document may be.
    """

    def __init__(self, limits: Limits = QEMU_LIMITS) -> None:
        self._limits = limits
        self._quick_bytes = min(limits.document_bytes, limits.tokens)
        self._lexer = Lexer(limits.document_bytes)
        self._count = 0
        self._curly = 0
        self._square = 0

    @property
    def held_bytes(self) -> int:
        """How much of what was fed is still held."""
        return self._lexer.held_bytes

    def feed(self, data: bytes) -> list[Document | Malformed]:
        """Take in what was read, of any size; what has ended by now, in the order of the wire."""
        if not self._lexer.is_at_rest:
            return list(self._slowly(data))
        found: list[Document | Malformed] = []
        begin = 0
        while begin < len(data):
            end = data.find(b"\n", begin) + 1 or len(data)
            line = data[begin:end].strip(_BLANKS)
            if line:
                value = self._quickly(line)
                if value is UNDECIDED:
                    found += self._slowly(data[begin:] if begin else data)
                    break
                found.append(Document(value))
            begin = end
        return found

    def _quickly(self, line: bytes) -> Any:
        """The value of a line that is one object; UNDECIDED if it may be anything else."""
        if line[0] != ord("{") or len(line) > self._quick_bytes:
            return UNDECIDED
        value = strict(line)
        may_be_too_deep = line.count(b"{") + line.count(b"[") > self._limits.nesting
        if may_be_too_deep and value is not UNDECIDED and _depth(value) > self._limits.nesting:
            return UNDECIDED
        return value

    def _slowly(self, data: bytes) -> Iterator[Document | Malformed]:
        """Look for the end of each document by its tokens."""
        lexer = self._lexer
        lexer.feed(data)
        while (kind := lexer.token()) != MORE:
            if complaint := self._complaint(kind):
                found: Document | Malformed = Malformed(complaint)
            elif self._is_open:
                lexer.is_inside = True
                continue
            else:
                found = _judged(lexer.document)
            self._count = self._curly = self._square = 0
            lexer.forget()
            yield found

    def _complaint(self, kind: int) -> str:
        """Count a token; what QEMU says if it is one too many or none, else nothing."""
        if kind == ERROR:
            return f"JSON parse error, stray '{shown(self._lexer.text[:_LONGEST_STRAY_BYTES])}'"
        if kind == OVERRUN:
            return "JSON token size limit exceeded"
        self._count += 1
        self._curly += (kind == LEFT_CURLY) - (kind == RIGHT_CURLY)
        self._square += (kind == LEFT_SQUARE) - (kind == RIGHT_SQUARE)
        if self._count > self._limits.tokens:
            return "JSON token count limit exceeded"
        if self._curly + self._square > self._limits.nesting:
            return "JSON nesting depth limit exceeded"
        return ""

    @property
    def _is_open(self) -> bool:
        return min(self._curly, self._square) >= 0 < max(self._curly, self._square)


def _depth(value: Any) -> int:
    """How many brackets of a value are open at once."""
    level, depth = [value], 0
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return depth


def _judged(document: bytes) -> Document | Malformed:
    value = strict(document) if document[:1] in {b"{", b"["} else UNDECIDED
    if value is not UNDECIDED:
        return Document(value)
    try:
        return Document(parse(document))
    except Unparsable as unparsable:
        return Malformed(str(unparsable))

r"""Bytes to tokens, as QEMU's monitor cuts them (qobject/json-lexer.c).

It is JSON with two liberties: strings may stand in single quotes, and an escape may be anything
that is no control character (which ones mean something is the parser's business). Three things
matter to a proxy and are easily got wrong:

* A number or a keyword ends where something else begins; until then it is not there.
* What fits nowhere is an *error*, whose text is the token up to and including the byte that does
  not fit. Then everything is passed over up to a structural character, a control character other
  than a tab, or one of the bytes FE and FF, which are never text. So a client that sends FF can be
  sure that whatever it had begun is forgotten; it is told so by an error.
* Tokens have no length of their own here, only a *limit*: on what is held at once.

The lexer is a table, a row for each state, and beside it what may be passed over in a state in one
go, which is what makes it quick. It holds the bytes that are not done with, from `begin` on.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

# states
START, RECOVERY, DOUBLE, DOUBLE_ESCAPE, SINGLE, SINGLE_ESCAPE = range(6)
SIGN, ZERO, DIGITS, POINT, FRACTION, EXPONENT, EXPONENT_SIGN, EXPONENT_DIGITS, WORD = range(6, 15)

# what a state may end in: the tokens, and an error
LEFT_CURLY, RIGHT_CURLY, LEFT_SQUARE, RIGHT_SQUARE, COLON, COMMA = range(32, 38)
INTEGER, FLOAT, KEYWORD, STRING = range(38, 42)
ERROR = 42

# what `token` says besides
MORE, OVERRUN = 43, 44

_IS_NOT_CONSUMED = 0x80

_NUMERALS = b"0123456789"
_LETTERS = b"abcdefghijklmnopqrstuvwxyz"
_TEXT = bytes(range(0x20, 0xFE))
_ANY = bytes(range(256))
_RESYNCHRONIZING = b"[]{}:,\xfe\xff" + bytes(range(0x20)).replace(b"\t", b"")

_ROWS: Mapping[int, Iterable[tuple[bytes, int]]] = {
    START: (
        (b" \t\r\n", START),
        (b'"', DOUBLE),
        (b"'", SINGLE),
        (b"-", SIGN),
        (b"0", ZERO),
        (b"123456789", DIGITS),
        (_LETTERS, WORD),
        (b"{", LEFT_CURLY),
        (b"}", RIGHT_CURLY),
        (b"[", LEFT_SQUARE),
        (b"]", RIGHT_SQUARE),
        (b":", COLON),
        (b",", COMMA),
    ),
    RECOVERY: ((_ANY, RECOVERY), (_RESYNCHRONIZING, START | _IS_NOT_CONSUMED)),
    DOUBLE: ((_TEXT, DOUBLE), (b"\\", DOUBLE_ESCAPE), (b'"', STRING)),
    DOUBLE_ESCAPE: ((_TEXT, DOUBLE),),
    SINGLE: ((_TEXT, SINGLE), (b"\\", SINGLE_ESCAPE), (b"'", STRING)),
    SINGLE_ESCAPE: ((_TEXT, SINGLE),),
    SIGN: ((b"0", ZERO), (b"123456789", DIGITS)),
    ZERO: ((_ANY, INTEGER | _IS_NOT_CONSUMED), (_NUMERALS, ERROR), (b".", POINT)),
    DIGITS: (
        (_ANY, INTEGER | _IS_NOT_CONSUMED),
        (_NUMERALS, DIGITS),
        (b".", POINT),
        (b"eE", EXPONENT),
    ),
    POINT: ((_NUMERALS, FRACTION),),
    FRACTION: ((_ANY, FLOAT | _IS_NOT_CONSUMED), (_NUMERALS, FRACTION), (b"eE", EXPONENT)),
    EXPONENT: ((b"+-", EXPONENT_SIGN), (_NUMERALS, EXPONENT_DIGITS)),
    EXPONENT_SIGN: ((_NUMERALS, EXPONENT_DIGITS),),
    EXPONENT_DIGITS: ((_ANY, FLOAT | _IS_NOT_CONSUMED), (_NUMERALS, EXPONENT_DIGITS)),
    WORD: ((_ANY, KEYWORD | _IS_NOT_CONSUMED), (_LETTERS, WORD)),
}
"""Of each state, which bytes lead where; a later entry overrules an earlier one, the rest is ERROR.

There is no zero followed by an exponent: to QEMU, `0e1` is a zero, a word and a one.
"""


def _row(entries: Iterable[tuple[bytes, int]]) -> bytes:
    row = bytearray([ERROR]) * 256
    for characters, target in entries:
        for character in characters:
            row[character] = target
    return bytes(row)


_TABLE = tuple(_row(_ROWS[state]) for state in range(len(_ROWS)))
_RUNS = tuple(
    re.compile(b"[" + re.escape(stays) + b"]*" if stays else b"").match
    for stays in (
        bytes(byte for byte in _ANY if row[byte] == state) for state, row in enumerate(_TABLE)
    )
)
"""Of each state, what is passed over in one go because it changes nothing."""


class Lexer:
    """Bytes that are cut into tokens as they come.

    Args:
        limit_bytes: How much may be held from `begin` on.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.is_inside = False
        """What was read is part of a document; else blanks move `begin` along."""
        self._held = bytearray()
        self._state = START
        self._begin = 0
        self._token = 0
        self._at = 0

    @property
    def is_at_rest(self) -> bool:
        """Nothing has begun: what comes next is read as if it were the first."""
        return self._state == START and not self.is_inside

    @property
    def held_bytes(self) -> int:
        """How much is held."""
        return len(self._held)

    def feed(self, data: bytes) -> None:
        """Take in what was read."""
        self._held += data

    def token(self) -> int:
        """Go on to the end of the next token.

        Returns:
            The kind of the token, or ERROR; MORE where more must be fed first; OVERRUN where more
            than the limit would have to be held. After an error or an overrun the caller calls
            `forget`, and what follows is passed over as QEMU does.
        """
        held, end = self._held, len(self._held)
        while True:
            state, stop = self._state, end
            if state != RECOVERY and (state != START or self.is_inside):
                stop = min(end, self._begin + self.limit_bytes)
            self._at = at = _RUNS[state](held, self._at, stop).end()  # type: ignore[union-attr]
            if state in {START, RECOVERY}:
                self._token = at
                if state == RECOVERY or not self.is_inside:
                    self._begin = at
            if at - self._begin >= self.limit_bytes:
                self._state = RECOVERY
                return OVERRUN
            if at == end:
                self._drop_what_is_before_begin()
                return MORE
            target = _TABLE[state][held[at]]
            if target & _IS_NOT_CONSUMED:
                target ^= _IS_NOT_CONSUMED
            else:
                self._at = at + 1
            if target < LEFT_CURLY:
                self._state = target
                continue
            self._state = RECOVERY if target == ERROR else START
            return target

    def _drop_what_is_before_begin(self) -> None:
        del self._held[: self._begin]
        self._at -= self._begin
        self._token -= self._begin
        self._begin = 0

    @property
    def text(self) -> bytes:
        """The token that `token` has come to the end of."""
        return bytes(self._held[self._token : self._at])

    @property
    def document(self) -> bytes:
        """What is held, up to the end of that token."""
        return bytes(self._held[self._begin : self._at])

    def forget(self) -> None:
        """Be done with everything up to here."""
        self._begin = self._at
        self.is_inside = False


def tokens(document: bytes) -> Iterator[tuple[int, bytes]]:
    """Cut a document that was found whole: kinds and texts."""
    lexer = Lexer(len(document) + 2)
    lexer.feed(document + b" ")
    lexer.is_inside = True
    while (kind := lexer.token()) != MORE:
        yield kind, lexer.text

r"""Text as QEMU takes it: modified UTF-8 (util/unicode.c).

It is UTF-8 but for two rules. U+0000 is written `C0 80`, because a string of QEMU's ends at a zero
byte; and the 66 noncharacters are no characters. Text that QEMU only shows, in an error, has one
U+FFFD in the place of each sequence that says nothing, up to six bytes long.
"""

import re

_PLANES = range(0, 0x110000, 0x10000)
_NONCHARACTERS = "\ufdd0-\ufdef" + "".join(chr(at + 0xFFFE) + chr(at + 0xFFFF) for at in _PLANES)
NO_CHARACTER = re.compile(f"[\ud800-\udfff{_NONCHARACTERS}]")
"""A code point that is no character to QEMU: a surrogate or a noncharacter."""

_REPLACEMENT = "\ufffd"
_NUL = b"\xc0\x80"
_ASCII_END, _LEAD_BEGIN, _LEAD_END = 0x80, 0xC0, 0xFE
_SHORTEST = (0, 0, 0x80, 0x800, 0x10000, 0x200000, 0x4000000)
"""The least code point that needs as many bytes."""


def decoded(text: bytes) -> str | None:
    """Read modified UTF-8 that has no zero byte; None if any of it is no text."""
    try:
        characters = text.replace(_NUL, b"\0").decode()
    except UnicodeDecodeError:
        return None
    return None if NO_CHARACTER.search(characters) else characters


def encoded(characters: str) -> bytes:
    """Write modified UTF-8."""
    return characters.encode(errors="surrogatepass").replace(b"\0", _NUL)


def shown(text: bytes) -> str:
    """Read bytes as QEMU shows them in an error: up to a zero byte, U+FFFD for what is no text."""
    text = text.partition(b"\0")[0]
    if text.isascii():
        return text.decode()
    characters, at = [], 0
    while at < len(text):
        point, at = _code_point(text, at)
        characters.append(_REPLACEMENT if point is None else chr(point))
    return NO_CHARACTER.sub(_REPLACEMENT, "".join(characters))


def _code_point(text: bytes, at: int) -> tuple[int | None, int]:
    """The code point that begins at *at*, None if it is none, and where what follows it begins."""
    lead = text[at]
    at += 1
    if lead < _ASCII_END:
        return lead, at
    if not _LEAD_BEGIN <= lead < _LEAD_END:
        return None, at
    length = 8 - (lead ^ 0xFF).bit_length()
    point = lead & (0x7F >> length)
    for _ in range(length - 1):
        if at == len(text) or text[at] & 0xC0 != _ASCII_END:
            return None, at
        point = point << 6 | text[at] & 0x3F
        at += 1
    is_overlong = point < _SHORTEST[length] and (point, length) != (0, 2)
    return (None if is_overlong or point >= _PLANES.stop else point), at

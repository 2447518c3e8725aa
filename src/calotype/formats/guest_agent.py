r"""The guest agent's wire: what is sent to it, and what it says cut into answers; no I/O here.

A line each way for a command and its answer, as in QMP, but without a greeting and without ids: an
answer belongs to the command that was sent before it, unless it is one that an earlier client did
not wait for. So whoever comes says first (qga/qapi-schema.json, guest-sync-delimited)::

    \xff {"execute": "guest-sync-delimited", "arguments": {"id": N}}

The byte makes the agent forget what it had read of a line, which it may answer with an error. The
answer is `\xff {"return": N}`; whatever comes before it is of the past, and is not looked at.

Who is in the guest may say anything. Nothing of it is kept beyond the longest line that an answer
of ours can be, and what is no answer is passed over.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

DELIMITER = b"\xff"
LONGEST_LINE = 1 << 18
"""The longest answer to a command of ours, guest-info, has some 6 KiB."""


def request(command: str, **arguments: Any) -> bytes:
    """The line that gives the agent a command; `_` in argument names stands for `-`."""
    spelled = {name.replace("_", "-"): value for name, value in arguments.items()}
    words = {"execute": command, **({"arguments": spelled} if spelled else {})}
    return msgspec.json.encode(words) + b"\n"


def sync(number: int) -> bytes:
    """What is said first; the answer to it is *number*."""
    return DELIMITER + request("guest-sync-delimited", id=number)


class Answer(NamedTuple):
    """What the agent answered: a value, or its own text if it refused."""

    value: Any
    error: str = ""


class Answers:
    """What an agent says, cut into answers."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._is_too_long = False
        self._awaited: int | None = None

    def await_sync(self, number: int) -> None:
        """Pass over everything until the answer to `sync` with this *number*."""
        self._awaited = number

    def feed(self, heard: bytes) -> list[Answer]:
        """Take in what was heard; the answers that are whole by now."""
        return list(self._answers(heard))

    def _answers(self, heard: bytes) -> Iterator[Answer]:
        first, *others = heard.split(b"\n")
        self._grow(first)
        for piece in others:
            line, is_whole = bytes(self._line), not self._is_too_long
            self._line.clear()
            self._is_too_long = False
            self._grow(piece)
            if is_whole and (answer := self._read(line)) is not None:
                yield answer

    def _grow(self, piece: bytes) -> None:
        """Go on with a line; of one that is too long nothing is kept."""
        self._line += piece
        if len(self._line) > LONGEST_LINE:
            self._is_too_long = True
        if self._is_too_long:
            self._line.clear()

    def _read(self, line: bytes) -> Answer | None:
        """The answer in a line, if it is one and not of the past."""
        _, delimiter, text = line.rpartition(DELIMITER)
        answer = _decoded(text)
        if self._awaited is None:
            return answer
        if not delimiter or answer != Answer(self._awaited):
            return None
        self._awaited = None
        return answer


def _decoded(text: bytes) -> Answer | None:
    try:
        message = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    match message:
        case {"return": value}:
            return Answer(value)
        case {"error": {"desc": str(desc)}}:
            return Answer(None, desc or "it did not say why")
        case _:
            return None

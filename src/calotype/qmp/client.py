"""The session that faces QEMU: a client's side of a QMP connection.

QEMU writes a line for each message, and an answer may be megabytes that nobody here looks at: a
line is cut into its members at C speed, and what they hold stays as QEMU wrote it until it is asked
for.
A monitor that writes for human eyes (`-mon pretty=on`) spreads a message over lines, of which the
first and the last are one bracket each; those are read too.

The ids are ours, so that any number of clients can be behind one connection::

    session = Client()
    number, line = session.send("query-status")
    for message in session.receive(read()):
        match message:
            case Greeting(): send(session.send("qmp_capabilities")[1])
            case Returned(id=number): message.value()

QEMU is believed: an answer is as long as it is. Whoever cannot believe it gives a limit.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from calotype.qmp.writer import written

LONGEST_MESSAGE_BYTES = 1 << 30
"""No answer of QEMU's is as long; the schema, its longest, has some 300 KiB."""
_SHOWN_BYTES = 1024


class Greeting(NamedTuple):
    """What QEMU says first."""

    raw: bytes
    """All of it, `{"QMP": ...}`."""

    def value(self) -> dict[str, Any]:
        """All of it, decoded."""
        return msgspec.json.decode(self.raw, type=dict[str, Any])


class Returned(NamedTuple):
    """A command was carried out."""

    id: int | None
    """Of the command, as `send` gave it; None if it is none of ours."""
    raw: bytes
    """What `return` holds."""

    def value(self) -> Any:
        """What `return` holds, decoded."""
        return msgspec.json.decode(self.raw)


class Refused(NamedTuple):
    """A command was answered with an error, or something that was written was no command."""

    id: int | None
    """Of the command; None where QEMU could not read one."""
    raw: bytes
    """What `error` holds: class and desc."""

    def value(self) -> dict[str, str]:
        """What `error` holds, decoded."""
        return msgspec.json.decode(self.raw, type=dict[str, str])


class Event(NamedTuple):
    """Something happened."""

    name: str
    at_us: int
    """When, by QEMU's clock, in microseconds since the epoch; negative if QEMU does not know."""
    data: bytes
    """What `data` holds; b"{}" where there is none."""
    raw: bytes
    """All of it."""

    def value(self) -> dict[str, Any]:
        """What `data` holds, decoded."""
        return msgspec.json.decode(self.data, type=dict[str, Any])


class Unreadable(NamedTuple):
    """What came is no QMP, or has no end: the connection is of no use any more."""

    raw: bytes
    """Its first bytes."""


Message = Greeting | Returned | Refused | Event | Unreadable


class _Stamp(msgspec.Struct, frozen=True):
    seconds: int
    microseconds: int


_NONE = msgspec.Raw()


class _Members(msgspec.Struct):
    """A message cut into its members."""

    greeting: msgspec.Raw = msgspec.field(name="QMP", default=_NONE)
    returned: msgspec.Raw = msgspec.field(name="return", default=_NONE)
    error: msgspec.Raw = _NONE
    event: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"{}")
    timestamp: _Stamp = _Stamp(-1, 0)
    id: msgspec.Raw = msgspec.Raw(b"null")


_MEMBERS = msgspec.json.Decoder(_Members)
_ID: msgspec.json.Decoder[int | None] = msgspec.json.Decoder(int | None)


class Client:
    """A QMP session with one QEMU.

    Args:
        longest_message_bytes: More is not held before a message is whole.
    """

    def __init__(self, longest_message_bytes: int = LONGEST_MESSAGE_BYTES) -> None:
        self._longest_bytes = longest_message_bytes
        self._line = bytearray()
        self._spread = bytearray()
        """A message that goes over lines, as far as it has come."""
        self._number = 0

    def send(
        self,
        command: str,
        arguments: Mapping[str, Any] | bytes | None = None,
        *,
        is_out_of_band: bool = False,
    ) -> tuple[int, bytes]:
        """Make the line that gives QEMU a command.

        Args:
            command: Its name.
            arguments: A mapping, or an object that is JSON already, on one line.
            is_out_of_band: It is not to wait for others; QEMU must have been asked for `oob`.

        Returns:
            The id that its answer will have, and the line.
        """
        self._number += 1
        verb = b"exec-oob" if is_out_of_band else b"execute"
        parts = [b'{"%s": %s' % (verb, written(command))]
        if arguments:
            told = arguments if isinstance(arguments, bytes) else written(arguments)
            parts.append(b'"arguments": ' + told)
        parts.append(b'"id": %d}\n' % self._number)
        return self._number, b", ".join(parts)

    def receive(self, data: bytes) -> list[Message]:
        """Take in what QEMU wrote, cut anywhere; its messages that are whole by now, in order."""
        *lines, rest = data.split(b"\n")
        found: list[Message] = []
        for line in lines:
            self._line += line
            whole = self._whole(bytes(self._line).removesuffix(b"\r"))
            self._line.clear()
            if whole:
                found.append(_message(whole))
        self._line += rest
        if len(self._line) + len(self._spread) > self._longest_bytes:
            found.append(Unreadable(bytes(self._spread or self._line)[:_SHOWN_BYTES]))
            self._line.clear()
            self._spread.clear()
        return found

    def _whole(self, line: bytes) -> bytes:
        """The message that ends with a line, on one line; b"" if it goes on."""
        if not self._spread and line != b"{":
            return line
        self._spread += line.strip() + b" "
        if line != b"}":
            return b""
        message = bytes(self._spread)
        self._spread.clear()
        return message


def _message(text: bytes) -> Message:
    try:
        members = _MEMBERS.decode(text)
        if members.event is not None:
            at_us = members.timestamp.seconds * 1_000_000 + members.timestamp.microseconds
            return Event(members.event, at_us, bytes(members.data), text)
        if returned := bytes(members.returned):
            return Returned(_number(members.id), returned)
        if error := bytes(members.error):
            return Refused(_number(members.id), error)
        if bytes(members.greeting):
            return Greeting(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    return Unreadable(text[:_SHOWN_BYTES])


def _number(told: msgspec.Raw) -> int | None:
    try:
        return _ID.decode(told)
    except msgspec.DecodeError:
        return None

r"""The session that faces one client: QEMU's side of a QMP connection (monitor/qmp.c).

`receive` judges what the client wrote as QEMU does before it looks a command up
(qapi/qmp-dispatch.c) and gives, in the order of the wire, what is to be carried out and what is
already answered::

    session = Server(greeting)
    send(session.greeting())
    for request in session.receive(read()):
        match request:
            case Answer(line): send(line)                              when its turn comes
            case Command(): send(session.answer(request, value))       or refuse, or the raw ones

Whose turn it is, is the service's business. QEMU answers a client's commands one after the other,
each when it is done, and an `Answer` waits for its turn like any other; what `is_out_of_band` is
carried out and answered at once, before all that waits. QEMU reads nothing more from a client that
has a command under way, or has 8 waiting where out-of-band is enabled: a service that reads on
holds what it reads.

A session begins in *negotiation mode*: only `qmp_capabilities` is taken, no event is sent. That
command is answered here, always; it ends the mode at once, so that events may overtake its answer,
as they may in QEMU.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from calotype.qmp.decoder import QEMU_LIMITS, Decoder, Document, Limits, Malformed
from calotype.qmp.writer import echoed, ordered, written

ErrorClass = Literal[
    "GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound", "KVMMissingCap"
]
"""QEMU's classes of errors (qapi/error.json, QapiErrorClass)."""

NEGOTIATE = "qmp_capabilities"
OUT_OF_BAND = "oob"
_EXPECTING = f"Expecting capabilities negotiation with '{NEGOTIATE}'"
_MEMBERS = frozenset({"execute", "arguments", "id"})


class Command(NamedTuple):
    """A request to carry out, and to answer once.

    Args:
        name: Of the command, which need not exist.
        arguments: {} where there are none. `writer.written` writes them again, infinite numbers and
            a thousand brackets deep, where others' encoders give up; `Client.send` uses it.
        id: Any JSON value, which the answer repeats; None where there is none.
        has_id: There is an id, which may be null.
        is_out_of_band: The client sent it as `exec-oob`: it is not to wait for others.
    """

    name: str
    arguments: dict[str, Any]
    id: Any
    has_id: bool
    is_out_of_band: bool


class Answer(NamedTuple):
    """A request that the session has answered itself; *line* is sent when its turn comes."""

    line: bytes
    is_out_of_band: bool


class Refusal(Exception):  # noqa: N818 - QEMU's answer to a request is no fault of a caller's
    """A request is refused in QEMU's words."""

    def __init__(self, desc: str, kind: ErrorClass = "GenericError") -> None:
        super().__init__(desc)
        self.kind: ErrorClass = kind


class Server:
    """A QMP session with one client.

    Args:
        greeting: What the client is told first, as QEMU tells it: `{"QMP": {"version": ...,
            "capabilities": [...]}}`. Out-of-band can be enabled if the capabilities have "oob".
        limits: What a request may be.
    """

    def __init__(self, greeting: Mapping[str, Any], limits: Limits = QEMU_LIMITS) -> None:
        self._greeting = greeting
        self._offered = frozenset(greeting["QMP"]["capabilities"])
        self._decoder = Decoder(limits)
        self.is_negotiating = True
        """The client has not yet sent `qmp_capabilities`."""
        self.is_out_of_band_enabled = False
        """The client may send `exec-oob`."""

    # --- what comes ----------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[Command | Answer]:
        """Take in what the client wrote, cut anywhere.

        Returns:
            Its requests that are whole by now, in the order in which it wrote them. One byte may
            be a request that is answered with 100, so no more should be read than can be answered.
        """
        return [self._judged(found) for found in self._decoder.feed(data)]

    def _judged(self, found: Document | Malformed) -> Command | Answer:
        if isinstance(found, Malformed):
            return Answer(_line({"error": _error("GenericError", found.desc)}), False)
        request = found.value
        members = request if isinstance(request, dict) else {}
        is_urgent = "exec-oob" in members and "execute" not in members
        command = Command("", {}, members.get("id"), "id" in members, is_urgent)
        try:
            name, arguments = self._checked(request)
            command = command._replace(name=name, arguments=arguments)
            if name == NEGOTIATE:
                self._negotiate(command)
                return Answer(self.answer(command, {}), is_urgent)
        except Refusal as refusal:
            return Answer(self.refuse(command, refusal.kind, str(refusal)), is_urgent)
        if self.is_negotiating:
            return Answer(self.refuse(command, "CommandNotFound", _EXPECTING), is_urgent)
        return command

    def _checked(self, request: Any) -> tuple[str, dict[str, Any]]:
        """The command and arguments of a request (qmp_dispatch_check_obj).

        Raises:
            Refusal: It is no request.
        """
        if not isinstance(request, dict):
            raise Refusal("QMP input must be a JSON object")
        arguments = request.get("arguments", {})
        if request.keys() <= _MEMBERS and isinstance(arguments, dict):
            name = request.get("execute")
            if isinstance(name, str):
                return name, arguments
        return self._anything_but_plain(request), arguments

    def _anything_but_plain(self, request: dict[str, Any]) -> str:
        """The command of a request, whose members are looked at as QEMU orders them."""
        names = {"execute", "exec-oob"} if self.is_out_of_band_enabled else {"execute"}
        found = ""
        for member, value in ordered(request):
            if member in names:
                if not isinstance(value, str):
                    raise Refusal(f"QMP input member '{member}' must be a string")
                if found:
                    raise Refusal(f"QMP input member '{member}' clashes with '{found}'")
                found = member
            elif member == "arguments":
                if not isinstance(value, dict):
                    raise Refusal("QMP input member 'arguments' must be an object")
            elif member != "id":
                raise Refusal(f"QMP input member '{member}' is unexpected")
        if not found:
            raise Refusal("QMP input lacks member 'execute'")
        return str(request[found])

    def _negotiate(self, command: Command) -> None:
        """Carry out `qmp_capabilities` (monitor/qmp-cmds-control.c).

        Raises:
            Refusal: Its arguments are wrong, or the mode has ended long ago.
        """
        if command.is_out_of_band:
            raise Refusal(f"The command {NEGOTIATE} does not support OOB")
        wanted = _capabilities(command.arguments)
        if not self.is_negotiating:
            raise Refusal(
                "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
            )
        if missing := [name for name in wanted if name not in self._offered]:
            raise Refusal(f"Capability {', '.join(missing)} not available")
        self.is_out_of_band_enabled = OUT_OF_BAND in wanted
        self.is_negotiating = False

    # --- what goes -----------------------------------------------------------------------------

    def greeting(self) -> bytes:
        """The line that the client is sent first."""
        return _line(self._greeting)

    def answer(self, command: Command, value: Any) -> bytes:
        """The line that answers *command* with a value; {} where it returns nothing."""
        return self.answer_raw(command, written(value))

    def answer_raw(self, command: Command, value: bytes) -> bytes:
        """The line that answers *command* with a value that is JSON already."""
        return _joined(command, "return", value)

    def refuse(self, command: Command, kind: ErrorClass, desc: str) -> bytes:
        """The line that answers *command* with an error."""
        return self.refuse_raw(command, written(_error(kind, desc)))

    def refuse_raw(self, command: Command, error: bytes) -> bytes:
        """The line that answers *command* with an error that is JSON already: class and desc."""
        return _joined(command, "error", error)

    def event(self, name: str, data: Mapping[str, Any] | None, at_us: int) -> bytes:
        """The line that tells an event; b"" in negotiation mode.

        Args:
            name: Such as "STOP".
            data: Its members; None where it has none.
            at_us: When it happened, in microseconds since the epoch.
        """
        if self.is_negotiating:
            return b""
        seconds, microseconds = divmod(at_us, 1_000_000)
        stamp = {"seconds": seconds, "microseconds": microseconds}
        told = {"timestamp": stamp, "event": name}
        return _line(told if data is None else {**told, "data": data})

    def event_raw(self, event: bytes) -> bytes:
        """The line that tells an event that is JSON already, all of it; b"" in negotiation mode."""
        return b"" if self.is_negotiating else event + _END


_END = b"\r\n"
"""Every line of QEMU's ends so (monitor/monitor.c, monitor_puts)."""


def _capabilities(arguments: dict[str, Any]) -> list[str]:
    """The capabilities to enable, as QEMU visits them (qapi/qobject-input-visitor.c).

    Raises:
        Refusal: They are no list of capabilities.
    """
    wanted = arguments.get("enable", [])
    if not isinstance(wanted, list):
        raise Refusal("Invalid parameter type for 'enable', expected: array")
    for index, name in enumerate(wanted):
        if not isinstance(name, str):
            raise Refusal(f"Invalid parameter type for 'enable[{index}]', expected: string")
        if name != OUT_OF_BAND:
            raise Refusal(f"Parameter 'null' does not accept value '{name}'")
    for unexpected in arguments.keys() - {"enable"}:
        raise Refusal(f"Parameter '{unexpected}' is unexpected")
    return wanted


def _error(kind: ErrorClass, desc: str) -> dict[str, str]:
    return {"class": kind, "desc": desc}


def _line(message: Mapping[str, Any]) -> bytes:
    return written(message) + _END


def _joined(command: Command, member: Literal["return", "error"], value: bytes) -> bytes:
    """An answer: QEMU's table has the id between the two members that it may stand beside."""
    if not command.has_id:
        return b'{"%s": %s}%s' % (member.encode(), value, _END)
    told = echoed(command.id)
    if member == "return":
        return b'{"return": %s, "id": %s}%s' % (value, told, _END)
    return b'{"id": %s, "error": %s}%s' % (told, value, _END)

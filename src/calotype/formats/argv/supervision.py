"""The command line with which QEMU runs under supervision, without a terminal.

Calotype adds four monitors of its own (to act, to look, to end a pause whose owner died, and for
the service that others speak QMP with) and a console, all of them on listening sockets that QEMU
inherits: `server=on,wait=off`, so that anyone may come and go. All that is added stands at the end;
the user's words stay in their order.

**The console** is what the user would have seen in the terminal. QEMU lets one thing use it: a
-serial stdio, or a -chardev of type stdio, or by default the first serial port, if there is one.
That thing gets the socket, and what it says is appended to a log. A serial port that goes elsewhere
stays there, and then there is no console. A monitor on stdio is dropped, also the one of mon:stdio;
a -chardev with mux=on keeps it.

**-nographic** stays as it is. To the guest it is a machine without graphics; for the rest it only
gives defaults to the serial port, the parallel port and the monitor (system/vl.c,
qemu_create_default_devices). The port gets the console here, and any -mon, such as ours, takes the
default monitor away. The guest sees the same machine with and without supervision.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from calotype.formats.argv.line import Argument, CommandLine
from calotype.formats.argv.machine import has_default_serial
from calotype.formats.argv.refusals import refuse_unsupervisable
from calotype.formats.argv.syntax import settings
from calotype.formats.options import unparse
from calotype.model.names import OURS

CONTROL = f"{OURS}control"
QUERY = f"{OURS}query"
GUARD = f"{OURS}guard"
SERVICE = f"{OURS}service"
CONSOLE = f"{OURS}console"

TERMINAL_OPTIONS = frozenset(
    {"debugcon", "gdb", "monitor", "parallel", "qmp", "qmp-pretty", "qtest", "serial"}
)
"""The options whose value is a character device in the short form (qemu_chr_parse_compat)."""

_OF_STDIO = frozenset({"backend", "id", "logappend", "signal"})
"""The keys of a stdio chardev that its socket does not take over as they are."""

_MOVABLE = frozenset({"chardev", "monitor", "serial"})
_ELSEWHERE = "give it a socket or a file"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """What QEMU inherits: listening sockets, and where the console is logged."""

    control_fd: int
    query_fd: int
    guard_fd: int
    service_fd: int
    console_fd: int
    console_log: str
    """A path; QEMU appends to it."""


def supervised(command: CommandLine, endpoints: Endpoints) -> CommandLine:
    """Add our monitors and the console, and take the terminal away.

    Args:
        command: The user's command line.
        endpoints: What QEMU inherits.

    Raises:
        CommandLineError: An option is among the refused ones, or the terminal is wanted by two, or
            by what cannot do without it.
    """
    refuse_unsupervisable(command)
    user = _terminal_user(command)
    if user and user[1].option == "monitor":
        command, user = command.having({user[0]: Argument("monitor", "none")}), None
    port = Argument("serial", f"chardev:{CONSOLE}")
    match user:
        case None if has_default_serial(command):
            command = command.having({}, _console(endpoints), port)
        case (place, Argument("serial")):
            command = command.having({place: port}, _console(endpoints))
        case (place, Argument("chardev") as chardev):
            command = command.having({place: _console(endpoints, chardev)})
    return command.having({}, *_monitors(endpoints))


def for_restore(command: CommandLine) -> CommandLine:
    """Let QEMU wait for a machine state, and wait again when it has it."""
    paused = () if command.has("S") else (Argument("S"),)
    return command.having({}, *paused, Argument("incoming", "defer"))


def has_console(command: CommandLine) -> bool:
    """Whether the supervised QEMU has a console; if not, its socket and log stay unused.

    Raises:
        CommandLineError: The terminal is wanted by two, or by what cannot do without it.
    """
    user = _terminal_user(command)
    if user is None or user[1].option == "monitor":
        return has_default_serial(command)
    return True


def _terminal_user(command: CommandLine) -> tuple[int, Argument] | None:
    """The one argument that uses the terminal, and its place."""
    users = [each for each in enumerate(command.arguments) if _wants_terminal(each[1])]
    by_default = command.has("nographic") and has_default_serial(command)
    if len(users) + by_default > 1:
        raise users[-1][1].refused("something else uses stdio too", _ELSEWHERE)
    if users and users[0][1].option not in _MOVABLE:
        raise users[0][1].refused("QEMU runs without a terminal", _ELSEWHERE)
    return users[0] if users else None


def _wants_terminal(argument: Argument) -> bool:
    if argument.option == "chardev":
        return settings(argument).get("backend") == "stdio"
    return argument.option in TERMINAL_OPTIONS and argument.text in {"stdio", "mon:stdio"}


def _console(endpoints: Endpoints, chardev: Argument | None = None) -> Argument:
    """The console's socket; in place of the user's *chardev* it has its id and other keys."""
    given = {"id": CONSOLE} | (settings(chardev) if chardev else {})
    if chardev and "logfile" in given:
        raise chardev.refused("the console is logged by Calotype", "leave logfile out")
    kept = {key: value for key, value in given.items() if key not in _OF_STDIO}
    log = {"logfile": endpoints.console_log, "logappend": "on"}
    return _socket(given["id"], endpoints.console_fd, (kept | log).items())


def _socket(name: str, fd: int, others: Iterable[tuple[str, str]] = ()) -> Argument:
    listening = (("id", name), ("fd", str(fd)), ("server", "on"), ("wait", "off"))
    return Argument("chardev", f"socket,{unparse((*listening, *others))}")


def _monitors(endpoints: Endpoints) -> tuple[Argument, ...]:
    monitors = (
        (CONTROL, endpoints.control_fd),
        (QUERY, endpoints.query_fd),
        (GUARD, endpoints.guard_fd),
        (SERVICE, endpoints.service_fd),
    )
    return tuple(
        argument
        for name, fd in monitors
        for argument in (_socket(name, fd), Argument("mon", f"chardev={name},mode=control"))
    )

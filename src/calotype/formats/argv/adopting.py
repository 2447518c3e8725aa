"""The command line of a QEMU that somebody else started, as it can be started once more.

What supervision refuses is one of two things here. Words that were about that one start (its
background, the machine state that it was fed) are *dropped*, and it is said that they are. Words
that stand for what cannot be had again, an inherited descriptor above all, *limit* what can be
done: QEMU runs and is snapshotted, but nobody can start it anew from this line.
"""

from collections.abc import Iterator
from dataclasses import replace
from posixpath import join, normpath

from calotype.errors import CommandLineError
from calotype.formats.argv.line import Argument, CommandLine
from calotype.formats.argv.refusals import refuse_unsupervisable
from calotype.formats.argv.supervision import TERMINAL_OPTIONS, Endpoints, supervised
from calotype.formats.argv.syntax import settings
from calotype.formats.options import parse
from calotype.formats.secrets import redacted
from calotype.model.vm import Dropped

_OF_THAT_START: dict[str, str] = {
    "S": "the guest is let run when it is started",
    "daemonize": "Calotype puts QEMU into the background itself",
    "incoming": "the machine state that it was started with was loaded then",
    "loadvm": "the machine state that it was started with was loaded then",
}
"""Options that were about one start, and why they are left out of another."""

_WAITS = "QEMU would wait for a client before it starts: wait=off is added"
_ON = frozenset({"on", "yes", "true", "y"})
_NOWHERE = Endpoints(0, 0, 0, 0, 0, "")


def without_its_start(command: CommandLine) -> tuple[CommandLine, tuple[Dropped, ...]]:
    """Leave out, or change, what was about one start alone.

    Returns:
        The line to start it with once more, and the words that are not as they were.

    Raises:
        CommandLineError: The value of an option is not in its grammar.
    """
    kept, dropped = [], []
    for argument in command.arguments:
        reason = _OF_THAT_START.get(argument.option, "")
        if not reason:
            kept.append(_not_waiting(argument))
            reason = "" if kept[-1] == argument else _WAITS
        if reason:
            dropped.append(Dropped(" ".join(redacted(argument.words())), reason))
    return replace(command, arguments=tuple(kept)), tuple(dropped)


def _not_waiting(argument: Argument) -> Argument:
    """A server socket that QEMU would wait at for a client, by default or by order."""
    given = _socket(argument)
    if given.get("server") not in _ON or given.get("wait") == "off" or "path" not in given:
        return argument
    return replace(argument, value=f"{argument.text},wait=off")


def _socket(argument: Argument) -> dict[str, str]:
    """The keys of a unix socket; empty where an argument is none."""
    if argument.option == "chardev":
        given = settings(argument)
        return given if given.get("backend") == "socket" else {}
    if argument.option in TERMINAL_OPTIONS and argument.text.startswith("unix:"):
        return dict(parse(argument.text.removeprefix("unix:"), "path"))
    return {}


def obstacles(command: CommandLine) -> Iterator[CommandLineError]:
    """What keeps a command line from being started under supervision: each word of it."""
    found = [error for each in command.arguments if (error := _refused(each)) is not None]
    yield from found
    if not found:
        try:
            supervised(command, _NOWHERE)
        except CommandLineError as error:
            yield error


def _refused(argument: Argument) -> CommandLineError | None:
    try:
        refuse_unsupervisable(CommandLine("", (argument,)))
    except CommandLineError as error:
        return error
    return None


def named_devices(command: CommandLine) -> dict[str, str]:
    """The devices that the user gave an id, and their drivers."""
    devices = (settings(each) for each in command.arguments if each.option == "device")
    return {each["id"]: each.get("driver", "") for each in devices if "id" in each}


def console_path(command: CommandLine, cwd: str) -> str:
    """The unix socket that the first serial port is at; "" where it is elsewhere.

    Args:
        command: The command line as it runs.
        cwd: The folder that relative paths start from.
    """
    serial = next((each for each in command.arguments if each.option == "serial"), None)
    if serial is None:
        return ""
    name = serial.text.removeprefix("chardev:")
    by_name = (
        each
        for each in command.arguments
        if each.option == "chardev" and settings(each).get("id") == name
    )
    given = _socket(next(by_name, serial) if name != serial.text else serial)
    is_server = given.get("server") in _ON and "path" in given
    return normpath(join(cwd, given["path"])) if is_server else ""

"""Options that Calotype cannot stand for, and why.

An option is refused for one of three reasons: it hides from the command line what the VM is made
of, it takes QEMU out of our hands, or what it names cannot be had again when the VM is restored.
What is refused of a single disk stands with the block options.
"""

from collections.abc import Mapping

from calotype.formats.argv.line import Argument, CommandLine
from calotype.formats.argv.syntax import settings
from calotype.model.names import OURS

HIDING: dict[str, str] = {
    "readconfig": "it can define disks and devices that the command line does not show",
    "set": "it changes the other options behind their backs",
    "snapshot": "the disks' writes would go to files that are gone when QEMU ends",
}
"""Options under which the command line does not say what the disks are."""

_PATHS = "paths would mean other files to QEMU than to Calotype"
_LOADS = "Calotype itself decides when a machine state is loaded"
_EXITS = "QEMU would only print something"
_FDS = "a file descriptor cannot be opened again at a restore"

REFUSED: dict[str, str] = HIDING | {
    "add-fd": _FDS,
    "audio-help": _EXITS,
    "chroot": _PATHS,
    "daemonize": "Calotype puts QEMU into the background itself, and must know its process",
    "dump-vmstate": _EXITS,
    "h": _EXITS,
    "help": _EXITS,
    "incoming": _LOADS,
    "loadvm": _LOADS,
    "preconfig": "QEMU would wait for a command that Calotype does not send",
    "version": _EXITS,
}
"""Options that a supervised QEMU is not started with, and why."""

REFUSED_SETTINGS: dict[tuple[str, str, str | None], str] = {
    ("display", "type", "curses"): "it needs a terminal, and QEMU runs without one",
    ("run-with", "chroot", None): _PATHS,
} | {
    (option, key, value): _FDS
    for option in ("chardev", "device", "fsdev", "net", "netdev", "nic", "object", "virtfs")
    for key, value in (
        ("fd", None),
        ("fds", None),
        ("sock-fds", None),
        ("sock_fd", None),
        ("vhostfd", None),
        ("vhostfds", None),
        ("addr.type", "fd"),
        ("local.type", "fd"),
        ("remote.type", "fd"),
    )
}
"""Option, key, and value or None for any: what a supervised QEMU is not started with, and why."""

_WITH_SETTINGS = frozenset(option for option, _, _ in REFUSED_SETTINGS)
_WITH_NAMES = frozenset(
    {"blockdev", "chardev", "device", "drive", "fsdev", "mon", "netdev", "nic", "object"}
)


def refuse_hidden_disks(command: CommandLine) -> None:
    """Refuse options under which the command line does not say what the disks are.

    Raises:
        CommandLineError: There is one.
    """
    for argument in command.arguments:
        _refuse_option(argument, HIDING)


def refuse_unsupervisable(command: CommandLine) -> None:
    """Refuse options with which QEMU cannot run under supervision.

    Raises:
        CommandLineError: There is one, or a name that is kept for our own.
    """
    for argument in command.arguments:
        _refuse_option(argument, REFUSED)
        if argument.option in _WITH_SETTINGS:
            _refuse_settings(argument)
        if argument.option in _WITH_NAMES:
            _refuse_our_names(argument)


def _refuse_option(argument: Argument, reasons: Mapping[str, str]) -> None:
    if reason := reasons.get(argument.option):
        raise argument.refused(reason, f"leave -{argument.option} out")


def _refuse_settings(argument: Argument) -> None:
    for key, value in settings(argument).items():
        anything, this = (argument.option, key, None), (argument.option, key, value)
        if reason := REFUSED_SETTINGS.get(anything) or REFUSED_SETTINGS.get(this):
            raise argument.refused(f"{key}={value}: {reason}", f"leave {key} out")


def _refuse_our_names(argument: Argument) -> None:
    given = settings(argument)
    for key in ("id", "node-name"):
        if given.get(key, "").startswith(OURS):
            raise argument.refused(f"names that begin with {OURS} are Calotype's", f"change {key}")

"""Where the guest's agent is reached: the socket behind the port that the command line gives it.

The agent in the guest opens a port by name, `org.qemu.guest_agent.0`, or an ISA serial port, which
has no name: there that of its device or of its character device must do, as QEMU's documentation
writes it (docs/interop/qemu-ga.rst). Behind either must be a unix socket that QEMU listens on.
"""

from collections.abc import Iterator
from posixpath import join

from calotype.errors import CommandLineError
from calotype.formats.argv.line import Argument, CommandLine
from calotype.formats.argv.syntax import settings

PORT = "org.qemu.guest_agent.0"
_ISA_NAMES = frozenset({PORT, "qga0"})

HOW = (
    f"give it one: -chardev socket,id=qga0,path=SOCKET,server=on,wait=off -device virtio-serial"
    f" -device virtserialport,chardev=qga0,name={PORT}"
)
_LISTEN = "let it be -chardev socket,path=SOCKET,server=on,wait=off"


def agent_socket(command: CommandLine, cwd: str) -> str:
    """The path of the socket that leads to the guest's agent.

    Args:
        command: The command line.
        cwd: The folder QEMU runs in, absolute; a relative path starts there.

    Raises:
        CommandLineError: There is no port for an agent, or behind it is no unix socket that QEMU
            listens on.
    """
    chardevs = {
        given["id"]: (argument, given)
        for argument in command.arguments
        if argument.option == "chardev" and "id" in (given := settings(argument))
    }
    for port, name in _ports(command):
        if name not in chardevs:
            raise port.refused(f"there is no -chardev with the id {name!r}", HOW)
        argument, given = chardevs[name]
        if reason := _unfit(given):
            raise argument.refused(reason, _LISTEN)
        return join(cwd, given["path"])
    raise CommandLineError("the VM has no port for a guest agent", HOW)


def _ports(command: CommandLine) -> Iterator[tuple[Argument, str]]:
    """The devices that an agent in the guest would open, and the chardev behind each."""
    for argument in command.arguments:
        if argument.option == "device":
            given = settings(argument)
            named = {given.get("id"), given.get("chardev")}
            is_port = given.get("driver") == "virtserialport" and given.get("name") == PORT
            if is_port or (given.get("driver") == "isa-serial" and named & _ISA_NAMES):
                yield argument, given.get("chardev", "")


def _unfit(chardev: dict[str, str]) -> str:
    """Why an agent cannot be reached through a chardev; "" if it can."""
    off = ("off", "no", "false", "n")
    if chardev.get("backend") != "socket" or not chardev.get("path"):
        return "the guest agent is reached through a unix socket only"
    if chardev.get("abstract", "off") not in off:
        return "the guest agent is reached through a socket with a path only"
    if chardev.get("server", "off") in off:
        return "it connects to another program instead of listening"
    return ""

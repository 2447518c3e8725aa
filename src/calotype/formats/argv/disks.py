"""The images that a command line names, in order, with their paths made absolute."""

from dataclasses import dataclass
from posixpath import join, normpath

from calotype.formats.argv.line import Argument, CommandLine
from calotype.formats.argv.naming import Naming, namings
from calotype.formats.options import text_of


@dataclass(frozen=True, slots=True)
class DiskArgument:
    """An image that the command line names."""

    index: int
    """The place among all images that the command line names, read-only ones included."""
    name: str
    """The node name or id that the user gave; "" if none."""
    path: str
    """Absolute; links are not followed, since nothing is opened here."""
    format: str
    """raw, qcow2, or "" if QEMU is to probe it."""
    read_only: bool
    interface: str
    """What `if=` says; "" for the machine's own, "none" where a device refers to the disk."""


def disks(command: CommandLine, cwd: str) -> tuple[DiskArgument, ...]:
    """Find every image that *command* names, in order.

    Args:
        command: The command line.
        cwd: The folder QEMU runs in, absolute; relative paths start there.

    Raises:
        CommandLineError: Something on the line is a disk that Calotype cannot freeze, or hides
            what the disks are, or names a writable image twice.
    """
    named = [(command.arguments[naming.place], naming) for naming in namings(command)]
    found = tuple(_disk(index, *each, cwd) for index, each in enumerate(named))
    for disk, (argument, _) in zip(found, named, strict=True):
        users = [other for other in found if other.path == disk.path]
        if len(users) > 1 and not all(user.read_only for user in users):
            problem = f"{disk.path} is named more than once and can be written to"
            raise argument.refused(problem, "give each disk its own image")
    return found


def _disk(index: int, argument: Argument, naming: Naming, cwd: str) -> DiskArgument:
    options = naming.options
    interface = "none" if argument.option == "blockdev" else text_of(options.get("if"))
    return DiskArgument(
        index=index,
        name=text_of(options.get("node-name") or options.get("id")),
        path=normpath(join(cwd, naming.filename)),
        format=naming.format,
        read_only=naming.read_only,
        interface=interface,
    )

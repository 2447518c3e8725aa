"""Small acts by which something of the host goes from one QEMU to another, and back.

They are data: planned before anything happens, journalled, and carried out by whoever is alive: the
operation, `recover`, or the guard, which knows them by their type and their fields.

    old     the QEMU that runs the VM           new     the one that is to take its place
    PATH    what the user named                 PATH.next, PATH.prev    the new and the old, aside
"""

from typing import Any, Literal

from msgspec import Struct

Side = Literal["old", "new"]

NEXT, PREVIOUS = ".next", ".prev"


class Tell(Struct, frozen=True, tag=True):
    """Have one of the two QEMUs execute a QMP command."""

    side: Side
    command: str
    arguments: dict[str, Any]


class Move(Struct, frozen=True, tag=True):
    """Rename a file, in place of what has the name; one that is not there was moved already."""

    source: str
    target: str


class Keep(Struct, frozen=True, tag=True):
    """Give a file a second name; done already where that is there."""

    path: str
    name: str


class Drop(Struct, frozen=True, tag=True):
    """Remove a file; one that is not there is no error."""

    path: str


class WritePid(Struct, frozen=True, tag=True):
    """Write the pid of one of the two QEMUs into a file."""

    side: Side
    path: str


Act = Tell | Move | Keep | Drop | WritePid


def exchange(path: str) -> tuple[tuple[Act, ...], tuple[Act, ...]]:
    """Put what listens at *path*`.next` in place of what listens at *path*: forth, and back.

    Back ends with nothing to put in its place any more: an owner that was stopped in the midst, and
    goes on when the guard has handed back, must not take the path from the old one again.
    """
    forth = (Keep(path, path + PREVIOUS), Move(path + NEXT, path))
    return forth, (Move(path + PREVIOUS, path), Drop(path + NEXT))

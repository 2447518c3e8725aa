"""Where a command line names images, and how.

QEMU has two ways to say "this image is a disk":

    -drive file=f,if=...    nodes and the place to plug them in; -hda and others are short for it
    -blockdev driver=...    one node; devices refer to it by its node-name

A -blockdev node is a disk if no other node of the command line stands on it, filters aside: one
(throttle, copy-on-read) stays where it is, and the image is the -blockdev that is its file. Three
shapes count:

    inline    driver=qcow2,file.driver=file,file.filename=f         one argument
    split     driver=file,filename=f  +  driver=qcow2,file=NAME     two, in any order
    bare      driver=file,filename=f                                raw, without a format node

A `Naming` covers them all: the argument of the node that the device is on, the argument that holds
the file name (another one if split), and the key it stands under there.

What is not a raw or qcow2 image in one file or block device is refused, not skipped: a disk that
Calotype did not see would be missing from every snapshot. A read-only disk carries no information
of the VM's, so there any key may stand that leaves it an image in a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calotype.formats.argv import block
from calotype.formats.argv.line import Argument, CommandLine
from calotype.formats.argv.refusals import refuse_hidden_disks
from calotype.formats.argv.syntax import leaves
from calotype.formats.options import flatten, parse_nested, text_of

_FORMATS = frozenset(block.FORMAT_KEYS)
_REFERENCES = frozenset({"backing", "data-file", "file"})
"""The last fragments of keys that name another node."""


@dataclass(frozen=True, slots=True)
class Naming:
    """Where an image is named: places are those of arguments, options are flat."""

    place: int
    options: Mapping[str, Any]
    file_place: int
    file_options: Mapping[str, Any]
    file_key: str

    @property
    def filename(self) -> str:
        """The file name as written."""
        return text_of(self.file_options[self.file_key])

    @property
    def is_split(self) -> bool:
        """Whether the file has an argument of its own."""
        return self.file_place != self.place

    @property
    def is_bare(self) -> bool:
        """Whether the device is on the file itself, without a format node."""
        return self.file_key == "filename" and not self.is_split

    @property
    def format_key(self) -> str:
        """The key that the format stands under, or would."""
        return "format" if "format" in self.options else "driver"

    @property
    def format(self) -> str:
        """The format as given; "" if it is to be probed."""
        return "raw" if self.is_bare else text_of(self.options.get(self.format_key))

    @property
    def read_only(self) -> bool:
        """Whether the guest cannot write to it."""
        switches = (block.is_on(self.options, key) for key in ("read-only", "readonly"))
        return self.options.get("media") == "cdrom" or any(switches)


def namings(command: CommandLine) -> tuple[Naming, ...]:
    """Find where *command* names images, in order.

    Raises:
        CommandLineError: Something on the line is a disk that Calotype cannot freeze, or hides
            what the disks are.
    """
    refuse_hidden_disks(command)
    nodes = _Nodes.of(command)
    candidates = (
        _node(nodes, place) if place in nodes.options else _drive(command.arguments[place], place)
        for place, argument in enumerate(command.arguments)
        if argument.option in {"blockdev", "drive", *block.SHORTHANDS}
    )
    found = tuple(naming for naming in candidates if naming is not None)
    for naming in found:
        _check(command, naming)
    return found


def drive_options(argument: Argument) -> dict[str, Any]:
    """Give the keys of a -drive, or of the -drive that a shorthand stands for.

    A file name of `json:{...}` is written out: it holds the same keys, and those beside it go
    before its own (block.c, parse_json_protocol).

    Raises:
        CommandLineError: It is not in the option's grammar.
    """
    given = (
        leaves(argument)
        if argument.option == "drive"
        else {"file": argument.text} | block.SHORTHANDS[argument.option]
    )
    name = text_of(given.get("file"))
    if not name.startswith("json:"):
        return given
    inner = _in_json(argument, name.removeprefix("json:"))
    return inner | {key: leaf for key, leaf in given.items() if key != "file"}


def _in_json(argument: Argument, text: str) -> dict[str, Any]:
    """The keys in a file name of `json:{...}`, flat."""
    inner = flatten(parse_nested(text, None))
    if isinstance(inner.get("file"), str):
        raise argument.refused(f"the node '{inner['file']}' is below it", "use -blockdev for both")
    if not inner.get("file.filename") and inner.get("driver") not in block.NULLS:
        raise argument.refused("its JSON names no file", "name it (file.filename)")
    return inner


def _drive(argument: Argument, place: int) -> Naming | None:
    options = drive_options(argument)
    driver = text_of(options.get("driver", options.get("format")))
    if driver in block.NULLS:
        return None
    block.check_driver(argument, driver or "raw", _FORMATS)
    block.check_driver(argument, text_of(options.get("file.driver", "file")), block.PROTOCOLS)
    key = "file" if options.get("file") else "file.filename"
    return Naming(place, options, place, options, key) if options.get(key) else None


@dataclass(frozen=True, slots=True)
class _Nodes:
    """The -blockdev nodes of a command line: their options by place, and who stands on whom."""

    command: CommandLine
    options: Mapping[int, Mapping[str, Any]]

    @classmethod
    def of(cls, command: CommandLine) -> "_Nodes":
        places = enumerate(command.arguments)
        return cls(command, {at: leaves(each) for at, each in places if each.option == "blockdev"})

    def place_of(self, name: str) -> int | None:
        """The place of the node called *name*."""
        named = (at for at, options in self.options.items() if options.get("node-name") == name)
        return next(named, None)

    def uses(self, name: str, *, filters: bool = False) -> int:
        """How many nodes stand on the one called *name*: how many filters, or how many others."""
        members = (
            member
            for options in self.options.values()
            if (text_of(options.get("driver")) in block.FILTER_KEYS) is filters
            for member in options.items()
        )
        return sum(leaf == name and key.rpartition(".")[2] in _REFERENCES for key, leaf in members)


def _node(nodes: _Nodes, place: int) -> Naming | None:
    argument, options = nodes.command.arguments[place], nodes.options[place]
    driver = text_of(options.get("driver"))
    if _holds_nothing(nodes, place, driver):
        return None
    block.check_driver(argument, driver, _FORMATS | block.PROTOCOLS)
    if nodes.uses(text_of(options.get("node-name"))):
        if driver in block.PROTOCOLS or block.is_on(options, "read-only"):
            return None
        raise argument.refused("another node stands on it", "make it read-only")
    if driver in block.PROTOCOLS:
        return _held(argument, Naming(place, options, place, options, "filename"))
    if isinstance(options.get("file"), str):
        return _split(nodes, place)
    if text_of(options.get("file.driver")) in block.NULLS:
        return None
    block.check_driver(argument, text_of(options.get("file.driver")), block.PROTOCOLS)
    return _held(argument, Naming(place, options, place, options, "file.filename"))


def _holds_nothing(nodes: _Nodes, place: int, driver: str) -> bool:
    """Whether a node is none of an image; a filter must stand, alone, on a -blockdev of its own."""
    if driver not in block.FILTER_KEYS:
        return driver in block.NULLS
    argument, options = nodes.command.arguments[place], nodes.options[place]
    name = options.get("file")
    if not isinstance(name, str) or nodes.place_of(name) is None:
        raise argument.refused(
            f"the image below driver '{driver}' has no -blockdev of its own",
            "define it as one, and name it here (file=NAME)",
        )
    if nodes.uses(name, filters=True) + nodes.uses(name) > 1:
        raise argument.refused(f"more than one node stands on '{name}'", "give each its own")
    for key in sorted(options.keys() - block.FILTER_KEYS[driver]):
        raise argument.refused(f"Calotype does not know {key}", f"leave {key} out")
    return True


def _split(nodes: _Nodes, place: int) -> Naming | None:
    argument, options = nodes.command.arguments[place], nodes.options[place]
    name = options["file"]
    if (file_place := nodes.place_of(name)) is None:
        raise argument.refused(f"no -blockdev is named '{name}'", "define it, or correct the name")
    if nodes.uses(name) > 1:
        raise argument.refused(f"more than one node stands on '{name}'", "give each its own")
    file_argument, file_options = nodes.command.arguments[file_place], nodes.options[file_place]
    driver = text_of(file_options.get("driver"))
    if driver in block.NULLS:
        return None
    block.check_driver(file_argument, driver, block.PROTOCOLS)
    return _held(file_argument, Naming(place, options, file_place, file_options, "filename"))


def _held(argument: Argument, naming: Naming) -> Naming:
    if naming.file_options.get(naming.file_key):
        return naming
    raise argument.refused(f"{naming.file_key} is missing", "name the image")


def _check(command: CommandLine, naming: Naming) -> None:
    argument = command.arguments[naming.place]
    file_argument = command.arguments[naming.file_place]
    block.check_filename(file_argument, naming.filename, literal=naming.file_key != "file")
    if block.is_on(naming.options, "snapshot") or not naming.read_only:
        owner = "format node" if argument.option == "blockdev" else "drive"
        block.check_keys(argument, naming.options, "file node" if naming.is_bare else owner)
    if naming.is_split and not naming.read_only:
        block.check_keys(file_argument, naming.file_options, "file node")

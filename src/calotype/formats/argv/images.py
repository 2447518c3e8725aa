"""Another image for a disk, while all that the guest and the user know it by stays.

The device, its place, node names and ids are kept, and so is each option that the new image can
have. The format is always given: a raw image that QEMU probes could turn into a qcow2 by what the
guest writes. A shorthand such as -hda cannot give one, so it becomes the -drive it stands for.

A bare file node cannot hold a qcow2. It becomes a format node of the same name over an inline file,
which takes the keys that only files have; of the others it inherits cache, read-only and
force-share, and it always passes discards on (block.c, bdrv_inherited_options).
"""

from collections.abc import Mapping
from dataclasses import replace
from posixpath import isabs, normpath
from typing import Any

from calotype.errors import CommandLineError
from calotype.formats.argv import block
from calotype.formats.argv.line import Argument, CommandLine
from calotype.formats.argv.naming import Naming, namings
from calotype.formats.argv.syntax import JSON
from calotype.formats.options import nest, text_of, unparse, unparse_json
from calotype.model.vm import Image

Options = dict[str, Any]


def with_images(command: CommandLine, images: Mapping[int, Image]) -> CommandLine:
    """Exchange the images of some disks.

    Args:
        command: The command line.
        images: Index of a disk, as `disks` counts them, -> the image it gets; paths are absolute.

    Raises:
        CommandLineError: As `disks` does, or there is no such disk.
    """
    found = namings(command)
    changes: dict[int, Argument] = {}
    for index, image in images.items():
        assert isabs(image.path), "QEMU may run in another folder than the user"
        if index not in range(len(found)):
            raise CommandLineError(f"the command line names no disk {index}", "count from 0")
        for place, options in _rewritten(found[index], image).items():
            changes[place] = _written(command.arguments[place], options)
    return command.having(changes)


def _rewritten(naming: Naming, image: Image) -> dict[int, Options]:
    """Place -> the options that the argument there gets."""
    if naming.is_bare and image.format == "raw":
        return {naming.place: {**naming.options, **_file(naming, image)}}
    if naming.is_bare:
        naming = _under_a_format_node(naming)
    top = _fitting(naming.options, image.format) | {naming.format_key: image.format}
    if naming.is_split:
        file = {**naming.file_options, **_file(naming, image)}
        return {naming.place: top, naming.file_place: file}
    return {naming.place: top | _file(naming, image)}


def _file(naming: Naming, image: Image) -> Options:
    """The options that say which file; another file than before is a regular one."""
    driver_key = "driver" if naming.file_key == "filename" else "file.driver"
    same = normpath(naming.filename) == image.path
    driver = {} if same or driver_key not in naming.file_options else {driver_key: "file"}
    return {**driver, naming.file_key: image.path}


def _fitting(options: Mapping[str, Any], format: str) -> Options:  # noqa: A002 - QEMU's word
    """Drop the options that only other formats have."""
    others = (keys for name, keys in block.FORMAT_KEYS.items() if name != format)
    foreign = frozenset[str]().union(*others)
    return {key: leaf for key, leaf in options.items() if key.partition(".")[0] not in foreign}


def _under_a_format_node(bare: Naming) -> Naming:
    """The inline form of a bare naming, still without its format."""
    moved = block.PROTOCOL_KEYS | {"driver"}
    options = {f"file.{key}" if key in moved else key: leaf for key, leaf in bare.options.items()}
    options = {"driver": "", **options}
    return replace(bare, options=options, file_options=options, file_key="file.filename")


def _written(argument: Argument, options: Options) -> Argument:
    option = "blockdev" if argument.option == "blockdev" else "drive"
    if option in JSON and argument.text.startswith("{"):
        return Argument(option, unparse_json(nest(options)))
    return Argument(option, unparse((key, text_of(leaf)) for key, leaf in options.items()))

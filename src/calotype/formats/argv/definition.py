"""What the guest can see of a command line, in one canonical form.

A machine state fits only the VM it was taken of. Two command lines describe the same VM if their
definitions are equal: whatever the guest cannot see is left out (files and formats of images, host
sides of networks and character devices, accelerators, monitors), and equal meanings are spelled
alike where that is cheap: keys are sorted, JSON is flattened, sizes are in bytes, shorthands are
written out. The order of devices is kept, since places on buses are given out in that order.

Not a proof: a default written out differs from the default left unwritten, and so does a path by
another name. What was restored is compared once more with what QEMU then shows.
"""

from collections.abc import Callable, Iterator
from posixpath import join, normpath

from calotype.formats.argv.block import SHORTHANDS
from calotype.formats.argv.line import Argument, CommandLine
from calotype.formats.argv.machine import (
    global_setting,
    has_default_serial,
    machine_options,
    memory_bytes,
)
from calotype.formats.argv.naming import drive_options
from calotype.formats.argv.syntax import settings
from calotype.formats.options import parse_size, text_of, unparse

Reader = Callable[[Argument], str | None]
"""Gives the part of an argument that the guest sees; None if that is nothing."""

_HOST_MACHINE_KEYS = frozenset({
    "accel", "append", "aux-ram-share", "boot", "dtb", "dump-guest-core", "initrd", "kernel",
    "mem-merge", "memory-backend", "shim",
})  # fmt: skip
"""Machine options, by first fragment, that the guest does not see or only while it boots."""

_DRIVE_KEYS = frozenset({"bus", "id", "if", "index", "media", "unit"})
_NET_KEYS = frozenset({"addr", "id", "mac", "macaddr", "model", "netdev", "type", "vectors"})
_BACKEND_KEYS = frozenset({"id", "size", "x-use-canonical-path-for-ramblock-id"})


def definition(command: CommandLine, cwd: str) -> tuple[tuple[str, str], ...]:
    """Give the guest-visible part of *command* in canonical form and order.

    Args:
        command: The command line.
        cwd: The folder QEMU runs in, absolute; a firmware's relative path starts there.

    Returns:
        What and how, such as ("machine.type", "q35") and ("device", "driver=usb-tablet,id=t").

    Raises:
        CommandLineError: An option is not in QEMU's grammar.
    """
    seen: dict[str, list[str]] = {name: [] for name in _ORDER}
    for argument in command.arguments:
        name, reader = _VISIBLE.get(argument.option, ("", _nothing))
        if (text := reader(argument)) is not None:
            seen[name] = [*(seen[name] if name not in _LAST_COUNTS else ()), text]
    if has_default_serial(command):
        seen["serial"] = ["port"]
    devices = ((name, text) for name in _ORDER for text in seen[name])
    return (*_machine(command, cwd), *devices)


def _machine(command: CommandLine, cwd: str) -> Iterator[tuple[str, str]]:
    options = machine_options(command) | {"memory.size": str(memory_bytes(command))}
    if "/" in options.get("firmware", ""):
        options["firmware"] = normpath(join(cwd, options["firmware"]))
    for key in sorted(options):
        if key.partition(".")[0] not in _HOST_MACHINE_KEYS:
            yield f"machine.{key}", options[key]


def _nothing(_: Argument) -> None:
    return None


def _word(argument: Argument) -> str:
    return argument.text


def _presence(_: Argument) -> str:
    return "on"


def _all_keys(argument: Argument) -> str:
    return unparse(sorted(settings(argument).items()))


def _keys(kept: frozenset[str]) -> Reader:
    def reader(argument: Argument) -> str | None:
        seen = {key: value for key, value in settings(argument).items() if key in kept}
        return unparse(sorted(seen.items())) or None

    return reader


def _cpu(argument: Argument) -> str:
    """Model and features; `+x` and `-x` are applied after the others (target/i386/cpu.c)."""
    model, *words = argument.text.split(",")
    signs = {"+": "on", "-": "off"}
    features: dict[str, str] = {}
    for word in sorted(words, key=lambda word: word[:1] in signs):
        key, _, value = word.partition("=")
        features |= {word[1:]: signs[word[0]]} if word[:1] in signs else {key: value or "on"}
    return ",".join((model, *(f"{key}={features[key]}" for key in sorted(features))))


def _drive(argument: Argument) -> str:
    options = {key: text_of(leaf) for key, leaf in drive_options(argument).items()}
    seen = {key: value for key, value in options.items() if key in _DRIVE_KEYS}
    if seen.get("media") == "disk":
        del seen["media"]
    read_only = options.get("read-only", options.get("readonly", "off"))
    if read_only != "off":
        seen["read-only"] = read_only
    return unparse(sorted(seen.items()))


def _memory_backend(argument: Argument) -> str | None:
    given = settings(argument)
    if not given.get("qom-type", "").startswith("memory-backend"):
        return None
    seen = {key: value for key, value in given.items() if key in _BACKEND_KEYS}
    return unparse(sorted((seen | {"size": str(parse_size(given.get("size", "0")))}).items()))


def _global(argument: Argument) -> str:
    return ".".join(global_setting(argument.text))


def _serial(argument: Argument) -> str:
    return "none" if argument.text == "none" else "port"


_VISIBLE: dict[str, tuple[str, Reader]] = {
    "cpu": ("cpu", _cpu),
    "numa": ("numa", _all_keys),
    "object": ("memory-backend", _memory_backend),
    "device": ("device", _all_keys),
    "global": ("global", _global),
    **dict.fromkeys(("drive", *SHORTHANDS), ("drive", _drive)),
    "netdev": ("netdev", _keys(frozenset({"id", "type"}))),
    "nic": ("nic", _keys(_NET_KEYS)),
    "net": ("net", _keys(_NET_KEYS)),
    "serial": ("serial", _serial),
    "debugcon": ("debugcon", _presence),
    "vga": ("vga", _word),
    "usbdevice": ("usbdevice", _word),
    "audio": ("audio", _keys(frozenset({"model"}))),
    "virtfs": ("virtfs", _keys(frozenset({"mount_tag"}))),
    "acpitable": ("acpitable", _all_keys),
    "smbios": ("smbios", _all_keys),
    "fw_cfg": ("fw_cfg", _all_keys),
    "option-rom": ("option-rom", _all_keys),
    "icount": ("icount", _all_keys),
    "uuid": ("uuid", _word),
    "nodefaults": ("nodefaults", _presence),
}
"""Option -> what its part is called, and who reads it. Their order is that of the definition."""

_ORDER = tuple(dict.fromkeys(name for name, _ in _VISIBLE.values()))
_LAST_COUNTS = frozenset({"cpu", "icount", "nodefaults", "uuid", "vga"})

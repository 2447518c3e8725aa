"""The machine: its options gathered from all over the command line, its type, memory, defaults.

QEMU gathers them into one tree (system/vl.c, machine_opts_dict): -machine and -M are parts of it,
-smp and -m are members of it, and a number of older options are short for one key. What comes
later wins, but for -m, which is merged last.
"""

from dataclasses import replace
from typing import Final

from calotype.formats.argv.line import Argument, CommandLine
from calotype.formats.argv.syntax import settings
from calotype.formats.options import parse, parse_size, unparse

DEFAULT_MEMORY_BYTES: Final = 128 << 20
_MEMORY_UNIT_BYTES: Final = 8192

_TREES: dict[str, str] = {"machine": "", "M": "", "smp": "smp."}
"""Option -> the path in the tree that its own keys hang from."""

_KEYS: dict[str, tuple[str, str | None]] = {
    "bios": ("firmware", None),
    "enable-kvm": ("accel", "kvm"),
    "no-acpi": ("acpi", "off"),
    "no-fd-bootchk": ("fd-bootchk", "off"),
    "no-hpet": ("hpet", "off"),
    "nographic": ("graphics", "off"),
    "usb": ("usb", "on"),
    "usbdevice": ("usb", "on"),
}
"""Option -> the key that it is short for, and its value if the option has none to give."""

_SERIAL_DRIVERS = frozenset({"isa-serial", "xen-console"})

_MEMORY_KEYS: dict[str, str] = {"size": "size", "maxmem": "max-size", "slots": "slots"}


def machine_options(command: CommandLine) -> dict[str, str]:
    """Gather the machine's options: dotted key -> value; sizes of memory are plain bytes.

    Raises:
        CommandLineError: One of them is not in QEMU's grammar.
    """
    gathered: dict[str, str] = {}
    for argument in command.arguments:
        if argument.option in _TREES:
            path = _TREES[argument.option]
            gathered |= {path + key: value for key, value in settings(argument).items()}
        elif argument.option in _KEYS:
            key, fixed = _KEYS[argument.option]
            gathered[key] = argument.text if fixed is None else fixed
    for key in {"memory.size", "memory.max-size"} & gathered.keys():
        gathered[key] = str(parse_size(gathered[key]))
    return gathered | _memory_options(command)


def memory_bytes(command: CommandLine) -> int:
    """How much RAM the VM has at its start, in bytes.

    Raises:
        CommandLineError: It is not in QEMU's grammar.
    """
    options = machine_options(command)
    if given := int(options.get("memory.size", 0)):
        return -(-given // _MEMORY_UNIT_BYTES) * _MEMORY_UNIT_BYTES
    for argument in command.arguments:
        backend = settings(argument) if argument.option == "object" else {}
        if "id" in backend and backend["id"] == options.get("memory-backend"):
            return parse_size(backend.get("size", "0"))
    return DEFAULT_MEMORY_BYTES


def machine(command: CommandLine) -> str:
    """The machine type as given; "" if QEMU's default is meant."""
    return machine_options(command).get("type", "")


def with_machine(command: CommandLine, name: str) -> CommandLine:
    """Exchange the machine type and keep the machine's other options.

    Args:
        command: The command line.
        name: A type, such as the versioned one that an alias has resolved to.

    Raises:
        CommandLineError: A -machine option is not in QEMU's grammar.
    """
    changes = {}
    for place, argument in enumerate(command.arguments):
        if argument.option in {"machine", "M"} and "type" in (given := settings(argument)):
            value = unparse((given | {"type": name}).items())
            changes[place] = replace(argument, value=value)
    return command.having(changes, *([] if changes else [Argument("machine", f"type={name}")]))


def has_default_serial(command: CommandLine) -> bool:
    """Whether QEMU gives the machine a serial port that the command line does not mention.

    It does not if one is mentioned, with -nodefaults, and if some device or -global names a driver
    of serial ports (system/vl.c, qemu_disable_default_devices).
    """
    if command.has("serial", "nodefaults"):
        return False
    devices = (settings(each) for each in command.arguments if each.option == "device")
    globals_ = map(global_setting, command.values("global"))
    drivers = {device.get("driver", "") for device in devices} | {driver for driver, _ in globals_}
    return not drivers & _SERIAL_DRIVERS


def global_setting(text: str) -> tuple[str, str]:
    """Read a -global, which may be `driver.property=value` or have a key for each.

    Returns:
        The driver, and `property=value`.
    """
    driver, dot, setting = text.partition(".")
    if dot and "=" not in driver:
        return driver, setting
    given = dict(parse(text))
    return given.get("driver", ""), f"{given.get('property', '')}={given.get('value', '')}"


def _memory_options(command: CommandLine) -> dict[str, str]:
    given: dict[str, str] = {}
    for argument in command.arguments:
        if argument.option == "m":
            given |= settings(argument)
    if "size" in given:
        given["size"] = str(parse_size(given["size"], unit="M"))
    if "maxmem" in given:
        given["maxmem"] = str(parse_size(given["maxmem"]))
    return {
        f"memory.{_MEMORY_KEYS[key]}": value for key, value in given.items() if key in _MEMORY_KEYS
    }

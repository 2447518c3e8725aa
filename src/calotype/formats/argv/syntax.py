"""How the value of each option is written: which grammar, and which key its first word has.

Source: the `implied_opt_name` of the option lists in QEMU (system/vl.c, blockdev.c, chardev/char.c,
net/net.c, ...) and the parsers that system/vl.c calls.
"""

from typing import Any

from calotype.formats.argv.line import Argument
from calotype.formats.options import flatten, parse, parse_nested, text_of

KEYVAL: frozenset[str] = frozenset({"blockdev", "machine", "M", "object", "smp"})
"""The options whose values are trees; of all others the values are QemuOpts."""

JSON: frozenset[str] = frozenset({"blockdev", "device", "netdev", "object"})
"""The options whose values may also be JSON."""

IMPLIED: dict[str, str] = {
    "M": "type",
    "acpitable": "data",
    "blockdev": "driver",
    "chardev": "backend",
    "device": "driver",
    "display": "type",
    "fw_cfg": "name",
    "icount": "shift",
    "m": "size",
    "machine": "type",
    "mon": "chardev",
    "net": "type",
    "netdev": "type",
    "nic": "type",
    "numa": "type",
    "object": "qom-type",
    "option-rom": "romfile",
    "smp": "cpus",
    "virtfs": "fsdriver",
}
"""Option -> the key that its first word has if it stands bare."""


def leaves(argument: Argument) -> dict[str, Any]:
    """Read the value of *argument*: dotted keys and leaves, of repeated keys the last.

    Raises:
        CommandLineError: The value is not in the option's grammar.
    """
    implied = IMPLIED.get(argument.option)
    is_json = argument.option in JSON and argument.text.startswith("{")
    if is_json or argument.option in KEYVAL:
        return flatten(parse_nested(argument.text, implied))
    return dict(parse(argument.text, implied))


def settings(argument: Argument) -> dict[str, str]:
    """Read the value of *argument* as `leaves` does, all leaves spelled as text."""
    return {key: text_of(leaf) for key, leaf in leaves(argument).items()}

"""QEMU's command line as a value: read it, find its disks, exchange their images, supervise it.

    line          the words: a program and a row of arguments; `arity` says which take a value
    syntax        the value of each option, as keys and leaves
    naming        where images are named, with `block` for what is understood of their options
    disks         the images that are named            images    ...and others in their places
    machine       type and memory, gathered            definition  what the guest sees of it all
    refusals      what cannot be stood for, and why    supervision  what Calotype adds to it
    agent         the socket that leads to the guest's agent
    sharing       what two QEMUs cannot both have
    adopting      what of another's command line can be started again

Nothing is opened and nothing is looked up: a command line and the folder it is run in are all that
counts. What cannot be understood is refused with the word, the reason and what to do.
"""

from calotype.formats.argv.adopting import (
    console_path,
    named_devices,
    obstacles,
    without_its_start,
)
from calotype.formats.argv.agent import agent_socket
from calotype.formats.argv.definition import definition
from calotype.formats.argv.disks import DiskArgument, disks
from calotype.formats.argv.images import with_images
from calotype.formats.argv.line import Argument, CommandLine
from calotype.formats.argv.machine import machine, memory_bytes, with_machine
from calotype.formats.argv.refusals import REFUSED
from calotype.formats.argv.sharing import Endpoint, Sharing, acts, sharing
from calotype.formats.argv.supervision import Endpoints, for_restore, has_console, supervised

__all__ = [
    "REFUSED",
    "Argument",
    "CommandLine",
    "DiskArgument",
    "Endpoint",
    "Endpoints",
    "Sharing",
    "acts",
    "agent_socket",
    "console_path",
    "definition",
    "disks",
    "for_restore",
    "has_console",
    "machine",
    "memory_bytes",
    "named_devices",
    "obstacles",
    "sharing",
    "supervised",
    "with_images",
    "with_machine",
    "without_its_start",
]

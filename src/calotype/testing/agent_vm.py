"""The witness with company: a guest with a file system that is written to, and QEMU's guest agent.

What the guest wrote is read from outside, from the image alone, as a restore would find it: whether
its file system was left in order says the superblock, and nothing that the guest said.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

from calotype.errors import HostError
from calotype.formats.options import unparse
from calotype.testing.machine import wait
from calotype.testing.witness import Witness
from calotype.testing.witness_vm import WitnessVm

SOCKET = "agent.sock"
FILES = "files.qcow2"

_WROTE = re.compile(rb"^WROTE n=(\d+) at=(\d+)\r?$", re.MULTILINE)


class AgentVm(WitnessVm):
    """A witness guest with company; its last disk holds the file system.

    Args:
        folder: Where its images and its store are.
        witness: What to boot, built with an agent.
        agent: Whether the agent is there, or dies when it has frozen the file system.
        settings: As for `WitnessVm`.
    """

    def __init__(
        self,
        folder: Path,
        witness: Witness,
        *,
        agent: Literal["on", "off", "dies"] = "on",
        **settings: Any,
    ) -> None:
        super().__init__(folder, witness, disks=("zero.qcow2", FILES), **settings)
        self._agent = agent

    def make_disks(self) -> None:
        """Create the images, the last one with an ext4 on it."""
        super().make_disks()
        raw = self.folder / "files.raw"
        with raw.open("wb") as file:
            file.truncate(64 << 20)
        _run("mke2fs", "-q", "-t", "ext4", str(raw))
        _run("qemu-img", "convert", "-O", "qcow2", str(raw), str(self.folder / FILES))
        raw.unlink()

    def argv(self, **_: Any) -> list[str]:
        """QEMU's command line, as a user would write it: the agent's socket by a relative path."""
        rings = self._witness.append(
            ["vda"],
            ram_mib=self._pool_mib,
            more=("witness.files=vdb", f"witness.agent={self._agent}"),
        )
        words = super().argv()
        words[words.index("-append") + 1] = rings
        return [*words, *agent_port(SOCKET)]

    # --- what the guest says ---------------------------------------------------------------------

    def written(self, since: int = 0) -> list[tuple[int, int]]:
        """What the guest wrote to its file system, and when by its own clock; from the console."""
        said = (self.home / "console.log").read_bytes()[since:]
        return [(int(n), int(at)) for n, at in _WROTE.findall(said)]

    def await_writing(self, count: int = 3) -> tuple[int, int]:
        """Wait until the guest has written some times from now on; the last time."""
        since = self.console_size()
        wait(lambda: len(self.written(since)) >= count, "the guest to write to its files")
        return self.written(since)[-1]

    # --- what is on the disk ---------------------------------------------------------------------

    def file_system(self, image: Path) -> "FileSystem":
        """The guest's file system as it lies in *image*."""
        raw = self.folder / "files.raw"
        _run("qemu-img", "convert", "-U", "-O", "raw", str(image), str(raw))
        try:
            return FileSystem(raw)
        finally:
            raw.unlink()


class FileSystem:
    """What an ext4 looks like from outside.

    Args:
        image: A raw image of it.

    Attributes:
        needs_recovery: Whether its journal must be replayed before it is in order.
        is_clean: Whether e2fsck finds nothing to complain of.
        written: The number that the guest wrote last, as the blocks have it.
    """

    def __init__(self, image: Path) -> None:
        features = _run("dumpe2fs", "-h", str(image))
        self.needs_recovery = " needs_recovery" in features
        check = subprocess.run(
            [_tool("e2fsck"), "-f", "-n", str(image)], capture_output=True, text=True, check=False
        )
        self.is_clean = check.returncode == 0
        self.written = int(_run("debugfs", "-R", "cat /n", str(image)) or 0)


def agent_port(socket: str) -> list[str]:
    """The arguments that give a guest the agent's port, on a listening socket."""
    chardev = (("backend", "socket"), ("id", "agent"), ("path", socket))
    return [
        *("-chardev", unparse((*chardev, ("server", "on"), ("wait", "off")))),
        *("-device", "virtio-serial-pci"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    ]


def _tool(name: str) -> str:
    """A tool of e2fsprogs may be where only root looks."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        raise HostError(f"{name} is not installed", "run scripts/setup")
    return found


def _run(name: str, *words: str) -> str:
    return subprocess.run([_tool(name), *words], check=True, capture_output=True, text=True).stdout

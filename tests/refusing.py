"""What the tests of bad input share: a command of any bytes, how it is refused, and all there is.

Bad input changes nothing: all that is there is compared, to the last byte, before and after.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from calotype.testing.machine import Machine
from calotype.testing.whole import picture
from crashing import DISKS, Subject

Word = str | bytes
UNSTEADY = ("lock", "naming.lock", "console.log", "qemu.log", "index.sqlite")
"""What a command may write to though it changes nothing, and a picture that may be made anew."""

REQUEST, NOT_FOUND, BLOCKED, MISMATCH, CONFLICT, QEMU, HOST, STORE = 2, 3, 4, 5, 6, 7, 9, 10


WRITERS: dict[str, tuple[Word, ...]] = {
    "restore": ("restore", "small", "--tag", "first"),
    "delete": ("delete", "small", "--tag", "first"),
    "recover": ("recover", "small"),
    "start": ("start", "small"),
}


class Said(NamedTuple):
    """What a command said, and how it ended."""

    code: int
    lines: list[str]
    told: bytes


def say(vm: Machine, *words: Word, stdin: int | None = subprocess.DEVNULL) -> Said:
    """Give a command, of any bytes."""
    done = subprocess.run(
        [sys.executable, "-m", "calotype", *words],
        cwd=vm.folder,
        env={**os.environ, "CALOTYPE_STORE": str(vm.store)},
        stdin=stdin,
        capture_output=True,
        timeout=90,
        check=False,
    )
    return Said(done.returncode, done.stderr.decode().splitlines(), done.stdout)


def assert_refused(said: Said, *codes: int) -> None:
    """It failed, by its family's code, with one line that says why and one that says what to do."""
    assert said.code in codes, said
    assert len(said.lines) == 2, said
    assert all(line.startswith("calotype: ") and line.isprintable() for line in said.lines), said
    assert said.lines[1].startswith("calotype: what to do: "), said
    assert "fault in Calotype" not in said.lines[0]
    assert said.told == b""


def everything(vm: Machine) -> dict[str, Any]:
    """Every file below the VM's folder, the store's too: its mode and what it holds."""
    return {
        str(path.relative_to(vm.folder)): (path.stat().st_mode, blake3(path.read_bytes()).digest())
        for path in vm.folder.rglob("*")
        if path.is_file() and path.name not in UNSTEADY
    } | {"files": vm.files()}


def tree_and_qemu(vm: Machine) -> dict[str, Any]:
    """Every file, and what the QEMU that runs says."""
    return everything(vm) | picture(vm)


def machine_with_snapshots(folder: Path) -> Machine:
    """Two snapshots, one of them tagged, and the disks written to since."""
    vm = Machine(folder, disks=DISKS)
    vm.make_disks()
    vm.run()
    vm.take("--tag", "first", "--disk", "virtio1=internal")
    vm.take("--machine-state", "none")
    return vm


def held_at(
    vm: Subject, moments: str, *words: str
) -> "tuple[subprocess.Popen[bytes], socket.socket]":
    """Run a command that waits at each of some moments until the socket is written to."""
    ours, theirs = socket.socketpair()
    asking = theirs.fileno()
    deeds = "+".join([f"ask:{asking}"] * (moments.count("+") + 1))
    struck = vm.struck(moments, deeds, words, descriptors=[asking])
    theirs.close()
    assert ours.recv(1) == b"?"
    return struck, ours

"""The witness as a VM that Calotype runs, driven through the installed command.

Everything goes through `calotype ... --json`, as a user's script would; only the console's log is
read straight from the store, to be able to say "from here on".
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calotype.errors import CalotypeError
from calotype.qemu import process
from calotype.qemu.monitor import open_socket
from calotype.store import images
from calotype.testing.witness import Check, Fact, Tick, Verdict, Witness, read, verdict

PATIENCE_S = 90.0


class CommandFailed(CalotypeError):  # noqa: N818 - the command's failure, told as it was told
    """A `calotype` command failed; `data` holds its exit code and its error object."""


class WitnessVm:
    """A witness guest in a folder of its own, with a store of its own.

    Args:
        folder: Where its images and its store are.
        witness: What to boot.
        disks: File name -> size and format, as `qemu-img create` takes them.
        memory_mib: The guest's RAM.
        pool_mib: How much of it the witness fills and checks.
        name: What Calotype calls it.
        qemu: The QEMU to run, and what goes before the witness's own arguments.
    """

    def __init__(
        self,
        folder: Path,
        witness: Witness,
        *,
        disks: Sequence[tuple[str, str]] = (("zero.qcow2", "qcow2"), ("one.raw", "raw")),
        memory_mib: int = 256,
        pool_mib: int = 16,
        name: str = "witness",
        qemu: Sequence[str] = ("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg"),
    ) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.name = name
        self.memory_mib = memory_mib
        self._disks = disks
        self._qemu = qemu
        self._witness = witness
        self._pool_mib = pool_mib

    def make_disks(self) -> None:
        """Create the images, empty."""
        for file, format_ in self._disks:
            tool = ("qemu-img", "create", "-q", "-f", format_)
            subprocess.run([*tool, self.folder / file, "64M"], check=True)

    def argv(self) -> list[str]:
        """QEMU's command line, as a user would write it."""
        guest_names = [f"vd{chr(ord('a') + place)}" for place in range(len(self._disks))]
        append = self._witness.append(guest_names, ram_mib=self._pool_mib)
        drives = [
            word
            for file, format_ in self._disks
            for word in ("-drive", f"file={file},format={format_},if=virtio")
        ]
        return [
            *self._qemu,
            *("-m", str(self.memory_mib), "-nographic", "-no-reboot"),
            *("-kernel", str(self._witness.kernel), "-initrd", str(self._witness.initrd)),
            *("-append", append),
            *drives,
        ]

    def calotype(self, *words: str) -> dict[str, Any]:
        """Run one command with `--json`; its object.

        Raises:
            CommandFailed: The exit code was not 0.
        """
        before, mark, after = _split(words)
        command = [sys.executable, "-m", "calotype", *before, "--json", *mark, *after]
        environment = {**os.environ, "CALOTYPE_STORE": str(self.store)}
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        told: dict[str, Any] = json.loads(done.stdout) if done.stdout.startswith(b"{") else {}
        if done.returncode:
            text = done.stderr.decode(errors="replace").strip()
            error = told.get("error", {})
            raise CommandFailed(text, exit_code=done.returncode, told=told, error=error)
        return told

    def run(self) -> None:
        """Define and start it."""
        self.calotype("run", self.name, "--", *self.argv())

    @property
    def _home(self) -> Path:
        (home,) = (self.store / "vms").iterdir()
        return home

    def pid(self) -> int | None:
        """The pid of its QEMU, None if it does not run."""
        (vm,) = self.calotype("ps")["vms"]
        return None if vm["pid"] is None else int(vm["pid"])

    def kill(self) -> None:
        """End its QEMU with SIGKILL, as a crash would."""
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            _wait(lambda: process.start_ticks(pid) is None, "QEMU to end")

    # --- what the guest says ---------------------------------------------------------------------

    def console_size(self) -> int:
        """The present end of the console's log: what is said later begins here."""
        log = self._home / "console.log"
        return log.stat().st_size if log.exists() else 0

    def facts(self, since: int = 0) -> list[Fact]:
        """What the guest said after byte *since* of its console's log."""
        said = (self._home / "console.log").read_bytes()[since:]
        return read(said.decode(errors="replace"))

    def ticks(self, since: int = 0) -> list[Tick]:
        """The signs of life among `facts`."""
        return [fact for fact in self.facts(since) if isinstance(fact, Tick)]

    def await_rounds(self, count: int, since: int = 0) -> Tick:
        """Wait until it played *count* more rounds than at its first tick after byte *since*."""

        def played() -> bool:
            ticks = self.ticks(since)
            return bool(ticks) and ticks[-1].n - ticks[0].n >= count

        _wait(played, f"{count} rounds of the witness")
        return self.ticks(since)[-1]

    def tell(self, order: str) -> None:
        """Send one line to its console."""
        with open_socket(self._home / "console.sock") as console:
            console.sendall(f"{order}\n".encode())
            time.sleep(0.2)

    def testimony(self, since: int) -> Verdict:
        """Let it play, check all of its RAM and disks, and judge what it said after *since*."""
        self.await_rounds(20, since)
        self.tell("check")

        def has_checked() -> bool:
            return any(isinstance(fact, Check) for fact in self.facts(since))

        _wait(has_checked, "the witness's full check")
        return verdict(self.facts(since))

    def clean_up(self) -> None:
        """End its QEMU, and let its images be removed."""
        for path in (self.store / "vms").glob("*/process.json"):
            pid = json.loads(path.read_text())["pid"]
            if b"qemu-system" in _command_of(pid):
                os.kill(pid, signal.SIGKILL)
        thaw_all(self.folder)


def thaw_all(folder: Path) -> None:
    """Clear the immutable flag of every file below *folder*, so that it can be removed."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            images.thaw(path, images.Frozen(0o600, immutable=True))


def _command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _split(words: Sequence[str]) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place : place + 1], words[place + 1 :]


def _wait(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_S:g} s for {what}")
        time.sleep(0.05)

"""A VM that Calotype runs, driven through the installed command.

Everything goes through `calotype ... --json`, as a user's script would; what a test wants to see or
to break is read straight from the store. `Machine` has no operating system: it starts in a tenth
of a second, and its firmware is all there is to be saved.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from calotype.errors import CalotypeError
from calotype.formats.options import unparse
from calotype.model.snapshot import Manifest
from calotype.qemu import process
from calotype.qemu.monitor import connect
from calotype.store import images
from calotype.store.store import Store

PATIENCE_S = 90.0


class CommandFailed(CalotypeError):  # noqa: N818 - the command's failure, told as it was told
    """A `calotype` command failed; `data` holds its exit code and its error object."""


class Machine:
    """A VM in a folder of its own, with a store of its own.

    Args:
        folder: Where its images and its store are.
        disks: The file names of its images; the suffix is the format.
        name: What Calotype calls it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        disks: Sequence[str] = ("zero.qcow2", "one.qcow2"),
        name: str = "small",
    ) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.name = name
        self.disks = disks
        self.snapshot = ""

    def make_disks(self) -> None:
        """Create the images, empty."""
        for disk in self.disks:
            tool = ("qemu-img", "create", "-q", "-f", disk.rpartition(".")[2])
            subprocess.run([*tool, self.folder / disk, "64M"], check=True)

    def argv(
        self,
        *,
        machine: str = "q35",
        memory: str = "64",
        disks: Sequence[str] | None = None,
        more: Sequence[str] = (),
    ) -> list[str]:
        """QEMU's command line, as a user would write it."""
        program = ("qemu-system-x86_64", "-machine", machine, "-accel", "tcg", "-m", memory)
        named = self.disks if disks is None else disks
        return [*program, "-nographic", *drives(named), *more]

    def run(self) -> None:
        """Define and start it."""
        self.calotype("run", self.name, "--", *self.argv())

    def define(self, **changes: Any) -> None:
        """Define it anew, with another command line, and leave it off."""
        self.calotype("run", self.name, "--", *self.argv(**changes))
        self.stop()

    def take(self, *words: str) -> str:
        """Take a snapshot; its id."""
        self.snapshot = str(self.calotype("take", self.name, *words)["id"])
        return self.snapshot

    def stop(self) -> None:
        """End its QEMU by its monitor."""
        self.calotype("stop", self.name, "--now")

    def picture(self) -> dict[str, Any]:
        """What a restore that is refused must not change."""
        return {
            "files": self.files(),
            "catalogue": self.calotype("list"),
            "record": self.calotype("show", self.name),
        }

    def files(self) -> list[tuple[str, int]]:
        """Every image, and every file of the store, by name and mode; logs and history left out."""
        unsteady = ("console.log", "qemu.log", "lock")
        paths = (
            path
            for path in self.folder.rglob("*")
            if path.name not in unsteady and "history" not in path.parts
        )
        return sorted((str(path.relative_to(self.folder)), path.stat().st_mode) for path in paths)

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

    @property
    def home(self) -> Path:
        """The VM's folder in the store."""
        (home,) = (self.store / "vms").iterdir()
        return home

    def pid(self) -> int | None:
        """The pid of its QEMU, None if it does not run."""
        (vm,) = self.calotype("ps")["vms"]
        return None if vm["pid"] is None else int(vm["pid"])

    def run_state(self) -> str:
        """Its run state, in QEMU's word; "off" if it does not run."""
        (vm,) = self.calotype("ps")["vms"]
        return str(vm["run_state"])

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Send one QMP command to the monitor for those who only look."""

        async def send() -> Any:
            async with connect(self.home / "query.sock") as monitor:
                return await monitor.execute(command, **arguments)

        return asyncio.run(send())

    def manifest(self, snapshot: str) -> Manifest:
        """A snapshot's manifest."""
        return Store(self.store).manifest(self.home.name, snapshot)

    def put_manifest(self, manifest: Manifest) -> None:
        """Put another manifest in a snapshot's place."""
        Store(self.store).commit(manifest)

    def believe(self, snapshot: str) -> None:
        """Record the machine state's file as it is now, so that a damaged one passes preflight."""
        manifest = self.manifest(snapshot)
        state = manifest.machine_state
        assert state is not None
        path = self.state_file(snapshot)
        now = msgspec.structs.replace(state, identity=images.identify(path, "raw"))
        self.put_manifest(msgspec.structs.replace(manifest, machine_state=now))

    def state_file(self, snapshot: str) -> Path:
        """The file of a snapshot's machine state."""
        return self.home / "snapshots" / snapshot / "machine-state"

    def check_image(self, path: Path) -> None:
        """Let qemu-img check a qcow2; errors and leaks raise."""
        subprocess.run(["qemu-img", "check", "-q", "-U", "-f", "qcow2", path], check=True)

    def kill(self) -> None:
        """End its QEMU with SIGKILL, as a crash would."""
        pid = self.pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            wait(lambda: process.start_ticks(pid) is None, "QEMU to end")

    def clean_up(self) -> None:
        """End its QEMU, and let its images be removed."""
        for path in (self.store / "vms").glob("*/process.json"):
            pid = json.loads(path.read_text())["pid"]
            if b"qemu-system" in _command_of(pid):
                os.kill(pid, signal.SIGKILL)
        thaw_all(self.folder)


def drives(disks: Sequence[str]) -> list[str]:
    """A -drive for each image; the suffix is the format."""
    named = ((disk, disk.rpartition(".")[2]) for disk in disks)
    pairs = ((("file", disk), ("format", format_), ("if", "virtio")) for disk, format_ in named)
    words = (("-drive", unparse(each)) for each in pairs)
    return [word for pair in words for word in pair]


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


def wait(condition: Callable[[], bool], what: str) -> None:
    """Wait until *condition* holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_S:g} s for {what}")
        time.sleep(0.05)

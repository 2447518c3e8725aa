"""The witness as a VM that Calotype runs: a `Machine` whose guest notices what does not fit."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calotype.qemu.monitor import open_socket
from calotype.store.store import Store
from calotype.testing.machine import Machine, drives, wait
from calotype.testing.witness import Check, Fact, Tick, Verdict, Witness, read, verdict


class WitnessVm(Machine):
    """A witness guest in a folder of its own, with a store of its own.

    Args:
        folder: Where its images and its store are.
        witness: What to boot.
        disks: The file names of its images; the suffix is the format.
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
        disks: Sequence[str] = ("zero.qcow2", "one.raw"),
        memory_mib: int = 256,
        pool_mib: int = 16,
        name: str = "witness",
        qemu: Sequence[str] = ("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg"),
    ) -> None:
        super().__init__(folder, disks=disks, name=name)
        self.memory_mib = memory_mib
        self._qemu = qemu
        self._witness = witness
        self._pool_mib = pool_mib

    def argv(self, **_: Any) -> list[str]:
        """QEMU's command line, as a user would write it."""
        guest_names = [f"vd{chr(ord('a') + place)}" for place in range(len(self.disks))]
        return [
            *self._qemu,
            *("-m", str(self.memory_mib), "-nographic", "-no-reboot"),
            *("-kernel", str(self._witness.kernel), "-initrd", str(self._witness.initrd)),
            *("-append", self._witness.append(guest_names, ram_mib=self._pool_mib)),
            *drives(self.disks),
        ]

    # --- what the guest says ---------------------------------------------------------------------

    def console_size(self) -> int:
        """The present end of the console's log: what is said later begins here."""
        log = self.home / "console.log"
        return log.stat().st_size if log.exists() else 0

    def facts(self, since: int = 0) -> list[Fact]:
        """What the guest said after byte *since* of its console's log."""
        said = (self.home / "console.log").read_bytes()[since:]
        return read(said.decode(errors="replace"))

    def ticks(self, since: int = 0) -> list[Tick]:
        """The signs of life among `facts`."""
        return [fact for fact in self.facts(since) if isinstance(fact, Tick)]

    def await_rounds(self, count: int, since: int = 0) -> Tick:
        """Wait until it played *count* more rounds than at its first tick after byte *since*."""

        def played() -> bool:
            ticks = self.ticks(since)
            return bool(ticks) and ticks[-1].n - ticks[0].n >= count

        wait(played, f"{count} rounds of the witness")
        return self.ticks(since)[-1]

    def tell(self, order: str) -> None:
        """Send one line to its console."""
        with open_socket(self.home / "console.sock") as console:
            console.sendall(f"{order}\n".encode())
            time.sleep(0.2)

    def testimony(self, since: int) -> Verdict:
        """Let it play, check all of its RAM and disks, and judge what it said after *since*."""
        self.await_rounds(20, since)
        self.tell("check")

        def has_checked() -> bool:
            return any(isinstance(fact, Check) for fact in self.facts(since))

        wait(has_checked, "the witness's full check")
        return verdict(self.facts(since))

    def newest(self, file: str) -> int:
        """The newest round in the witness's ring on the disk of *file*, in its active image."""
        record = Store(self.store).record(self.home.name)
        origin = str((self.folder / file).resolve())
        (active,) = (disk.active for disk in record.disks if disk.origin.path == origin)
        copy = self.folder / "ring.bin"
        tool = ("qemu-img", "dd", "-U", "-f", active.format, "-O", "raw", "bs=512", "count=64")
        subprocess.run([*tool, f"if={active.path}", f"of={copy}"], check=True)
        ring = copy.read_bytes()
        copy.unlink()
        return max(int.from_bytes(ring[at + 16 : at + 24], "little") for at in range(0, 32768, 512))

"""The main job, once, before your eyes: `make demo`.

A guest that writes to its RAM and to two disks all the time is snapshotted while it does so, goes
on, is killed, and is restored. It counts on from the instant of the snapshot, and says whether its
RAM and its disks agree. The last line is one JSON object; the exit code is 0 only if they do.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click

from calotype.testing.witness import Verdict, witness
from calotype.testing.witness_vm import WitnessVm

MEMORY_MIB = 512

ROUNDS_TO_FIRST_TICK = 50
"""The witness ticks every 20 ms and plays some 300 rounds a second."""


class Outcome(NamedTuple):
    """What the demonstration found."""

    taken: dict[str, Any]
    restored: dict[str, Any]
    is_continued: bool
    verdict: Verdict

    @property
    def is_consistent(self) -> bool:
        """Whether the guest went on from the instant, with RAM and disks in agreement."""
        return self.is_continued and self.verdict.is_consistent and self.verdict.boots == 0


def demonstrate(vm: WitnessVm) -> Outcome:
    """Take, go on, kill, restore, and let the guest testify."""
    _say("booting the witness: one qcow2 disk, one raw disk, both written to all the time")
    vm.make_disks()
    vm.run()
    before = vm.await_rounds(50)
    _say(f"taking a live snapshot, the guest is in round {before.n} and goes on writing")
    taken = vm.calotype("take", vm.name, "--tag", "demo")
    after = vm.ticks()[-1]
    last = vm.await_rounds(200, vm.console_size())
    _say(f"killing QEMU with SIGKILL in round {last.n}")
    vm.kill()
    mark = vm.console_size()
    restored = vm.calotype("restore", vm.name, "--tag", "demo")
    verdict = vm.testimony(mark)
    first = vm.ticks(mark)[0]
    _say(f"restored: the guest counts on from round {first.n}; all RAM and both disks compared")
    is_continued = before.n <= first.n <= after.n + ROUNDS_TO_FIRST_TICK < last.n
    return Outcome(taken, restored, is_continued, verdict)


def main() -> int:
    """Demonstrate in a temporary folder; print the table and the JSON line."""
    with tempfile.TemporaryDirectory(prefix="calotype-demo-") as name:
        folder = Path(name)
        vm = WitnessVm(folder, witness(_cache()), memory_mib=MEMORY_MIB, pool_mib=64)
        try:
            outcome = demonstrate(vm)
        finally:
            vm.clean_up()
    _print(outcome)
    return 0 if outcome.is_consistent else 1


def _cache() -> Path:
    return Path.cwd() / ".deps" / "witness"


def _print(outcome: Outcome) -> None:
    figures = {
        "pause_ms": outcome.taken["pause_ms"],
        "save_ms": outcome.taken["total_ms"],
        "restore_ms": outcome.restored["restore_ms"],
        "bytes": outcome.taken["bytes"],
    }
    rows = {
        "pause of the guest": f"{figures['pause_ms']:.1f} ms",
        "snapshot, from command to durable": f"{figures['save_ms'] / 1000:.2f} s",
        "bytes written": f"{figures['bytes'] / 2**20:.1f} MiB of {MEMORY_MIB} MiB RAM",
        "restore, to the running guest": f"{figures['restore_ms']:.0f} ms",
        "RAM and disks agree": "yes" if outcome.is_consistent else f"NO: {outcome.verdict}",
    }
    for label, value in rows.items():
        click.echo(f"  {label:34} {value}")
    click.echo(json.dumps({"consistent": outcome.is_consistent, **figures}))


def _say(text: str) -> None:
    click.echo(f"demo: {text}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

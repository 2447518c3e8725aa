"""What undoes a start ends the QEMU that was started, and no other."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from builders import make_record
from calotype.engine.restore_effects import RESTORE_EFFECTS
from calotype.engine.world import World
from calotype.model.vm import Process
from calotype.plan.steps import StartQemu
from calotype.qemu import process
from calotype.store.store import Store


@pytest.fixture
def child() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "60"]) as made:
        yield made
        made.kill()


@pytest.mark.parametrize("monitor", ["", "/run/qmp.sock"])
async def test_one_that_its_user_started_and_had_adopted_meanwhile_runs_on(
    tmp_path: Path, child: "subprocess.Popen[bytes]", monitor: str
) -> None:
    store, record = Store(tmp_path), make_record()
    store.make_vm_folder(record.id)
    store.save(record)
    runs = Process(child.pid, process.start_ticks(child.pid) or 0, monitor)
    store.save_process(record.id, runs)
    step = StartQemu({}, incoming=False, machine="")
    undo = RESTORE_EFFECTS[StartQemu].revert
    assert undo is not None
    await undo(World(store, record), step)
    assert process.is_alive(runs) == bool(monitor)

"""The instant of a take, where what should stand by it fails."""

import subprocess
from pathlib import Path
from typing import Any, cast

import pytest

from builders import SNAPSHOT, make_facts, make_record
from calotype.engine.progress import silent
from calotype.engine.take_effects import TAKE_EFFECTS, Taking
from calotype.errors import HostError, QemuError
from calotype.model.vm import Process
from calotype.plan.steps import PassInstant
from calotype.plan.take import plan_take
from calotype.plan.take_plan import TakeRequest
from calotype.plan.window import Failed
from calotype.qemu import guarding, process
from calotype.store.store import Store


def taking_of(folder: Path, qemu: Process) -> Taking:
    """A take of a VM that *qemu* runs."""
    store, record, facts = Store(folder), make_record(name="my web"), make_facts()
    store.make_vm_folder(record.id)
    store.save(record)
    store.save_process(record.id, qemu)
    plan = plan_take(facts, record, TakeRequest(), SNAPSHOT)
    return Taking(
        store, record, cast("Any", None), qemu, facts, plan, cast("Any", None), "", "", silent
    )


async def pass_instant(taking: Taking) -> None:
    step = next(step for step in taking.plan.steps if isinstance(step, PassInstant))
    await TAKE_EFFECTS[PassInstant].apply(taking, step)


def dead() -> Process:
    """A process that has ended."""
    with subprocess.Popen(["sleep", "60"]) as child:
        found = Process(child.pid, process.start_ticks(child.pid) or 0)
        child.kill()
    return found


@pytest.fixture
def _no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    def posted(*_: Any, **__: Any) -> None:
        raise HostError("the guard of the pause ended before the pause", "try again")

    monkeypatch.setattr(guarding, "posted", posted)


@pytest.mark.usefixtures("_no_guard")
async def test_a_qemu_that_died_before_the_pause_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(QemuError, match="QEMU has died") as caught:
        await pass_instant(taking_of(tmp_path, dead()))
    assert "`calotype start 'my web'`" in caught.value.remedy


@pytest.mark.usefixtures("_no_guard")
async def test_the_guard_is_blamed_where_qemu_lives(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="the guard of the pause ended"):
        await pass_instant(taking_of(tmp_path, process.this()))


@pytest.mark.parametrize("is_dead", [True, False])
async def test_what_fails_in_the_pause_is_told_by_whether_qemu_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_dead: bool
) -> None:
    async def guarded(*_: Any) -> Failed:
        return Failed("QEMU hung up", limit=False, settled=False)

    monkeypatch.setattr("calotype.engine.take_effects._guarded", guarded)
    with pytest.raises(QemuError, match="QEMU hung up") as caught:
        await pass_instant(taking_of(tmp_path, dead() if is_dead else process.this()))
    assert ("calotype start" in caught.value.remedy) == is_dead

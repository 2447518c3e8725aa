"""Going over from the QEMU that runs a VM to another that was prepared beside it.

The new one holds a snapshot's state on images of its own, its guest stopped. In one pause the old
guest is stopped, what only one of the two can have is handed over (`formats.argv.sharing`), the
record names the new images, and the new guest runs. The record decides: before it names the new
images every failure ends the new QEMU and hands back; afterwards the VM is the new one.

A guard stands by, as in every pause. It knows all acts that hand back, and does the same as the
undo here; both may be at it at once, for each act is right to do again.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from calotype.engine import launch
from calotype.engine.disk_effects import record_disks
from calotype.engine.world import Effect, Effects, World
from calotype.errors import QemuError
from calotype.guard import AT_REST
from calotype.model import names
from calotype.model.acts import PREVIOUS, Act, Drop, Keep, Move, Side, Tell, WritePid
from calotype.model.vm import Process
from calotype.plan.steps import EndOld, HandOver, SaveLeftBehind
from calotype.qemu import migration, monitor, process
from calotype.qemu.cancelling import seen_through
from calotype.qemu.guarding import Handover
from calotype.qemu.monitor import LAST_WORDS, Monitor
from calotype.store import files, images

LIMIT_S = 5.0
"""How long the guest may stand still before the guard acts."""
OWN_LIMIT_S = 4.0
"""...and before we give up ourselves."""
LEFT_STATE = "machine-state"
UNFINISHED = ".part"


# --- forth ---------------------------------------------------------------------------------------


async def _hand_over(world: World, step: HandOver) -> None:
    if _is_recorded(world, step):  # an earlier try came that far
        await _let_new_run(world, step)
        return
    old, new = world.began_with, launch.successor(world.record, world.began_with)
    if old is None or new is None:
        raise QemuError("the QEMU that was prepared is gone", LAST_WORDS)
    pids: dict[Side, int] = {"old": old.pid, "new": new.pid}
    async with _both(world) as monitors:
        if not step.was_running:
            await seen_through(_go_over(world, step, monitors, pids, new))
            return
        async with launch.guarded(world.store, world.record, monitors["old"], new=new) as guard:
            await guard.arm(LIMIT_S, _orders(world, step, pids))
            await seen_through(_go_over(world, step, monitors, pids, new))
            await guard.stand_down()


@contextlib.asynccontextmanager
async def _both(world: World) -> AsyncIterator[Mapping[Side, Monitor]]:
    async with (
        launch.controlling(world.store, world.record) as old,
        launch.controlling(world.store, world.record, beside=True) as new,
    ):
        yield {"old": old, "new": new}


def _orders(world: World, step: HandOver, pids: Mapping[Side, int]) -> Handover:
    newest = next(
        image.path for index, image in step.active.items() if image != step.active_before[index]
    )
    record = world.store.folder(world.record.id) / "record.json"
    back = [
        msgspec.to_builtins(act) | ({"pid": pids["old"]} if isinstance(act, WritePid) else {})
        for act in step.back
    ]
    return Handover(str(record), newest, step.let_run, back)


async def _go_over(
    world: World,
    step: HandOver,
    monitors: Mapping[Side, Monitor],
    pids: Mapping[Side, int],
    new: Process,
) -> None:
    """The pause: stop the old guest, hand over, record, let the new one run.

    Nothing is recorded late, nor believed that was: the guard may have handed back by then.
    """
    until = asyncio.get_running_loop().time() + OWN_LIMIT_S
    try:
        async with asyncio.timeout(OWN_LIMIT_S):
            await monitors["old"].execute("stop")
            for act in step.forth:
                await asyncio.sleep(0)  # one that was stopped too long does nothing more
                await perform(act, monitors, pids)
            _require_in_time(until)
            world.store.save_process(world.record.id, new)
            record_disks(world, step.active, step.parent)
            _require_in_time(until)
            if step.let_run:
                await let_run(monitors["new"])
                world.let_run_at = datetime.now(UTC)
            else:
                await monitors["new"].execute("query-status")
    except TimeoutError as error:
        raise QemuError(
            f"the VM could not go over within {OWN_LIMIT_S:g} s", "try again, or give --stop-first"
        ) from error


def _require_in_time(until: float) -> None:
    if asyncio.get_running_loop().time() > until:
        raise TimeoutError


async def perform(act: Act, monitors: Mapping[Side, Monitor], pids: Mapping[Side, int]) -> None:
    """Carry out one act.

    Raises:
        QemuError: QEMU refused.
        HostError: A file cannot be renamed or written.
    """
    match act:
        case Tell():
            await _tell(monitors[act.side], act)
        case Move():
            with files.host_errors(Path(act.source)), contextlib.suppress(FileNotFoundError):
                Path(act.source).replace(act.target)
                Path(act.source).unlink()  # two names of one file are both left, rename(2)
        case Keep():
            with files.host_errors(Path(act.path)), contextlib.suppress(FileExistsError):
                os.link(act.path, act.name)
        case Drop():
            with files.host_errors(Path(act.path)):
                Path(act.path).unlink(missing_ok=True)
        case WritePid():
            with files.host_errors(Path(act.path)):
                Path(act.path).write_text(f"{pids[act.side]}\n")


async def _tell(told: Monitor, act: Tell) -> None:
    """A human's command is refused in its answer: it has one where it should say nothing."""
    answer = await told.send(act.command, act.arguments)
    if isinstance(answer, str) and answer.strip() and not answer.strip().endswith("removed"):
        raise QemuError(f"QEMU refused: {answer.strip()}", LAST_WORDS, qemu=answer.strip())


async def _let_new_run(world: World, step: HandOver) -> None:
    if step.let_run and world.qemu is not None:
        async with launch.controlling(world.store, world.record) as new:
            if (await new.execute("query-status"))["status"] in AT_REST:
                await let_run(new)


async def let_run(new: Monitor) -> None:
    """Let the new guest run.

    Raises:
        QemuError: It does not.
    """
    await new.execute("cont")
    status = await new.execute("query-status")
    if not status["running"]:
        raise QemuError(f"the guest does not run: it is {status['status']!r}", LAST_WORDS)


def _is_recorded(world: World, step: HandOver) -> bool:
    recorded = {disk.index: disk.active for disk in world.store.record(world.record.id).disks}
    return recorded.items() >= step.active.items()


# --- back ----------------------------------------------------------------------------------------


async def _hand_back(world: World, step: HandOver) -> None:
    """End the new QEMU, give the old one back what it had, and let its guest run."""
    old, new = world.began_with, launch.successor(world.record, world.began_with)
    if new is not None:
        await process.end(new)
    for act in step.back:
        if not isinstance(act, Tell) and not (isinstance(act, WritePid) and old is None):
            await perform(act, {}, {"old": old.pid if old else 0})
    if old is not None:
        world.store.save_process(world.record.id, old)
    record_disks(world, step.active_before, step.parent_before)
    if old is None or not process.is_alive(old):
        return
    async with launch.controlling(world.store, world.record) as told:
        for act in step.back:
            if isinstance(act, Tell):
                with contextlib.suppress(QemuError):  # it has it still: it was not handed over
                    await perform(act, {"old": told}, {})
        if step.was_running and (await told.execute("query-status"))["status"] in AT_REST:
            await told.execute("cont")


# --- what is left --------------------------------------------------------------------------------


async def _save_left_behind(world: World, step: SaveLeftBehind) -> None:
    """Save the old one's machine state; where it is gone, there is none to save."""
    old = world.began_with
    path = world.store.snapshot_folder(world.record.id, step.snapshot) / LEFT_STATE
    if old is None or not process.is_alive(old) or path.exists():
        return
    part = path.with_name(LEFT_STATE + UNFINISHED)
    part.unlink(missing_ok=True)
    control = world.store.folder(world.record.id) / f"{launch.CONTROL}{PREVIOUS}"
    descriptor = files.create_private(part)
    try:
        async with monitor.connect(control) as told:
            await migration.configure(told, step.capabilities, step.parameters)
            name = names.state_descriptor(step.snapshot)
            await told.get_file(descriptor, name)
            await told.execute("migrate", uri=f"fd:{name}")
            await migration.saved(told, lambda done: world.progress("saving", done, 0))
    finally:
        os.close(descriptor)
    await asyncio.to_thread(images.sync_data, part)
    part.rename(path)


async def _end_old(world: World, step: EndOld) -> None:
    if world.began_with is not None:
        await process.end(world.began_with)
    for name in step.names:
        Path(name).unlink(missing_ok=True)


HANDOVER_EFFECTS: Effects = {
    HandOver: Effect(_hand_over, _hand_back),
    SaveLeftBehind: Effect(_save_left_behind),
    EndOld: Effect(_end_old),
}

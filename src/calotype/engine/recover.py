"""Recover: bring to an end what was cut off, and remove what nobody refers to.

It is run under the VM's lock, at the start of every command that writes and by `calotype recover`.
The journals say what was begun; QEMU, the files and the record say how far it came;
`plan.recovery` decides whether it is finished or undone. It may itself be cut off at any moment and
run again: every undo is right for what is undone already, and a journal ends last.
"""

from pathlib import Path
from typing import NamedTuple

from calotype.engine import launch
from calotype.engine.effects import EFFECTS
from calotype.engine.execute import finish, undo
from calotype.engine.progress import Progress, silent
from calotype.engine.world import World
from calotype.errors import CalotypeError, ConflictError
from calotype.model.vm import VmRecord
from calotype.plan.recovery import Recovery, Sight, plan_recovery
from calotype.plan.steps import HandOver, PassInstant, RecordRestored
from calotype.qemu import observe, process
from calotype.store import journal as journals
from calotype.store.journal import Began, Journal
from calotype.store.store import Store


class Recovered(NamedTuple):
    """One operation that was brought to an end."""

    began: Began
    outcome: str
    """`finished` or `undone`."""


async def recover(store: Store, record: VmRecord, progress: Progress = silent) -> list[Recovered]:
    """Bring every operation on a VM that was cut off to an end; the caller holds the VM's lock.

    Returns:
        What was finished or undone, oldest first.

    Raises:
        ConflictError: Something cannot be undone or finished now; it can be tried again.
        StoreError: A journal was altered.
    """
    recovered = [
        await _end(store, path, journals.read(path), progress)
        for path in store.unfinished(record.id)
    ]
    await _sweep(store, record)
    return recovered


async def _end(
    store: Store, path: Path, entries: tuple[journals.Entry, ...], progress: Progress
) -> Recovered:
    """End one operation."""
    began = entries[0]
    assert isinstance(began, Began)
    journal = Journal.reopen(path, began, entries)
    world = World(store, store.record(began.record.id), began.qemu, progress)
    world.is_settled = any(isinstance(began.steps[place], PassInstant) for place in journal.done)
    plan = plan_recovery(began.operation, began.steps, _look(world, journal))
    progress("recovering", 0, 0)
    if plan.undo or journal.doing < 0:
        await _undo(world, journal, plan)
        return Recovered(began, "undone")
    await finish(plan.finish, EFFECTS, world, journal)
    return Recovered(began, "finished")


def _look(world: World, journal: Journal) -> Sight:
    """See how far an operation came."""
    began, store = journal.began, world.store
    recorded = {disk.index: disk.active for disk in store.record(world.record.id).disks}
    wanted = [step.active for step in began.steps if isinstance(step, RecordRestored | HandOver)]
    started = launch.successor(world.record, began.qemu)
    return Sight(
        begun=journal.doing + 1,
        is_committed=store.has_manifest(world.record.id, began.snapshot),
        is_recorded=all(recorded.items() >= active.items() for active in wanted),
        qemu_runs=world.qemu not in (None, began.qemu) or started is not None,
        old_runs=began.qemu is not None and process.is_alive(began.qemu),
        is_undoing=journal.is_undoing,
    )


async def _undo(world: World, journal: Journal, plan: Recovery) -> None:
    why = "cut off: its process died"
    reasons = await undo(journal.began.steps[: plan.undo], EFFECTS, world, journal, why)
    if reasons:
        began = journal.began
        raise ConflictError(
            f"{began.operation} {began.snapshot or began.id} cannot be undone yet: {reasons[0]}",
            "the guest is not affected; when the cause is gone, `calotype recover` tries again",
            reasons=reasons,
        )


async def _sweep(store: Store, record: VmRecord) -> None:
    """Remove what no operation refers to: temporary files, folders without a manifest, nodes.

    Only what is ours by its name and its place is touched; images of the user never are.
    """
    store.sweep(record.id)
    if launch.is_running(store, record) is None:
        return
    try:
        async with launch.controlling(store, record) as monitor:
            await observe.sweep(monitor)
    except CalotypeError:
        return  # a QEMU that does not answer is told by what the caller does with it

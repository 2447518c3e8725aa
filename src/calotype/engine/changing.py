"""Changing a VM: alone, after what was cut off earlier is brought to an end, and journalled.

Every command that changes a VM goes through `changing`, so that it finds neither a half-done
operation nor somebody else's hand; and every operation goes through `carry_out`, so that whoever
comes next finds what it was about.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import cast

from calotype.engine.effects import EFFECTS
from calotype.engine.execute import execute
from calotype.engine.progress import Progress, silent
from calotype.engine.recover import recover
from calotype.engine.world import World
from calotype.errors import CalotypeError, ConflictError, HostError, StoreError
from calotype.model.vm import VmRecord
from calotype.plan.recovery import OperationKind, point_of_no_return
from calotype.plan.steps import AnyStep, CreateOverlay, ExtractInside, Step
from calotype.qemu import process
from calotype.qemu.cancelling import seen_through
from calotype.store import journal as journals
from calotype.store.journal import Began, Journal
from calotype.store.store import Store

BEGUN = "preparing"
"""The first phase that progress is told of: all that is known to be in the way has been said."""


@contextlib.asynccontextmanager
async def changing(
    store: Store, name: str, word: str, *, whole: bool = True, progress: Progress = silent
) -> AsyncIterator[VmRecord]:
    """Be the only one who changes a VM; what was cut off earlier is finished or undone first.

    Args:
        store: Where it is kept.
        name: The VM.
        word: What is about to be done to it, for whoever is refused meanwhile.
        whole: Refuse if something cannot be brought to an end now; starting and stopping can be
            done nevertheless, but for starting in the midst of a restore: what is undone of that
            later would end the QEMU, and take away what its guest has written.
        progress: Told how far it is.

    Yields:
        The VM's record, as it is by then.

    Raises:
        NotFoundError: There is no such VM.
        ConflictError: Somebody else is at it, or something could not be brought to an end.
        StoreError: A journal was altered: nobody knows what would have to be brought to an end.
        HostError: The index cannot be changed: what is done could not be found again.
    """
    record = store.find(name)
    with store.locked(record, word):
        if whole and store.index.fault is not None:
            raise store.index.fault
        try:
            await seen_through(recover(store, record, progress))
        except StoreError:
            if whole:
                raise
        except CalotypeError as error:
            if whole or (word != "stop" and _is_restoring(store, record)):
                raise _unfinished(record, error) from error
        yield store.record(record.id)


def _is_restoring(store: Store, record: VmRecord) -> bool:
    """Whether a restore was cut off and is not over."""
    began = (journals.read(path)[0] for path in store.unfinished(record.id))
    return any(isinstance(each, Began) and each.operation == "restore" for each in began)


def _unfinished(record: VmRecord, error: CalotypeError) -> ConflictError:
    return ConflictError(
        f"an earlier operation on {record.name!r} is not over yet: {error.problem}",
        error.remedy or "`calotype recover` tries again",
        cause=error.family,
    )


def _refuse_what_exists(steps: Sequence[Step]) -> None:
    """Refuse to begin where a new image would go is something already: undoing would remove it.

    Raises:
        HostError: Something is there.
    """
    overlays = [step.overlay for step in steps if isinstance(step, CreateOverlay)]
    copies = [step.copy for step in steps if isinstance(step, ExtractInside)]
    for path in overlays + copies:
        if os.path.lexists(path):
            raise HostError(f"{path} exists already", "it is none of ours: move it away", path=path)


async def carry_out(
    world: World,
    operation: OperationKind,
    operation_id: str,
    snapshot: str,
    steps: Sequence[Step],
) -> None:
    """Journal an operation, and run its steps.

    Args:
        world: What the steps act on.
        operation: What it is.
        operation_id: Its own id.
        snapshot: The snapshot that it is about; "" for none.
        steps: What to do.
    """
    _refuse_what_exists(steps)
    began = Began(
        operation=operation,
        id=operation_id,
        snapshot=snapshot,
        at=datetime.now(UTC).isoformat(),
        owner=process.this(),
        qemu=world.began_with,
        record=world.record,
        steps=cast("tuple[AnyStep, ...]", tuple(steps)),
    )
    journal = Journal.begin(world.store.folder(world.record.id), began)
    no_return = point_of_no_return(operation, tuple(steps))
    world.progress(BEGUN, 0, 0)
    await execute(steps, EFFECTS, world, journal, no_return)

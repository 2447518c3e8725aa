"""Plan to recover from an operation that was cut off: finish it, or undo it.

Every operation has a *point of no return*. Before it, what was begun is undone, newest first; from
it on, what is left is done. It lies where going back would lose something or where the result
already exists:

=========  =====================================================================================
operation  point of no return
=========  =====================================================================================
take       the manifest is there: the snapshot exists
restore    the guest was let run; or the record names the new images and QEMU holds the state;
           or, of a VM that runs, the new QEMU lives or the old one does not; or what was left is
           being discarded
start      the guest was let run
delete     the first manifest is gone
=========  =====================================================================================

An undo that was begun is gone on with: past a point of no return too, a step can have failed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from msgspec import Struct

from calotype.plan.steps import (
    AnyStep,
    Commit,
    DiscardImages,
    DropSnapshot,
    HandOver,
    LetRun,
    RecordRestored,
    SetClock,
    StartQemu,
    Step,
)

OperationKind = Literal["take", "restore", "start", "delete"]


class Sight(Struct, frozen=True):
    """What is found of an operation that was cut off."""

    begun: int
    """How many of its steps were begun; the last one may be done, half done or not even that."""
    is_committed: bool
    """Whether the manifest that a take was to write is there."""
    is_recorded: bool
    """Whether the record names the images that a restore was to put the VM on."""
    qemu_runs: bool
    """Whether the QEMU that the operation started runs."""
    old_runs: bool = False
    """Whether the QEMU that ran the VM when the operation began still runs."""
    is_undoing: bool = False
    """Whether somebody had begun to undo it: what is half undone cannot be finished any more."""


class Recovery(Struct, frozen=True):
    """What to do: run *finish* in order, or undo the first *undo* steps, newest first."""

    finish: tuple[AnyStep, ...] = ()
    undo: int = 0


def plan_recovery(kind: OperationKind, steps: tuple[AnyStep, ...], sight: Sight) -> Recovery:
    """Plan what brings an operation that was cut off to an end.

    Args:
        kind: The operation.
        steps: All of its steps.
        sight: What was found.
    """
    if sight.is_undoing or not _IS_PAST_RETURN[kind](steps, sight):
        return Recovery(undo=sight.begun)
    first = 0 if kind == "delete" else max(0, sight.begun - 1)
    left = steps[first:] if kind != "take" else ()
    return Recovery(
        finish=tuple(step for step in left if sight.qemu_runs or not _needs_guest(step))
    )


def point_of_no_return(kind: OperationKind, steps: tuple[Step, ...]) -> int:
    """The place of the first step whose failure undoes nothing: what is left is finished later."""
    if kind == "delete":
        return 0
    points = [place for place, step in enumerate(steps) if isinstance(step, _POINTS)]
    return points[-1] + 1 if points else len(steps)


def unfinished_words(begun: Sequence[Step]) -> str:
    """What is said of an operation that failed past its point of no return, in its last step."""
    dropped = [step.snapshot for step in begun[:-1] if isinstance(step, DropSnapshot)]
    if dropped:
        gone = ", ".join(dropped)
        return f"deleted already: {gone}; `calotype recover` finishes the rest, nothing is undone"
    return "it is past the point of no return: `calotype recover` finishes it"


_POINTS = (Commit, HandOver, LetRun, RecordRestored)


def _needs_guest(step: AnyStep) -> bool:
    return isinstance(step, LetRun | SetClock)


def _take_is_done(_: tuple[AnyStep, ...], sight: Sight) -> bool:
    return sight.is_committed


def _guest_was_let_run(steps: tuple[AnyStep, ...], sight: Sight) -> bool:
    return any(isinstance(step, LetRun) for step in steps[: sight.begun])


def _restore_holds(steps: tuple[AnyStep, ...], sight: Sight) -> bool:
    if _guest_was_let_run(steps, sight) or _went_over(steps, sight):
        return True
    if any(isinstance(step, DiscardImages) for step in steps[: sight.begun]):
        return True  # there is nothing to go back to any more
    needs_qemu = any(isinstance(step, StartQemu) for step in steps)
    was_begun = any(isinstance(step, RecordRestored) for step in steps[: sight.begun])
    return was_begun and sight.is_recorded and (sight.qemu_runs or not needs_qemu)


def _went_over(steps: tuple[AnyStep, ...], sight: Sight) -> bool:
    """Whether another QEMU has taken the place of the one that ran the VM."""
    if any(isinstance(step, HandOver) for step in steps[: max(0, sight.begun - 1)]):
        return True
    is_begun = any(isinstance(step, HandOver) for step in steps[: sight.begun])
    return is_begun and sight.is_recorded and (sight.qemu_runs or not sight.old_runs)


def _delete_has_begun(_: tuple[AnyStep, ...], sight: Sight) -> bool:
    return sight.begun > 0


_IS_PAST_RETURN: Mapping[OperationKind, Callable[[tuple[AnyStep, ...], Sight], bool]] = {
    "take": _take_is_done,
    "restore": _restore_holds,
    "start": _guest_was_let_run,
    "delete": _delete_has_begun,
}

"""The heart: run steps in order; on failure undo those begun, newest first.

A step counts as begun before its effect, and is noted in the journal, durably, by then. The first
error is the error; what fails while undoing is a note on it, and keeps the journal open: `recover`
tries again. Undoing is shielded from cancellation: the user's Ctrl-C ends the work, not the undo.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Protocol

from calotype.engine.world import Effects
from calotype.errors import HostError
from calotype.plan.recovery import unfinished_words
from calotype.plan.steps import Step
from calotype.qemu.cancelling import shielded


class HasPhases(Protocol):
    """What effects act on, as far as it matters here."""

    phases_ms: dict[str, float]


class Notes(Protocol):
    """Where it is noted what is about to happen; `store.journal.Journal` is one."""

    def note_doing(self, step: int) -> None:
        """Note, durably, that the effect of *step* begins now."""

    def note_done(self, step: int, spent_ms: float) -> None:
        """Note that the effect of *step* is done."""

    def note_undoing(self, error: str) -> None:
        """Note that what was begun is being undone."""

    def note_unfinished(self, reasons: tuple[str, ...]) -> None:
        """Note that it is not over, and why."""

    def end(self, outcome: str, error: str = "") -> None:
        """Note that it is over."""


async def execute(
    steps: Sequence[Step],
    effects: Effects,
    world: HasPhases,
    notes: Notes,
    no_return: int | None = None,
) -> None:
    """Run *steps* in order; on failure undo those begun, newest first, and re-raise.

    Args:
        steps: What to do.
        effects: How, by kind of step.
        world: What the effects act on.
        notes: The journal.
        no_return: The place from which on nothing is undone: what fails there stays unfinished, and
            is finished by `recover`. None: there is no such place.
    """
    begun: list[Step] = []
    try:
        for place, step in enumerate(steps):
            notes.note_doing(place)
            begun.append(step)
            notes.note_done(place, await _timed(step, effects, world))
    except BaseException as error:
        if no_return is not None and len(begun) > no_return:
            _leave_unfinished(begun, notes, error)
        else:
            why = str(error) or type(error).__name__
            for reason in await shielded(undo(begun, effects, world, notes, why)):
                error.add_note(reason)
        raise
    notes.end("done")


def _leave_unfinished(begun: Sequence[Step], notes: Notes, error: BaseException) -> None:
    error.add_note(unfinished_words(begun))
    with contextlib.suppress(HostError):  # a journal without an end says the same
        notes.note_unfinished((str(error),))


async def finish(steps: Sequence[Step], effects: Effects, world: HasPhases, notes: Notes) -> None:
    """Run the steps that are left of an operation that was cut off; nothing is undone.

    Raises:
        CalotypeError: One failed; the operation stays unfinished, and can be finished later.
    """
    try:
        for step in steps:
            await _timed(step, effects, world)
    except Exception as error:
        with contextlib.suppress(HostError):  # a journal without an end says the same
            notes.note_unfinished((str(error),))
        if isinstance(error, OSError):
            problem = f"{error.filename or 'a file'}: {error.strerror}"
            raise HostError(problem, "mend that; `calotype recover` tries again") from error
        raise
    notes.end("done")


async def undo(
    begun: Sequence[Step], effects: Effects, world: HasPhases, notes: Notes, why: str
) -> list[str]:
    """Undo the steps *begun*, newest first; what fails does not keep the rest from being undone.

    Returns:
        What could not be undone, a line each; the operation stays unfinished then.
    """
    reasons: list[str] = []
    with contextlib.suppress(HostError):  # a full disk keeps nothing from being undone
        notes.note_undoing(why)
    for step in reversed(begun):
        revert = effects[type(step)].revert
        if revert is not None:
            try:
                await revert(world, step)
            except (Exception, asyncio.CancelledError) as failure:  # noqa: BLE001 - the rest follows
                reasons.append(f"undoing {type(step).__name__} failed: {failure}")
    if not reasons:
        try:
            notes.end("undone", why)
        except HostError as failure:
            reasons.append(f"ending the journal failed: {failure}")
    if not reasons:
        return []
    with contextlib.suppress(HostError):  # a journal without an end says the same
        notes.note_unfinished(tuple(reasons))
    return reasons


async def _timed(step: Step, effects: Effects, world: HasPhases) -> float:
    """Let a step have its effect; how long that took, in ms."""
    began = time.monotonic()
    await effects[type(step)].apply(world, step)
    spent_ms = (time.monotonic() - began) * 1000
    name = type(step).__name__
    world.phases_ms[name] = round(world.phases_ms.get(name, 0.0) + spent_ms, 3)
    return round(spent_ms, 3)

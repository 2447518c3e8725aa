"""The heart: run steps in order; on failure undo those begun, newest first.

A step counts as begun before its effect, so what undoes it must be right for a step that has not
happened, has half happened, or is done. The first error is the error; what fails while undoing is
a note on it. Undoing is shielded from cancellation: the user's Ctrl-C ends the work, not the undo.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from calotype.plan.steps import Step

World = TypeVar("World", bound="HasPhases")


class HasPhases(Protocol):
    """What an effect acts on; it notes how long each phase took."""

    phases_ms: dict[str, float]


class Effect(NamedTuple):
    """What a kind of step does, and what undoes it."""

    apply: Callable[..., Awaitable[None]]
    revert: Callable[..., Awaitable[None]] | None = None


Effects = Mapping[type[Step], Effect]


async def execute(steps: Sequence[Step], effects: Effects, world: HasPhases) -> None:
    """Run *steps* in order; on failure undo those begun, newest first, and re-raise.

    Args:
        steps: What to do.
        effects: How, by kind of step.
        world: What the effects act on.
    """
    begun: list[Step] = []
    try:
        for step in steps:
            begun.append(step)
            await _timed(step, effects, world)
    except BaseException as error:
        await _shielded(_undo(begun, effects, world, error))
        raise


async def _timed(step: Step, effects: Effects, world: HasPhases) -> None:
    began = time.monotonic()
    await effects[type(step)].apply(world, step)
    name = type(step).__name__
    spent_ms = (time.monotonic() - began) * 1000
    world.phases_ms[name] = round(world.phases_ms.get(name, 0.0) + spent_ms, 3)


async def _undo(
    begun: Sequence[Step], effects: Effects, world: HasPhases, error: BaseException
) -> None:
    for step in reversed(begun):
        revert = effects[type(step)].revert
        if revert is None:
            continue
        try:
            await revert(world, step)
        except (Exception, asyncio.CancelledError) as failure:  # noqa: BLE001 - the rest is undone
            error.add_note(f"undoing {type(step).__name__} failed: {failure}")


async def _shielded(work: Awaitable[None]) -> None:
    """Wait for *work* to its end, however often we are cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            continue

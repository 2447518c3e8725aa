"""What a cancellation must not cut off: work that would be left half done."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")


async def seen_through(work: Awaitable[Result]) -> Result:
    """Do *work* to its end, however often we are cancelled meanwhile, and be cancelled then."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result


async def shielded(work: Awaitable[Result]) -> Result:
    """Undo to the end, however often we are cancelled meanwhile; what it was for is raised then."""
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            continue
    return task.result()

"""The thread in which operations run: they wait for files, and nobody else must wait for that.

An operation is written for an event loop of its own, and now and then waits for a disk in the midst
of it (a journal is durable before its step). In the loop that clients are served from, each of
these waits would be everybody's. So there is a second loop, in a thread.
"""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Generic, Self, TypeVar

Result = TypeVar("Result")


class Cancelled(Exception):  # noqa: N818 - somebody wanted it
    """An operation was cancelled; its notes say what could not be undone, or is to be finished."""


class Running(Generic[Result]):
    """An operation that runs in the other loop.

    Args:
        ended: Done when the operation really has ended, its undo included; in the caller's loop.
        there: The other loop.
    """

    def __init__(self, ended: "asyncio.Future[Result]", there: asyncio.AbstractEventLoop) -> None:
        self.ended = ended
        self._there = there
        self._task: asyncio.Task[None] | None = None

    def start(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Start it; called in the other loop."""
        self._task = self._there.create_task(work)
        return self._task

    def cancel(self) -> None:
        """Ask it to end; `ended` fails with `Cancelled` once it has undone what it had begun."""
        self._there.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        assert self._task is not None, "it was started before, by a call of the same queue"
        self._task.cancel()


class Work:
    """A second event loop, in a thread, for the length of a `with` block."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="operations")
        self._operations: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End, once what runs has been cancelled and has undone what it had begun."""
        asyncio.run_coroutine_threadsafe(self._wind_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def begin(self, operation: Coroutine[Any, Any, Result]) -> Running[Result]:
        """Begin an operation, as soon as the other loop is free; nothing is waited for here."""
        here = asyncio.get_running_loop()
        ended: asyncio.Future[Result] = here.create_future()

        async def run() -> None:
            try:
                result = await operation
            except asyncio.CancelledError as error:
                cancelled = Cancelled()
                for note in getattr(error, "__notes__", ()):
                    cancelled.add_note(note)
                here.call_soon_threadsafe(ended.set_exception, cancelled)
            except Exception as error:  # noqa: BLE001 - it is the caller's
                here.call_soon_threadsafe(ended.set_exception, error)
            else:
                here.call_soon_threadsafe(ended.set_result, result)

        def over(task: asyncio.Task[None]) -> None:
            self._operations.discard(task)
            if task.cancelled():  # before its first step
                operation.close()
                here.call_soon_threadsafe(ended.set_exception, Cancelled())

        def start() -> None:
            task = running.start(run())
            self._operations.add(task)
            task.add_done_callback(over)

        running = Running(ended, self._loop)
        self._loop.call_soon_threadsafe(start)
        return running

    async def _wind_up(self) -> None:
        """Cancel the operations alone: what they have begun of their own, such as an undo, goes on.

        An operation that is cancelled ends by itself, and ends its own tasks.
        """
        operations = list(self._operations)
        for task in operations:
            task.cancel()
        await asyncio.gather(*operations, return_exceptions=True)
        await self._loop.shutdown_default_executor()

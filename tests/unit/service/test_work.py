"""The thread of the operations: beginning one waits for nothing, cancelling one for its undo."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from calotype.qemu.cancelling import shielded
from calotype.service.work import Cancelled, Work


@pytest.fixture
def work() -> Iterator[Work]:
    with Work() as running:
        yield running


async def test_an_operation_returns_what_it_came_to_or_raises(work: Work) -> None:
    async def fine() -> int:
        return 7

    async def faulty() -> int:
        raise KeyError("no")

    assert await work.begin(fine()).ended == 7
    with pytest.raises(KeyError):
        await work.begin(faulty()).ended


async def test_nobody_waits_for_an_operation_that_waits_for_a_file(work: Work) -> None:
    """If beginning waited for the other loop, this would never end."""
    gate = threading.Event()

    async def blocks() -> None:
        gate.wait()

    async def follows() -> str:
        return "then"

    first, second = work.begin(blocks()), work.begin(follows())
    second.cancel()
    third = work.begin(follows())
    gate.set()
    await first.ended
    with pytest.raises(Cancelled):
        await second.ended
    assert await third.ended == "then"


async def test_one_that_is_cancelled_ends_when_it_has_undone_what_it_had_begun(work: Work) -> None:
    begun, undone = threading.Event(), threading.Event()

    async def operation() -> None:
        try:
            begun.set()
            await asyncio.sleep(3600)
        except asyncio.CancelledError as error:
            await asyncio.sleep(0.01)
            undone.set()
            error.add_note("a part could not be undone")
            raise

    running = work.begin(operation())
    await asyncio.to_thread(begun.wait)
    running.cancel()
    with pytest.raises(Cancelled) as raised:
        await running.ended
    assert undone.is_set()
    assert raised.value.__notes__ == ["a part could not be undone"]


async def test_the_end_waits_for_an_undo_that_is_under_way_and_leaves_it_alone() -> None:
    begun, undoing, undone = (threading.Event() for _ in range(3))

    async def undo() -> None:
        undoing.set()
        await asyncio.sleep(0.1)
        undone.set()

    async def operation() -> None:
        try:
            begun.set()
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await shielded(undo())
            raise

    with Work() as work:
        running = work.begin(operation())
        await asyncio.to_thread(begun.wait)
        running.cancel()
        await asyncio.to_thread(undoing.wait)
    assert undone.is_set()

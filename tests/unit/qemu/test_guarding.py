"""The owner of a shared connection waits until its guard has let go of it, whatever comes."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import cast

import pytest

from calotype.guard import STAND_DOWN
from calotype.qemu import guarding
from calotype.qemu.guarding import Post
from calotype.qemu.monitor import Monitor

pytestmark = pytest.mark.timeout(30)


class Shared:
    """A connection that can be given up."""

    is_given_up = False

    def hand_over(self) -> None:
        self.is_given_up = True


@contextlib.asynccontextmanager
async def armed() -> AsyncIterator[tuple[Post, Shared, socket.socket]]:
    """A guard that is played here, and has said nothing yet."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        shared = Shared()
        post = Post(1, ours, cast("Monitor", shared))
        post._listening = asyncio.create_task(post._listen(post._shared))  # type: ignore[arg-type]
        yield post, shared, theirs


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarding, "_POSTING_S", 0.05)


def test_one_that_does_not_say_that_it_stood_down_is_waited_for_until_it_lets_go() -> None:
    async def play() -> None:
        async with armed() as (post, shared, theirs):
            assert not await post.stand_down()
            assert theirs.recv(64) == STAND_DOWN
            waiting = asyncio.create_task(post.finished())
            await asyncio.sleep(0.2)
            assert not waiting.done()
            assert shared.is_given_up
            theirs.close()
            await waiting

    asyncio.run(play())


def test_who_is_cancelled_waits_all_the_same_and_is_cancelled_then() -> None:
    async def play() -> None:
        async with armed() as (post, _, theirs):
            waiting = asyncio.create_task(post.finished())
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.sleep(0.2)
            assert not waiting.done()
            theirs.close()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(play())

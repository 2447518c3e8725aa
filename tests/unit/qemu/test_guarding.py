"""The owner of a shared connection hears what its guard says; the guard is played here."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from calotype import guard
from calotype.errors import HostError
from calotype.qemu.guarding import Post

pytestmark = pytest.mark.timeout(60)


class Connection:
    """The owner's connection to QEMU, as far as a post knows it."""

    def __init__(self) -> None:
        self.is_handed_over = False
        self.given = asyncio.Event()

    def hand_over(self) -> None:
        self.is_handed_over = True
        self.given.set()


Play = Callable[[socket.socket], Awaitable[None]]


@asynccontextmanager
async def armed(play: Play, *, is_shared: bool = True) -> AsyncIterator[tuple[Post, Connection]]:
    """A guard that was armed, and then does as *play* says."""
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    connection = Connection()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        post = Post(0, ours, connection if is_shared else None)  # type: ignore[arg-type]
        arming = asyncio.ensure_future(post.arm(1.0))
        assert (await loop.sock_recv(theirs, 1 << 12)).startswith(guard.ARM)
        await loop.sock_sendall(theirs, guard.ARMED)
        await arming
        playing = asyncio.ensure_future(play(theirs))
        yield post, connection
        await playing


async def stand_by(line: socket.socket) -> None:
    """Watch, and stand down when told to."""
    loop = asyncio.get_running_loop()
    if await loop.sock_recv(line, 64) == guard.STAND_DOWN:
        await loop.sock_sendall(line, guard.STOOD_DOWN)
    line.close()


async def act(line: socket.socket) -> None:
    """Let the guest run at once."""
    await asyncio.get_running_loop().sock_sendall(line, guard.ACTING)
    await asyncio.sleep(0.05)
    line.close()


async def die(line: socket.socket) -> None:
    line.close()


def test_a_guard_that_stood_by_lets_the_owner_accept() -> None:
    async def play() -> None:
        async with armed(stand_by) as (post, connection):
            assert await post.stand_down()
            await post.finished()
            assert not connection.is_handed_over

    asyncio.run(play())


def test_a_guard_that_acted_is_heard_at_once_and_the_connection_is_its() -> None:
    async def play() -> None:
        async with armed(act) as (post, connection):
            await connection.given.wait()
            assert not await post.stand_down()
            await post.finished()

    asyncio.run(play())


def test_a_guard_that_was_killed_before_it_acted_is_not_missed() -> None:
    async def play() -> None:
        async with armed(die) as (post, connection):
            assert await post.stand_down()
            await post.finished()
            assert not connection.is_handed_over

    asyncio.run(play())


def test_an_owner_that_fails_leaves_the_connection_and_waits_until_it_is_free() -> None:
    heard: list[bytes] = []

    async def rescue(line: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        heard.append(await loop.sock_recv(line, 64))
        await act(line)
        heard.append(b"done")

    async def play() -> None:
        async with armed(rescue) as (post, connection):
            await post.finished()
            assert connection.is_handed_over
            assert heard[0] != guard.STAND_DOWN
            assert heard[1:] == [b"done"]

    asyncio.run(play())


def test_with_a_connection_of_its_own_nobody_waits_for_it() -> None:
    async def play() -> None:
        async with armed(die, is_shared=False) as (post, _):
            assert await post.stand_down()
            await post.finished()

    asyncio.run(play())


def test_a_guard_that_ends_instead_of_arming_keeps_the_guest_from_being_stopped() -> None:
    async def play() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours:
            theirs.close()
            with pytest.raises(HostError):
                await Post(0, ours, None).arm(1.0)

    asyncio.run(play())

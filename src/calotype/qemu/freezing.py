"""Holding the guest's file systems frozen, a guard standing by.

What is frozen must be thawed, whatever becomes of us and however long it takes. So there is one
way out that always works, the guard's: it is taken if we are killed, hang, are too slow, or give
up, and then nobody but the guard speaks with the agent until it is done.
"""

import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from calotype.errors import PauseLimitError
from calotype.qemu.agent import (
    ANSWER_TIMEOUT_S,
    Agent,
    AgentGone,
    AgentRefused,
    AgentSilent,
    connect,
)
from calotype.qemu.guarding import Post, posted_at_agent

_RAISE = "raise --freeze-limit, or take it when the guest writes less"

_OUR_SHARE = 0.9
"""Of the time limit: we give up before the guard acts, or each would read the other's answers."""


class Freeze:
    """File systems of the guest that are frozen, or are about to be; made by `prepare`.

    Attributes:
        count: How many are.
        frozen_ms: For how long they were, at most.
    """

    def __init__(
        self, agent: Agent, guard: Post, limit_s: float, stack: contextlib.AsyncExitStack
    ) -> None:
        self._agent = agent
        self._guard = guard
        self._limit_s = limit_s
        self._stack = stack
        self._began = 0.0
        self.count = 0
        self.frozen_ms = 0.0

    async def freeze(self) -> None:
        """Freeze them; the guard watches from before that on.

        Raises:
            AgentRefused: One could not be frozen, or there is none.
            AgentGone: QEMU hung up.
            PauseLimitError: It takes too long.
            HostError: The guard does not answer.
        """
        await self._guard.arm(self._limit_s)
        self._began = time.monotonic()
        self.count = await self._in_time(self._agent.freeze)
        if self.count == 0:
            raise AgentRefused(
                "the guest agent froze no file system: the guest has none that can be",
                "leave --quiesce out",
            )

    async def thaw(self) -> int:
        """Thaw them, and hang up; how many had stayed frozen until now.

        Raises:
            AgentRefused: They could not be thawed, in the agent's own words.
            AgentGone: QEMU hung up.
            PauseLimitError: They were frozen for too long.
        """
        thawed = await self._in_time(self._agent.thaw)
        self.frozen_ms = round((time.monotonic() - self._began) * 1000, 3)
        await self._guard.stand_down()
        await self.close()
        return thawed

    async def _in_time(self, order: Callable[[float], Awaitable[int]]) -> int:
        """Give an order, and wait for it as long as the guard does not speak with the agent too."""
        left_s = self._limit_s * _OUR_SHARE - (time.monotonic() - self._began)
        late = PauseLimitError(
            f"the guest's file systems could not be frozen and thawed in {self._limit_s:g} s",
            _RAISE,
        )
        if left_s <= 0:
            raise late
        try:
            return await order(left_s)
        except AgentGone:
            raise
        except AgentSilent as error:
            raise late from error

    async def give_up(self) -> None:
        """Let the guard thaw them, and see that nothing is frozen any more.

        Raises:
            AgentSilent: The agent does not answer; the guard goes on asking it.
            AgentRefused: Something is frozen still.
        """
        if not await self._guard.act(self._limit_s + ANSWER_TIMEOUT_S):
            raise AgentSilent(
                "the guest's file systems may still be frozen, and its agent does not answer",
                f"process {self._guard.pid} goes on asking it for ten minutes; in the guest,"
                " `fsfreeze --unfreeze` thaws them too",
            )
        await self._agent.thaw_surely(ANSWER_TIMEOUT_S)

    async def close(self) -> None:
        """Hang up, at the agent and at the guard; one that was not told to stand down acts."""
        await self._stack.aclose()


async def prepare(socket: Path, limit_s: float) -> Freeze:
    """Reach the agent, and post the guard; nothing is frozen yet.

    Args:
        socket: The socket that leads to the agent.
        limit_s: After how long the guard thaws, counted from `Freeze.freeze` on.

    Raises:
        AgentSilent: The agent does not answer.
        AgentTaken: It serves another client.
        HostError: No guard can be started.
    """
    async with contextlib.AsyncExitStack() as stack:
        agent = await stack.enter_async_context(connect(socket))
        await agent.ask("guest-ping")
        guard = await stack.enter_async_context(posted_at_agent(agent.fileno()))
        return Freeze(agent, guard, limit_s, stack.pop_all())
    raise AssertionError  # a stack passes every error on

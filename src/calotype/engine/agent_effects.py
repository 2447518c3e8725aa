"""What is done through the agent in the guest: freezing file systems, setting the clock.

The agent is the guest's own, and is believed in nothing that would hurt: a freeze counts only if
all that was frozen is found so when it is thawed, and a clock that cannot be set is told of.
"""

import time
from pathlib import Path

from calotype.engine.world import World
from calotype.errors import CalotypeError
from calotype.plan.steps import FreezeFileSystems, SetClock, ThawFileSystems
from calotype.qemu import freezing
from calotype.qemu.agent import ANSWER_TIMEOUT_S, connect


async def freeze(world: World, step: FreezeFileSystems) -> None:
    """Freeze the guest's file systems; see `freezing.Freeze`."""
    world.is_thawed = True  # until the agent is asked to
    world.freeze = await freezing.prepare(Path(step.socket), step.limit_ms / 1000)
    world.is_thawed = False
    await world.freeze.freeze()


async def thaw(world: World, step: FreezeFileSystems | ThawFileSystems) -> None:
    """Thaw what may be frozen, as an undo; in a QEMU that was started since, nothing is.

    Raises:
        AgentSilent: The agent does not answer; it can be tried again.
        AgentTaken: It serves another client, such as a guard that is still at it.
        AgentRefused: Something is frozen still.
    """
    held, world.freeze = world.freeze, None
    try:
        if world.is_thawed or world.qemu is None or world.qemu != world.began_with:
            return
        if held is not None:
            await held.give_up()
        else:
            async with connect(Path(step.socket)) as agent:
                await agent.thaw_surely(ANSWER_TIMEOUT_S)
        world.is_thawed = True
    finally:
        if held is not None:
            await held.close()


async def set_clock(world: World, step: SetClock) -> None:
    """Set the guest's clock to the host's; the restore is done by then, so a failure is none."""
    world.progress("setting the clock", 0, 0)
    try:
        async with connect(Path(step.socket)) as agent:
            await agent.ask("guest-ping", 2 * ANSWER_TIMEOUT_S)
            await agent.set_time(time.time_ns())
    except CalotypeError as error:
        world.warnings.append(f"the guest's clock was not set: {error}")

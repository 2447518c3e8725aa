"""The pump of the paused window: carries what arrives to the state machine and its answers to QEMU.

It decides nothing. Replies and events reach the machine in the order of the wire; a tick follows
whenever a millisecond went by. A cancellation from outside is one more thing that arrives: the
machine closes the window, and the guest is never left standing because somebody pressed Ctrl-C.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from qemu.qmp import Message

from calotype.plan.window import (
    Accepted,
    Command,
    Event,
    Failed,
    Failure,
    Input,
    Interrupt,
    Lost,
    Output,
    Reply,
    Tick,
    Window,
)
from calotype.qemu import process
from calotype.qemu.monitor import Monitor

TICK_S = 0.001


async def pass_through(
    window: Window, monitor: Monitor, forgetful: int | None = None
) -> Accepted | Failed:
    """Carry *window* to its end over *monitor*.

    Args:
        window: The state machine.
        monitor: The connection to QEMU.
        forgetful: The process whose memory a save that is cancelled leaves protected.

    Raises:
        asyncio.CancelledError: The user interrupted; by then the window has ended all the same.
    """
    arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
    passage = asyncio.ensure_future(_pump(window, monitor, arrivals, forgetful))
    interrupts = 0
    while not passage.done():
        try:
            await asyncio.shield(passage)
        except asyncio.CancelledError:
            interrupts += 1
            arrivals.put_nowait(Interrupt())
    if interrupts:
        raise asyncio.CancelledError
    return passage.result()


Arrival = Message | None | Interrupt
"""What comes over the wire (None when it is cut), or from the user."""


async def _pump(
    window: Window,
    monitor: Monitor,
    arrivals: asyncio.Queue[Arrival],
    forgetful: int | None,
) -> Accepted | Failed:
    pending: dict[str, str] = {}
    with monitor.tapped(arrivals.put_nowait):
        end = _send(window.begin(), monitor, pending, forgetful)
        async for arrived in _inputs(arrivals, pending):
            if end is not None:
                break
            end = _send(window.feed(arrived), monitor, pending, forgetful)
    assert end is not None
    return end


def _send(
    outputs: Iterable[Output],
    monitor: Monitor,
    pending: dict[str, str],
    forgetful: int | None,
) -> Accepted | Failed | None:
    for output in outputs:
        if not isinstance(output, Command):
            return output
        pending[monitor.post(output.execute, output.arguments)] = output.execute
        if output.execute == "migrate_cancel" and forgetful is not None:
            process.unprotect_memory(forgetful)
    return None


async def _inputs(
    arrivals: asyncio.Queue[Arrival], pending: dict[str, str]
) -> AsyncIterator[Input]:
    """What arrives, in order, and a tick for each millisecond, however much arrives."""
    began = time.monotonic()
    due = began + TICK_S
    while True:
        now = time.monotonic()
        if now >= due:
            due = now + TICK_S
            yield Tick((now - began) * 1000)
            continue
        try:
            async with asyncio.timeout(due - now):
                message = await arrivals.get()
        except TimeoutError:
            continue
        if isinstance(message, Interrupt):
            yield message
        elif message is None:
            yield Lost("QEMU went away inside the pause")
        elif (arrived := _read(message, pending)) is not None:
            yield arrived


def _read(message: Mapping[str, Any], pending: dict[str, str]) -> Input | None:
    """A message of the wire as the window knows it; None for an answer that is not the window's."""
    if "event" in message:
        stamp = message["timestamp"]
        return Event(message["event"], stamp["seconds"] * 1_000_000 + stamp["microseconds"])
    command = pending.pop(str(message.get("id")), None)
    if command is None:
        return None
    if "error" in message:
        return Failure(command, str(message["error"].get("desc", "")))
    return Reply(command, message["return"])

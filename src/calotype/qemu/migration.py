"""QEMU's migration, as the means to save and to load a machine state.

A save is over when QEMU has taken it down, which is later than `completed`: the clean-up runs
afterwards in QEMU's main loop and reads the capabilities once more (migration/migration.c,
migration_cleanup). Setting `multifd` in between makes QEMU 10.0 end multifd channels that never
were, and crash, the guest with it. The last thing that the clean-up does is to take the migration
off the list of what can be yanked; so `query-yank` (QEMU 6.0 and newer) says when it is safe to
change a setting, or to save again.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from calotype.errors import QemuError
from calotype.qemu.monitor import LAST_WORDS, CommandRefused, Monitor

POLL_S = 0.02
LOADING_POLL_S = 0.005
SETTLE_S = 30.0
"""How long the clean-up may take; QEMU's main loop was seen busy for 1.5 s at 4 GiB."""

_UNDER_WAY = frozenset({"setup", "active", "device", "pre-switchover", "cancelling"})


async def configure(
    monitor: Monitor, capabilities: Mapping[str, bool], parameters: Mapping[str, Any]
) -> None:
    """Set capabilities and parameters, as soon as no save is being taken down.

    Raises:
        QemuError: QEMU refuses, or a save does not end.
    """
    await torn_down(monitor)
    if capabilities:
        listed = [{"capability": name, "state": state} for name, state in capabilities.items()]
        await monitor.execute("migrate-set-capabilities", capabilities=listed)
    await monitor.send("migrate-set-parameters", parameters)


async def saved(monitor: Monitor, tell: Callable[[int], None]) -> None:
    """Wait until the save under way is complete and taken down; the guest runs.

    Args:
        monitor: The connection.
        tell: Called with the number of bytes written so far.

    Raises:
        QemuError: The save failed, or was cancelled by somebody else.
    """
    while True:
        state = await monitor.execute("query-migrate")
        status = state.get("status", "none")
        tell(state.get("ram", {}).get("transferred", 0))
        if status == "completed":
            break
        if status not in _UNDER_WAY:
            text = state.get("error-desc", status)
            raise QemuError(f"the save failed: {text}", LAST_WORDS, qemu=text)
        await asyncio.sleep(POLL_S)
    await torn_down(monitor)


async def cancel(monitor: Monitor) -> None:
    """Cancel a save, and wait until QEMU has taken it down; none under way is no error.

    Raises:
        QemuError: It does not end.
    """
    await monitor.execute("migrate_cancel")
    await torn_down(monitor)


async def torn_down(monitor: Monitor) -> None:
    """Wait until no migration is under way, nor being cleaned up after.

    Raises:
        QemuError: It does not end.
    """
    deadline = asyncio.get_running_loop().time() + SETTLE_S
    while await _is_under_way(monitor):
        if asyncio.get_running_loop().time() > deadline:
            raise QemuError("QEMU does not end its save", "stop the VM when you can")
        await asyncio.sleep(POLL_S)


async def _is_under_way(monitor: Monitor) -> bool:
    if (await monitor.execute("query-migrate")).get("status") in _UNDER_WAY:
        return True
    try:
        yankable = await monitor.execute("query-yank")
    except CommandRefused:  # before QEMU 6.0, which has no live snapshot either
        return False
    return any(instance["type"] == "migration" for instance in yankable)


async def load(monitor: Monitor, descriptor: int, name: str) -> None:
    """Feed a machine state to a QEMU that waits for one.

    Args:
        monitor: The connection.
        descriptor: The open stream, at its beginning.
        name: What QEMU is to call it.

    Raises:
        QemuError: QEMU cannot take it; often it ends.
    """
    await monitor.get_file(descriptor, name)
    await monitor.execute("migrate-incoming", uri=f"fd:{name}")
    while (state := await monitor.execute("query-migrate")).get("status") != "completed":
        if state.get("status") == "failed":
            text = state.get("error-desc", "failed")
            raise QemuError(f"the load failed: {text}", LAST_WORDS, qemu=text)
        await asyncio.sleep(LOADING_POLL_S)

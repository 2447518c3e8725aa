"""Looking at VMs without changing anything, and without waiting for anybody who does."""

from typing import NamedTuple

from calotype.engine import launch
from calotype.errors import CalotypeError, StoreError
from calotype.model.vm import VmRecord
from calotype.store.store import Store

_PATIENCE_S = 1.0


class Glance(NamedTuple):
    """One VM at one look."""

    record: VmRecord
    run_state: str
    """QEMU's own word; "off", "busy" where it does not answer at once, or "unknown"."""
    pid: int | None
    snapshots: int
    damage: StoreError | None = None
    """Why the run state is unknown."""


async def glance(store: Store, record: VmRecord) -> Glance:
    """Look at one VM."""
    count = len(store.index.snapshots(record.id))
    try:
        qemu = launch.is_running(store, record)
    except StoreError as error:
        return Glance(record, "unknown", None, count, error)
    if qemu is None:
        return Glance(record, "off", None, count)
    try:
        async with launch.looking(store, record, _PATIENCE_S) as monitor:
            state = (await monitor.execute("query-status"))["status"]
    except CalotypeError:
        state = "busy"
    return Glance(record, state, qemu.pid, count)

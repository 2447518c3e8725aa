"""Looking at VMs without changing anything, and without waiting for anybody who does."""

from typing import NamedTuple

from calotype.engine import launch
from calotype.errors import CalotypeError
from calotype.model.vm import VmRecord
from calotype.store.store import Store

_PATIENCE_S = 1.0


class Glance(NamedTuple):
    """One VM at one look."""

    record: VmRecord
    run_state: str
    """QEMU's own word; "off", or "busy" where it does not answer at once."""
    pid: int | None
    snapshots: int


async def glance(store: Store, record: VmRecord) -> Glance:
    """Look at one VM."""
    count = len(store.index.snapshots(record.id))
    qemu = launch.is_running(store, record)
    if qemu is None:
        return Glance(record, "off", None, count)
    try:
        async with launch.looking(store, record, _PATIENCE_S) as monitor:
            state = (await monitor.execute("query-status"))["status"]
    except CalotypeError:
        state = "busy"
    return Glance(record, state, qemu.pid, count)

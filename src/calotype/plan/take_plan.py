"""What a take is asked for, and what it is planned to do: the values that planning is about."""

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct

from calotype.errors import BlockedError
from calotype.model.snapshot import MachineStateKind, StorageKind
from calotype.model.vm import Facts, Image
from calotype.plan.steps import Step
from calotype.plan.window import WindowMethod


class GivenDisk(Struct, frozen=True):
    """What an action of a transaction does to a disk, in its caller's names."""

    kind: StorageKind
    overlay: str = ""
    """The path of the overlay (external)."""
    node: str = ""
    """The node of the overlay; "" for one of our names."""
    is_made: bool = False
    """Whether the overlay is still to be made and opened."""
    internal_name: str = ""
    device: str = ""
    """What QEMU is told that a snapshot is made inside of."""


class Transaction(Struct, frozen=True):
    """The storage actions that happen at the instant, as QEMU's `transaction` takes them."""

    actions: tuple[dict[str, Any], ...]
    properties: dict[str, Any] = {}


class TakeRequest(Struct, frozen=True):
    """What the user asked for."""

    machine_state: MachineStateKind = "external"
    method: Literal["auto", "live", "paused"] = "auto"
    pause_limit_ms: float = 2000.0
    disks: Mapping[str, StorageKind] = {}
    """By any label of a disk; those that are not named get an external overlay."""
    quiesce: bool = False
    """Have the agent in the guest freeze its file systems meanwhile."""
    freeze_limit_ms: float = 10_000.0
    """After how long they are thawed, whatever happens."""
    transaction: Transaction | None = None
    """What happens to the disks, in place of *disks*; who is not named in it is left alone."""


class Blocker(Struct, frozen=True):
    """Something in the way, and what can be done about it."""

    problem: str
    remedy: str


class DiskPlan(Struct, frozen=True):
    """What one disk gets, and why."""

    index: int
    disk: str
    kind: StorageKind
    reason: str
    image: Image
    overlay: str
    pause_ms: float
    """Its share of the estimated pause."""
    overlay_node: str = ""
    """What the overlay's node is called."""
    is_made: bool = False
    """Whether the overlay is made by this snapshot."""
    internal_name: str = ""
    device: str = ""
    """What QEMU is told that a snapshot is made inside of."""


class Estimate(Struct, frozen=True):
    """What a snapshot will cost, as far as can be told beforehand."""

    pause_ms: float
    bytes: int
    store_free_bytes: int


class TakePlan(Struct, frozen=True):
    """All that taking a snapshot will do."""

    snapshot: str
    machine_state: MachineStateKind
    method: WindowMethod
    method_reason: str
    disks: tuple[DiskPlan, ...]
    estimate: Estimate
    blockers: tuple[Blocker, ...]
    warnings: tuple[str, ...]
    steps: tuple[Step, ...]


def gives_back_run_state(facts: Facts) -> bool:
    """Whether QEMU gives a VM back from a background snapshot in the run state that it had.

    The change came with QEMU 9.0, as did the mapped-ram capability, which can be asked for.
    """
    return "mapped-ram" in facts.migration.capabilities


def forgets_protection(facts: Facts) -> bool:
    """Whether QEMU leaves memory protected after a live save that was cancelled or failed.

    That was mended in QEMU 8.1, which brought the switchover-ack capability too.
    """
    return "switchover-ack" not in facts.migration.capabilities


def is_live(method: WindowMethod) -> bool:
    """Whether the guest runs while its RAM is saved."""
    return method in ("live", "live-storage-first")


def as_error(name: str, plan: TakePlan) -> BlockedError:
    """What is told of a plan that has blockers: the first, and in the data all of them."""
    first, more = plan.blockers[0], len(plan.blockers) - 1
    also = f" (and {more} more: see --plan)" if more else ""
    return BlockedError(
        f"no snapshot of {name!r} can be taken: {first.problem}{also}",
        first.remedy,
        blockers=[[blocker.problem, blocker.remedy] for blocker in plan.blockers],
    )

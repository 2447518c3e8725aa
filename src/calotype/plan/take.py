"""Plan a system snapshot: what each disk gets and why, what is in the way, and the steps.

Nothing is changed and nothing is asked here; the same facts and the same request give the same
plan. A plan with blockers is still a whole plan: it says everything that is in the way, not only
the first thing, and it is printed the same. Only the engine refuses to carry it out.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from msgspec import Struct

from calotype.errors import BlockedError
from calotype.model import names
from calotype.model.snapshot import MachineStateKind, StorageKind
from calotype.model.vm import DiskFacts, Facts, Image, VmRecord
from calotype.plan.steps import (
    AwaitSave,
    CloseState,
    Commit,
    CreateOverlay,
    FlushImages,
    FreezeImages,
    MakeSnapshotFolder,
    OpenOverlay,
    OpenState,
    PassInstant,
    PutBackMigration,
    RecordAhead,
    SetMigration,
    SnapshotInside,
    Step,
    StorageAction,
    SwitchToOverlay,
)
from calotype.plan.window import WindowMethod

WARN_PAUSE_MS = 20.0
"""An internal snapshot whose share of the pause is above this is warned of."""

MIB = 1 << 20
GIB = 1 << 30


class TakeRequest(Struct, frozen=True):
    """What the user asked for."""

    machine_state: MachineStateKind = "external"
    method: Literal["auto", "live", "paused"] = "auto"
    pause_limit_ms: float = 2000.0
    disks: Mapping[str, StorageKind] = {}
    """By any label of a disk; those that are not named get an external overlay."""


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


def plan_take(facts: Facts, record: VmRecord, request: TakeRequest, snapshot: str) -> TakePlan:
    """Plan a system snapshot of a running VM.

    Args:
        facts: One look at the VM.
        record: The VM's definition.
        request: What the user asked for.
        snapshot: The new snapshot's id.

    Returns:
        The plan; its `blockers` are empty if it can be carried out.
    """
    disks = _plan_disks(facts, request, snapshot)
    method, method_reason = _choose_method(facts, request)
    estimate = _estimate(facts, method, disks)
    return TakePlan(
        snapshot=snapshot,
        machine_state=request.machine_state,
        method=method,
        method_reason=method_reason,
        disks=disks,
        estimate=estimate,
        blockers=(
            *_request_blockers(facts, request),
            *_machine_blockers(facts, record),
            *_storage_blockers(facts, record, disks),
            *_method_blockers(facts, method, request, estimate),
        ),
        warnings=tuple(_warnings(facts, disks, method)),
        steps=tuple(_steps(facts, record, request, snapshot, method, disks, estimate)),
    )


def as_error(name: str, plan: TakePlan) -> BlockedError:
    """What is told of a plan that has blockers: the first, and in the data all of them."""
    first, more = plan.blockers[0], len(plan.blockers) - 1
    also = f" (and {more} more: see --plan)" if more else ""
    return BlockedError(
        f"no snapshot of {name!r} can be taken: {first.problem}{also}",
        first.remedy,
        blockers=[[blocker.problem, blocker.remedy] for blocker in plan.blockers],
    )


# --- disks ---------------------------------------------------------------------------------------


def _plan_disks(facts: Facts, request: TakeRequest, snapshot: str) -> tuple[DiskPlan, ...]:
    writable = tuple(_plan_disk(disk, request, snapshot) for disk in facts.disks)
    read_only = tuple(
        DiskPlan(
            index=-1,
            disk=disk.name,
            kind="skip",
            reason="read-only storage carries no information of its own instant",
            image=Image(disk.path, "raw"),
            overlay="",
            pause_ms=0.0,
        )
        for disk in facts.read_only
    )
    return writable + read_only


def _plan_disk(disk: DiskFacts, request: TakeRequest, snapshot: str) -> DiskPlan:
    asked = next((kind for label, kind in request.disks.items() if label in disk.labels), None)
    kind: StorageKind = asked or "external"
    return DiskPlan(
        index=disk.index,
        disk=disk.name,
        kind=kind,
        reason=_REASONS[kind] if asked else "default: an overlay is quick at any size",
        image=disk.image,
        overlay=names.overlay_path(disk.origin.path, snapshot) if kind == "external" else "",
        pause_ms=_PAUSE_MS[kind](disk),
    )


_REASONS: Mapping[StorageKind, str] = {
    "external": "asked for",
    "internal": "asked for",
    "skip": "asked for: this disk is left alone and is not part of the snapshot",
}

# Measured: an overlay takes 3 to 12 ms at any size; an internal snapshot copies the tables and
# raises the reference count of each cluster, 0.1 s at 10 GiB allocated and 2 s at 200 GiB.
_PAUSE_MS: Mapping[StorageKind, Callable[[DiskFacts], float]] = {
    "external": lambda _: 5.0,
    "internal": lambda disk: 3.0 + disk.l2_tables * (disk.cluster_bytes / 8) * 6e-4,
    "skip": lambda _: 0.0,
}


# --- method --------------------------------------------------------------------------------------


def _choose_method(facts: Facts, request: TakeRequest) -> tuple[WindowMethod, str]:
    """Choose how; `auto` is live or nothing, for a long pause is the user's own choice."""
    if request.machine_state == "none":
        return "storage-only", "no machine state was asked for: the guest is not stopped"
    if request.method == "paused" and facts.run_state == "running":
        return "paused", "asked for: the guest stands still until its RAM is saved"
    if gives_back_run_state(facts):
        return "live", "the guest runs on while its RAM is saved"
    return "live-storage-first", "the guest runs on; this QEMU resumes it by itself, so disks first"


def gives_back_run_state(facts: Facts) -> bool:
    """Whether QEMU gives a VM back from a background snapshot in the run state that it had.

    The change came with QEMU 9.0, as did the mapped-ram capability, which can be asked for.
    """
    return "mapped-ram" in facts.migration.capabilities


def _is_live(method: WindowMethod) -> bool:
    return method in ("live", "live-storage-first")


# --- blockers ------------------------------------------------------------------------------------


def _request_blockers(facts: Facts, request: TakeRequest) -> Iterator[Blocker]:
    known = frozenset().union(*(disk.labels for disk in facts.disks))
    for label in sorted(set(request.disks) - known):
        yield Blocker(
            f"there is no writable disk {label!r}",
            f"the disks are: {', '.join(sorted(disk.name for disk in facts.disks)) or 'none'}",
        )
    for disk in facts.disks:
        if len(asked := sorted(set(request.disks) & disk.labels)) > 1:
            yield Blocker(f"{' and '.join(asked)} are the same disk", "name it once")
    if facts.run_state not in _CAN_BE_TAKEN[request.machine_state]:
        yield Blocker(
            f"the VM is in run state {facts.run_state!r}",
            "let it run first: `calotype start NAME` does where it is paused",
        )


_CAN_BE_TAKEN: Mapping[MachineStateKind, frozenset[str]] = {
    "external": frozenset({"running", "paused"}),
    "none": frozenset({"running", "paused", "prelaunch", "postmigrate"}),
}
"""The run states that a snapshot can be taken in.

A save in `prelaunch` makes QEMU end itself (the transition to paused is none that it knows,
system/runstate.c), and one in `postmigrate` it refuses.
"""


def _machine_blockers(facts: Facts, record: VmRecord) -> Iterator[Blocker]:
    """What was plugged or unplugged since the start: a restore would build another machine."""
    if record.topology is None:
        return
    for device in sorted(set(facts.topology.devices) ^ set(record.topology.devices)):
        word = "plugged in" if device in facts.topology.devices else "taken out"
        yield Blocker(
            f"the device {device!r} was {word} since the VM was started",
            "undo that, or start the VM with the device on its command line",
        )
    if facts.topology.memory_bytes != record.topology.memory_bytes:
        yield Blocker("the VM's memory was resized since it was started", "set it back")


def _storage_blockers(
    facts: Facts, record: VmRecord, disks: tuple[DiskPlan, ...]
) -> Iterator[Blocker]:
    for stray in facts.strays:
        yield Blocker(stray, "take it out of the VM, or start the VM without it")
    for job in facts.block_jobs:
        yield Blocker(f"the block job {job!r} is under way", "wait for it or cancel it")
    for bitmap in facts.bitmaps:
        yield Blocker(
            f"node {bitmap.node!r} has the dirty bitmap {bitmap.name!r}, which an overlay leaves"
            " behind",
            "remove the bitmap (block-dirty-bitmap-remove) and take it up after the snapshot",
        )
    planned = {plan.index: plan for plan in disks}
    for record_disk in record.disks:
        if record_disk.index not in planned:
            yield Blocker(
                f"QEMU does not show the disk {record_disk.name!r} ({record_disk.active.path})",
                "plug it in again, or start the VM anew",
            )
    for disk in facts.disks:
        yield from _disk_blockers(disk, planned[disk.index].kind)
    if all(plan.kind == "skip" for plan in disks) and facts.disks:
        yield Blocker("every disk is skipped", "name at least one disk external or internal")


def _disk_blockers(disk: DiskFacts, kind: StorageKind) -> Iterator[Blocker]:
    if kind == "internal" and disk.image.format != "qcow2":
        yield Blocker(
            f"disk {disk.name!r} is {disk.image.format}, which holds no internal snapshots",
            f"leave it external (--disk {disk.name}=external)",
        )
    if kind == "external" and not disk.is_regular_file:
        yield Blocker(
            f"disk {disk.name!r} is a device, {disk.image.path}: an overlay has no place beside it",
            "put a qcow2 image over it first, or skip it",
        )
    if kind == "external" and disk.free_bytes < 64 * MIB:
        yield Blocker(
            f"only {disk.free_bytes // MIB} MiB are free beside {disk.image.path}",
            "free some space: the guest's writes go into the overlay from now on",
        )


def _method_blockers(
    facts: Facts, method: WindowMethod, request: TakeRequest, estimate: Estimate
) -> Iterator[Blocker]:
    if method != "storage-only":
        for reason in facts.migration.blocked_reasons:
            yield Blocker(f"QEMU cannot save this machine: {reason}", "remove that device")
        if facts.migration.status in ("active", "setup", "device", "cancelling"):
            yield Blocker("a migration is under way", "wait for it or cancel it")
        if estimate.bytes > estimate.store_free_bytes:
            yield Blocker(
                f"the machine state takes about {estimate.bytes // MIB} MiB,"
                f" {estimate.store_free_bytes // MIB} MiB are free in the store",
                "free some space, or name another --store",
            )
    if _is_live(method):
        yield from _live_blockers(facts, method)
    if method == "paused" and estimate.pause_ms > request.pause_limit_ms:
        yield Blocker(
            f"the guest would stand still for about {estimate.pause_ms:.0f} ms,"
            f" the limit is {request.pause_limit_ms:.0f} ms",
            f"raise it (--pause-limit {2 * estimate.pause_ms:.0f}), or take it live",
        )


_USE_PAUSED = "or accept a long pause with --method paused"


def _live_blockers(facts: Facts, method: WindowMethod) -> Iterator[Blocker]:
    if "background-snapshot" not in facts.migration.capabilities:
        yield Blocker(
            "this QEMU has no background snapshots", f"use QEMU 6 or newer, {_USE_PAUSED}"
        )
    if not facts.host.write_tracking:
        yield Blocker(
            "the QEMU process may not protect its own memory (userfaultfd)",
            "run it as root, give it CAP_SYS_PTRACE or access to /dev/userfaultfd, or set"
            f" vm.unprivileged_userfaultfd=1, {_USE_PAUSED}",
        )
    for reason in facts.memory_backends:
        yield Blocker(reason, f"use anonymous memory, memfd or a file on tmpfs, {_USE_PAUSED}")
    if method == "live-storage-first" and facts.run_state != "running":
        yield Blocker(
            "this QEMU would let the paused guest run after a live snapshot",
            "let it run first",
        )


def _warnings(facts: Facts, disks: tuple[DiskPlan, ...], method: WindowMethod) -> Iterator[str]:
    unsafe = {disk.index for disk in facts.disks if not disk.may_be_immutable}
    for disk in disks:
        if disk.pause_ms > WARN_PAUSE_MS:
            yield (
                f"disk {disk.disk!r}: copying its tables takes about {disk.pause_ms:.0f} ms of the"
                " pause; an external overlay takes 5 ms"
            )
        if disk.kind == "external" and disk.index in unsafe:
            yield (
                f"disk {disk.disk!r}: {disk.image.path} cannot be made immutable here (file system,"
                " or no CAP_LINUX_IMMUTABLE): read-only by its mode alone, root can still write it"
            )
        if disk.kind == "skip" and disk.index >= 0:
            yield f"disk {disk.disk!r} is skipped: a restored guest finds it as it is then"
    if method == "storage-only" and facts.run_state == "running":
        yield "without the machine state the disks are what a power failure would leave"


# --- estimate ------------------------------------------------------------------------------------


def _estimate(facts: Facts, method: WindowMethod, disks: tuple[DiskPlan, ...]) -> Estimate:
    """Estimate from what was measured.

    Protecting RAM costs some 9 ms for each GiB on huge pages and 125 ms on small ones; a stopped
    save writes some 500 MiB/s.
    """
    host = facts.host
    state_bytes = min(host.resident_bytes, facts.topology.memory_bytes + 64 * MIB)
    small_bytes = max(0, state_bytes - host.huge_bytes)
    storage_ms = sum(disk.pause_ms for disk in disks)
    machine_ms = {
        "live": 10 + host.huge_bytes / GIB * 9 + small_bytes / GIB * 125,
        "live-storage-first": 10 + host.huge_bytes / GIB * 9 + small_bytes / GIB * 125,
        "paused": 20 + state_bytes / (500 * MIB) * 1000,
        "storage-only": 0.0,
    }[method]
    is_paused = facts.run_state == "running" and method != "storage-only"
    return Estimate(
        pause_ms=round(machine_ms + storage_ms, 1) if is_paused else 0.0,
        bytes=0 if method == "storage-only" else state_bytes,
        store_free_bytes=host.store_free_bytes,
    )


# --- steps ---------------------------------------------------------------------------------------

_NEVER_WITH_BACKGROUND_SNAPSHOT = (
    "auto-converge", "colo", "compress", "dirty-bitmaps", "late-block-activate", "mapped-ram",
    "multifd", "pause-before-switchover", "postcopy-preempt", "postcopy-ram", "rdma-pin-all",
    "release-ram", "return-path", "validate-uuid", "x-colo", "x-ignore-shared", "xbzrle",
    "zero-copy-send",
)  # fmt: skip
"""Capabilities that QEMU refuses beside background-snapshot, or that change what the file holds.

Source: migration/options.c, INITIALIZE_MIGRATE_CAPS_SET(check_caps_background_snapshot, ...).
"""

_FAST_BYTES_PER_S = 1 << 40


def _steps(
    facts: Facts,
    record: VmRecord,
    request: TakeRequest,
    snapshot: str,
    method: WindowMethod,
    disks: tuple[DiskPlan, ...],
    estimate: Estimate,
) -> Iterator[Step]:
    external = [(disk, plan) for disk, plan in zip(facts.disks, disks, strict=False)
                if plan.kind == "external"]  # fmt: skip
    has_state = method != "storage-only"
    fdset = _fdset(snapshot) if gives_back_run_state(facts) else 0
    before = {disk.index: disk.active for disk in record.disks}
    now = before | {disk.index: Image(plan.overlay, "qcow2") for disk, plan in external}

    yield MakeSnapshotFolder(snapshot)
    for disk, plan in external:
        yield CreateOverlay(plan.overlay, disk.image, disk.virtual_size_bytes)
    for disk, plan in external:
        yield OpenOverlay(
            node=names.overlay_node(snapshot, disk.index),
            overlay=plan.overlay,
            cache_direct=disk.cache_direct,
            cache_no_flush=disk.cache_no_flush,
            detect_zeroes=disk.detect_zeroes,
        )
    yield RecordAhead(now, before, snapshot, record.parent)
    if has_state:
        yield OpenState(snapshot, fdset)
        yield _set_migration(facts, method)
    yield FlushImages(tuple(disk.image.path for disk in facts.disks if disk.is_regular_file))
    yield PassInstant(
        method=method,
        was_running=facts.run_state == "running",
        fdset=fdset,
        actions=tuple(_actions(facts, disks, snapshot)),
        limit_ms=request.pause_limit_ms,
        graph_digest=facts.graph_digest,
    )
    if has_state:
        yield AwaitSave(estimate.bytes)
        yield _put_back(_set_migration(facts, method))
        yield CloseState(snapshot, fdset)
    yield FreezeImages({disk.image.path: disk.mode for disk, _ in external})
    yield Commit(snapshot)


def _actions(facts: Facts, disks: tuple[DiskPlan, ...], snapshot: str) -> Iterator[StorageAction]:
    for disk, plan in zip(facts.disks, disks, strict=False):
        if plan.kind == "external":
            yield SwitchToOverlay(
                node=disk.node,
                overlay_node=names.overlay_node(snapshot, disk.index),
                overlay=plan.overlay,
                base=disk.image,
                base_mode=disk.mode,
                merge_job=names.merge_job(snapshot, disk.index),
            )
        elif plan.kind == "internal":
            yield SnapshotInside(disk.node, names.internal_name(snapshot), disk.image)


def _fdset(snapshot: str) -> int:
    """A number for the fd set, from the id: far from those that QEMU hands out itself."""
    return (1 << 20) + int(snapshot[:6], 16)


def _set_migration(facts: Facts, method: WindowMethod) -> SetMigration:
    before = facts.migration.capabilities
    wanted = dict.fromkeys(_NEVER_WITH_BACKGROUND_SNAPSHOT, False)
    wanted |= {"background-snapshot": method != "paused"}
    changed = {name: state for name, state in wanted.items() if before.get(name, state) != state}
    parameters: dict[str, int | str | bool] = {"max-bandwidth": _FAST_BYTES_PER_S}
    return SetMigration(
        capabilities=changed,
        capabilities_before={name: before[name] for name in changed},
        parameters=parameters,
        parameters_before={name: facts.migration.parameters[name] for name in parameters},
    )


def _put_back(step: SetMigration) -> PutBackMigration:
    """The step that sets what *step* found."""
    return PutBackMigration(step.capabilities_before, step.parameters_before)

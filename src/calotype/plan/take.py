"""Plan a system snapshot: what each disk gets and why, what is in the way, and the steps.

Nothing is changed and nothing is asked here; the same facts and the same request give the same
plan. A plan with blockers is still a whole plan: it says everything that is in the way, not only
the first thing, and it is printed the same. Only the engine refuses to carry it out.
"""

from collections.abc import Callable, Iterator, Mapping

from msgspec.structs import replace

from calotype.model import names
from calotype.model.snapshot import StorageKind
from calotype.model.vm import DiskFacts, Facts, Image, MigrationFacts, VmRecord
from calotype.plan.blockers import blockers
from calotype.plan.given import Given, read_given, taken_back
from calotype.plan.kinds import Kind, kind_of
from calotype.plan.steps import (
    AwaitSave,
    CloseState,
    Commit,
    CreateOverlay,
    FlushImages,
    FreezeFileSystems,
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
    ThawFileSystems,
    Verbatim,
)
from calotype.plan.take_plan import (
    Blocker,
    DiskPlan,
    Estimate,
    GivenDisk,
    TakePlan,
    TakeRequest,
    gives_back_run_state,
)
from calotype.plan.window import WindowMethod

WARN_PAUSE_MS = 20.0
"""An internal snapshot whose share of the pause is above this is warned of."""

MIB = 1 << 20
GIB = 1 << 30


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
    given = None if request.transaction is None else read_given(facts, request.transaction)
    disks = _plan_disks(facts, request, snapshot, given)
    method, method_reason = _choose_method(facts, request)
    estimate = _estimate(facts, method, disks)
    return TakePlan(
        snapshot=snapshot,
        machine_state=request.machine_state,
        method=method,
        method_reason=method_reason,
        disks=disks,
        estimate=estimate,
        blockers=tuple(_blockers(facts, record, request, method, disks, estimate, given)),
        warnings=tuple(_warnings(facts, request, disks, method)),
        steps=tuple(_steps(facts, record, request, snapshot, method, disks, estimate, given)),
    )


def _blockers(
    facts: Facts,
    record: VmRecord,
    request: TakeRequest,
    method: WindowMethod,
    disks: tuple[DiskPlan, ...],
    estimate: Estimate,
    given: Given | None,
) -> Iterator[Blocker]:
    """What is in the way; what the actions of a transaction name is not."""
    if given is None:
        yield from blockers(facts, record, request, method, disks, estimate)
        return
    strays = tuple(stray for stray in facts.strays if stray.node not in given.accounted)
    named = replace(facts, strays=strays, bitmaps=())
    yield from blockers(named, record, request, method, disks, estimate)
    yield from given.blockers


# --- disks ---------------------------------------------------------------------------------------


def _plan_disks(
    facts: Facts, request: TakeRequest, snapshot: str, given: Given | None
) -> tuple[DiskPlan, ...]:
    writable = tuple(
        _plan_disk(disk, request, snapshot)
        if given is None
        else _plan_given(disk, given.disks.get(disk.index, _LEFT_ALONE), snapshot)
        for disk in facts.disks
    )
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
        overlay_node=names.overlay_node(snapshot, disk.index) if kind == "external" else "",
        is_made=kind == "external",
        internal_name=names.internal_name(snapshot) if kind == "internal" else "",
        device=disk.root,
    )


_LEFT_ALONE = GivenDisk("skip")


def _plan_given(disk: DiskFacts, given: GivenDisk, snapshot: str) -> DiskPlan:
    node = given.node or names.overlay_node(snapshot, disk.index)
    return DiskPlan(
        index=disk.index,
        disk=disk.name,
        kind=given.kind,
        reason="no action is about it" if given.kind == "skip" else "an action is about it",
        image=disk.image,
        overlay=given.overlay,
        pause_ms=_PAUSE_MS[given.kind](disk),
        overlay_node=node if given.kind == "external" else "",
        is_made=given.is_made,
        internal_name=given.internal_name,
        device=given.device,
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


def _warnings(
    facts: Facts, request: TakeRequest, disks: tuple[DiskPlan, ...], method: WindowMethod
) -> Iterator[str]:
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
    for device in facts.topology.devices:
        kind = kind_of("device", device.partition("=")[2])
        if kind is not None and _is_left_out(kind, method):
            yield f"the device {device} is no part of the snapshot: {kind.reason}"
    if method == "storage-only" and facts.run_state == "running" and not request.quiesce:
        yield "without the machine state the disks are what a power failure would leave"


def _is_left_out(kind: Kind, method: WindowMethod) -> bool:
    """Whether what a device holds will be missing, and is not in the way for all that."""
    alone = kind.treatment == "saved with state" and method == "storage-only"
    return alone or kind.treatment == "warned of"


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
    given: Given | None,
) -> Iterator[Step]:
    external = [(disk, plan) for disk, plan in zip(facts.disks, disks, strict=False)
                if plan.kind == "external"]  # fmt: skip
    has_state = method != "storage-only"
    fdset = _fdset(snapshot) if gives_back_run_state(facts) else 0
    before = {disk.index: disk.active for disk in record.disks}
    now = before | {disk.index: Image(plan.overlay, "qcow2") for disk, plan in external}

    made = [(disk, plan) for disk, plan in external if plan.is_made]
    yield MakeSnapshotFolder(snapshot)
    for disk, plan in made:
        yield CreateOverlay(plan.overlay, disk.image, disk.virtual_size_bytes)
    for disk, plan in made:
        yield OpenOverlay(
            node=plan.overlay_node,
            overlay=plan.overlay,
            cache_direct=disk.cache_direct,
            cache_no_flush=disk.cache_no_flush,
            detect_zeroes=disk.detect_zeroes,
        )
    yield RecordAhead(now, before, snapshot, record.parent)
    if has_state:
        yield OpenState(snapshot, fdset)
        yield set_migration(facts.migration, method)
    yield FlushImages(tuple(disk.image.path for disk in facts.disks if disk.is_regular_file))
    yield from _instant_steps(facts, request, snapshot, method, disks, fdset, given)
    if has_state:
        yield AwaitSave(snapshot, estimate.bytes)
        yield _put_back(set_migration(facts.migration, method))
        yield CloseState(snapshot, fdset)
    yield FreezeImages({disk.image.path: disk.mode for disk, _ in external})
    yield Commit(snapshot)


def _instant_steps(
    facts: Facts,
    request: TakeRequest,
    snapshot: str,
    method: WindowMethod,
    disks: tuple[DiskPlan, ...],
    fdset: int,
    given: Given | None,
) -> Iterator[Step]:
    """The instant, the guest's file systems frozen around it if that was asked for."""
    is_quiesced = request.quiesce and method == "storage-only"
    agent = facts.agent.socket if facts.agent and is_quiesced else ""
    if agent:
        yield FreezeFileSystems(agent, request.freeze_limit_ms)
    yield PassInstant(
        method=method,
        was_running=facts.run_state == "running",
        fdset=fdset,
        actions=tuple(_actions(facts, disks, snapshot, given)),
        limit_ms=request.pause_limit_ms,
        graph_digest=facts.graph_digest,
        agent=agent,
        properties=request.transaction.properties if request.transaction else {},
    )
    if agent:
        yield ThawFileSystems(agent)


def _actions(
    facts: Facts, disks: tuple[DiskPlan, ...], snapshot: str, given: Given | None
) -> Iterator[StorageAction]:
    """What happens at the instant: to each disk in turn, or in the order that was given."""
    order = tuple(disk.index for disk in facts.disks) if given is None else given.order
    pairs = {disk.index: (disk, plan) for disk, plan in zip(facts.disks, disks, strict=False)}
    for each in order:
        if not isinstance(each, int):
            yield Verbatim(dict(each), taken_back(each))
        else:
            yield from _action(*pairs[each], snapshot)


def _action(disk: DiskFacts, plan: DiskPlan, snapshot: str) -> Iterator[StorageAction]:
    if plan.kind == "external":
        yield SwitchToOverlay(
            node=disk.node,
            overlay_node=plan.overlay_node,
            overlay=plan.overlay,
            base=disk.image,
            base_mode=disk.mode,
            merge_job=names.merge_job(snapshot, disk.index),
        )
    elif plan.kind == "internal":
        yield SnapshotInside(plan.device, plan.internal_name, disk.image)


def _fdset(snapshot: str) -> int:
    """A number for the fd set, from the id: far from those that QEMU hands out itself."""
    return (1 << 20) + int(snapshot[:6], 16)


def set_migration(now: MigrationFacts, method: WindowMethod) -> SetMigration:
    """The step that sets QEMU's migration as a save by *method* needs it.

    Args:
        now: How it is set.
        method: How the machine state is saved.
    """
    before = now.capabilities
    wanted = dict.fromkeys(_NEVER_WITH_BACKGROUND_SNAPSHOT, False)
    wanted |= {"background-snapshot": method != "paused"}
    changed = {name: state for name, state in wanted.items() if before.get(name, state) != state}
    parameters: dict[str, int | str | bool] = {"max-bandwidth": _FAST_BYTES_PER_S}
    return SetMigration(
        capabilities=changed,
        capabilities_before={name: before[name] for name in changed},
        parameters=parameters,
        parameters_before={name: now.parameters[name] for name in parameters},
    )


def _put_back(step: SetMigration) -> PutBackMigration:
    """The step that sets what *step* found."""
    return PutBackMigration(step.capabilities_before, step.parameters_before)

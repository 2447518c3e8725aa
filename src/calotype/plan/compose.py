"""Compose a manifest from what was planned and what was found: pure, and the only place for it."""

from collections.abc import Mapping

from msgspec import Struct

from calotype.model import names
from calotype.model.snapshot import MachineStatePart, Manifest, Quiesced, StoragePart, Timings
from calotype.model.vm import DiskFacts, Facts, Image, ImageFacts, RunState, VmRecord
from calotype.plan.restore_plan import Definition
from calotype.plan.steps import CommitLeftBehind
from calotype.plan.take_plan import DiskPlan, TakePlan


class Outcome(Struct, frozen=True):
    """What came out of carrying a plan out."""

    instant: str
    stop_us: int | None
    resume_us: int | None
    machine_state: MachineStatePart | None
    chains: Mapping[int, tuple[ImageFacts, ...]]
    """The chain that each disk stood on at the instant, by disk index, looked at once frozen."""
    internal: Mapping[int, tuple[str, str]]
    """Id and digest of each internal snapshot that was made, by disk index."""
    total_ms: float
    phases_ms: dict[str, float]
    quiesced: Quiesced | None = None


def compose_taken(
    plan: TakePlan,
    facts: Facts,
    record: VmRecord,
    definition: Definition,
    tag: str,
    description: str,
    outcome: Outcome,
) -> Manifest:
    """The manifest of a snapshot that was taken of a running VM."""
    pause_ms = None
    if outcome.stop_us is not None and outcome.resume_us is not None:
        pause_ms = (outcome.resume_us - outcome.stop_us) / 1000
    run_state: RunState = "running" if facts.run_state == "running" else "paused"
    method = "live" if plan.method == "live-storage-first" else plan.method
    planned = {disk.index: disk for disk in plan.disks}
    return Manifest(
        id=plan.snapshot,
        tag=tag,
        description=description,
        parent=record.parent,
        vm_id=record.id,
        vm_name=record.name,
        instant=outcome.instant,
        method=method,
        run_state=run_state,
        machine_state=outcome.machine_state,
        storage=tuple(_taken_part(disk, planned[disk.index], outcome) for disk in facts.disks),
        read_only=facts.read_only,
        topology=facts.topology,
        definition=definition,
        argv=record.argv,
        cwd=record.cwd,
        qemu_version=facts.version,
        timings=Timings(pause_ms, round(outcome.total_ms, 3), outcome.phases_ms),
        quiesced=outcome.quiesced,
    )


def _taken_part(disk: DiskFacts, plan: DiskPlan, outcome: Outcome) -> StoragePart:
    internal_id, internal_digest = outcome.internal.get(disk.index, ("", ""))
    layers = outcome.chains.get(disk.index, ())
    return StoragePart(
        index=disk.index,
        disk=disk.name,
        qdev=disk.qdev,
        kind=plan.kind,
        reason=plan.reason,
        origin=disk.origin,
        image=None if plan.kind == "skip" else disk.image,
        layers=() if plan.kind == "skip" else layers[1:] if plan.kind == "internal" else layers,
        virtual_size_bytes=disk.virtual_size_bytes,
        internal_id=internal_id,
        internal_name=plan.internal_name,
        internal_digest=internal_digest,
    )


def compose_left_behind(
    step: CommitLeftBehind,
    restored: Manifest,
    record: VmRecord,
    definition: Definition,
    outcome: Outcome,
) -> Manifest:
    """The manifest of what a restore leaves behind; with a machine state if that was saved."""
    parts = {part.index: part for part in restored.storage}
    state = outcome.machine_state
    return Manifest(
        id=step.snapshot,
        tag="",
        description=f"left behind by the restore of {restored.id}",
        parent=step.parent_before,
        vm_id=record.id,
        vm_name=record.name,
        instant=outcome.instant,
        method="left-behind",
        run_state="off" if state is None else step.run_state,
        machine_state=state,
        storage=tuple(
            _left_part(parts[index], step.snapshot, image, step.active[index], outcome)
            for index, image in sorted(step.active_before.items())
            if index in parts
        ),
        read_only=restored.read_only,
        topology=restored.topology,
        definition=definition,
        argv=record.argv,
        cwd=record.cwd,
        qemu_version=restored.qemu_version,
        timings=Timings(None, round(outcome.total_ms, 3), outcome.phases_ms),
    )


def _left_part(
    part: StoragePart, left_behind: str, image: Image, now: Image, outcome: Outcome
) -> StoragePart:
    if part.kind == "skip":
        return part
    is_inside = image == now
    internal_id, internal_digest = outcome.internal.get(part.index, ("", ""))
    layers = outcome.chains[part.index]
    return StoragePart(
        index=part.index,
        disk=part.disk,
        qdev=part.qdev,
        kind="internal" if is_inside else "external",
        reason="left behind by a restore",
        origin=part.origin,
        image=image,
        layers=layers[1:] if is_inside else layers,
        virtual_size_bytes=layers[0].identity.virtual_size_bytes,
        internal_id=internal_id,
        internal_name=names.internal_name(left_behind) if is_inside else "",
        internal_digest=internal_digest,
    )

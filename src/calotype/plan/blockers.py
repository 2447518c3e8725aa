"""What is in the way of a snapshot, each with what can be done about it; all of it, not the first.

"Alert when it is taken, not when it is restored": whatever a restore could not bring back, and
whatever would fail inside the pause, is said here, by name, before anything happens.
"""

import posixpath
from collections.abc import Callable, Iterator, Mapping

from calotype.model.snapshot import MachineStateKind, StorageKind
from calotype.model.vm import AgentFacts, DiskFacts, Facts, VmRecord
from calotype.plan.kinds import Sort, Treatment, kind_of, treatment
from calotype.plan.take_plan import (
    Blocker,
    DiskPlan,
    Estimate,
    TakeRequest,
    forgets_protection,
    is_live,
)
from calotype.plan.window import WindowMethod

MIB = 1 << 20


def blockers(
    facts: Facts,
    record: VmRecord,
    request: TakeRequest,
    method: WindowMethod,
    disks: tuple[DiskPlan, ...],
    estimate: Estimate,
) -> Iterator[Blocker]:
    """What is in the way of taking *request* of the VM as it was seen."""
    yield from _request_blockers(facts, request)
    yield from _machine_blockers(facts, record)
    yield from _storage_blockers(facts, record, request, disks)
    yield from _kind_blockers(facts, method)
    yield from _method_blockers(facts, method, request, estimate)
    if request.quiesce:
        yield from _quiesce_blockers(facts, method)


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
    is_given_away = facts.run_state == "postmigrate" and not facts.migration.can_activate
    if facts.run_state not in _CAN_BE_TAKEN[request.machine_state] or is_given_away:
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
system/runstate.c), and one in `postmigrate` it refuses. There the images are inactive too: what was
done to the disks can be undone only by a QEMU that makes them active while the guest stands still.
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
    for medium in sorted(set(facts.topology.media) ^ set(record.topology.media)):
        device, _, file = medium.partition("=")
        word = "put into" if medium in facts.topology.media else "taken out of"
        yield Blocker(
            f"the medium {file!r} was {word} {device!r} since the VM was started",
            "undo that, or start the VM with the medium on its command line",
        )
    if facts.topology.memory_bytes != record.topology.memory_bytes:
        yield Blocker("the VM's memory was resized since it was started", "set it back")


def _storage_blockers(
    facts: Facts, record: VmRecord, request: TakeRequest, disks: tuple[DiskPlan, ...]
) -> Iterator[Blocker]:
    for stray in facts.strays:
        yield Blocker(stray.problem, stray.remedy)
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
    if request.transaction is None and facts.disks and all(plan.kind == "skip" for plan in disks):
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
    if kind == "external" and disk.is_regular_file and not disk.may_hold_overlay:
        yield Blocker(
            f"no overlay can be created in {posixpath.dirname(disk.origin.path)}, beside"
            f" {disk.origin.path}",
            "let this user write to that folder (`chmod`; `chattr -i` if it is immutable)",
        )
    if kind == "external" and disk.free_bytes < 64 * MIB:
        yield Blocker(
            f"only {disk.free_bytes // MIB} MiB are free beside {disk.image.path}",
            "free some space: the guest's writes go into the overlay from now on",
        )


def _kind_blockers(facts: Facts, method: WindowMethod) -> Iterator[Blocker]:
    """Devices, networks and exports that the table of kinds lets stand in the way of this."""
    for given in facts.topology.devices:
        yield from _kind_blocker("device", given, given.partition("=")[2], method)
    for given in facts.networks:
        yield from _kind_blocker("network", given, given.partition("=")[2], method)
    for export in facts.exports:
        what = f"{export.id!r} of node {export.node!r} ({export.kind})"
        yield from _kind_blocker("export", what, export.kind, method)


def _kind_blocker(sort: Sort, given: str, kind: str, method: WindowMethod) -> Iterator[Blocker]:
    in_the_way = _IN_THE_WAY.get(treatment(sort, kind), _never)
    if not in_the_way(method):
        return
    known = kind_of(sort, kind)
    reason = known.reason if known else "what it does is not known here"
    remedy = known.remedy if known else "take it out"
    other = f", {_USE_PAUSED}" if treatment(sort, kind) == "blocks live" else ""
    yield Blocker(f"the {sort} {given}: {reason}", f"{remedy}{other}")


def _never(_: WindowMethod) -> bool:
    return False


_IN_THE_WAY: Mapping[Treatment, Callable[[WindowMethod], bool]] = {
    "blocks": lambda _: True,
    "blocks state": lambda method: method != "storage-only",
    "blocks live": is_live,
    "needs state": lambda method: method == "storage-only",
}
"""Treatment -> whether it is in the way of a snapshot of this method."""


def _method_blockers(
    facts: Facts, method: WindowMethod, request: TakeRequest, estimate: Estimate
) -> Iterator[Blocker]:
    if method != "storage-only":
        for reason in facts.migration.blocked_reasons:
            yield Blocker(
                f"QEMU cannot save this machine: {reason}",
                "remove that device, or snapshot the disks alone (--machine-state none)",
            )
        if facts.migration.status in ("active", "setup", "device", "cancelling"):
            yield Blocker("a migration is under way", "wait for it or cancel it")
        for name, usual in _MUST_BE.items():
            if (value := facts.migration.parameters.get(name, usual)) != usual:
                yield Blocker(
                    f"the migration parameter {name!r} is {value!r}",
                    f"set it back to {usual!r} (migrate-set-parameters)",
                )
        if estimate.bytes > estimate.store_free_bytes:
            yield Blocker(
                f"the machine state takes about {estimate.bytes // MIB} MiB,"
                f" {estimate.store_free_bytes // MIB} MiB are free in the store",
                "free some space, or name another --store",
            )
    if is_live(method):
        yield from _live_blockers(facts, method)
    if method == "paused" and estimate.pause_ms > request.pause_limit_ms:
        yield Blocker(
            f"the guest would stand still for about {estimate.pause_ms:.0f} ms,"
            f" the limit is {request.pause_limit_ms:.0f} ms",
            f"raise it (--pause-limit {2 * estimate.pause_ms:.0f}), or take it live",
        )


_FREEZING = ("guest-fsfreeze-freeze", "guest-fsfreeze-status", "guest-fsfreeze-thaw")
_WITHOUT = "or leave --quiesce out"


def _quiesce_blockers(facts: Facts, method: WindowMethod) -> Iterator[Blocker]:
    if method != "storage-only":
        yield Blocker(
            "--quiesce is for disks alone: with the machine state nothing is left half written, for"
            " what RAM holds for them is part of the snapshot",
            "leave it out, or add --machine-state none",
        )
        return
    if facts.run_state != "running":
        yield Blocker(
            "a guest that stands still cannot freeze its file systems", f"let it run, {_WITHOUT}"
        )
        return
    agent = facts.agent or AgentFacts("", "the guest agent was not looked for", "try again")
    if agent.problem:
        yield Blocker(agent.problem, f"{agent.remedy}; {_WITHOUT}")
        return
    for command in sorted(set(_FREEZING) - set(agent.commands)):
        yield Blocker(
            f"the guest agent, version {agent.version}, does not carry out {command}",
            f"let its configuration in the guest allow it, {_WITHOUT}",
        )
    if agent.is_frozen:
        yield Blocker(
            "file systems of the guest are frozen already, by somebody else",
            "wait until they are thawed, or thaw them in the guest (fsfreeze --unfreeze)",
        )


_MUST_BE: Mapping[str, str] = {"tls-creds": "", "mode": "normal"}
"""Migration parameters that make a save to a file fail, or stop the guest (qapi/migration.json)."""

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
    if forgets_protection(facts) and not facts.host.may_unprotect:
        yield Blocker(
            "if the save failed, this QEMU's guest would stand still for ever, and it is not ours"
            " to mend (ptrace)",
            f"run Calotype as root or with CAP_SYS_PTRACE, use QEMU 8.1 or newer, {_USE_PAUSED}",
        )
    for reason in facts.memory_backends:
        yield Blocker(reason, f"use anonymous memory, memfd or a file on tmpfs, {_USE_PAUSED}")
    if method == "live-storage-first" and facts.run_state != "running":
        yield Blocker(
            "this QEMU would let the paused guest run after a live snapshot",
            "let it run first",
        )

"""Builders of what the core talks about: a sound default each, and what a test changes in it.

The VM of all defaults runs on qcow2 disks `/vm/disk0.qcow2`, `/vm/disk1.qcow2`, ..., each an image
of its own without a backing file; its snapshots are external and live unless a test says otherwise.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from calotype.model import names
from calotype.model.acts import WritePid, exchange
from calotype.model.identity import Identity
from calotype.model.snapshot import (
    MachineStatePart,
    Manifest,
    StorageKind,
    StoragePart,
    Timings,
)
from calotype.model.vm import (
    AgentFacts,
    DiskFacts,
    DiskRecord,
    Facts,
    HostFacts,
    Image,
    ImageFacts,
    MigrationFacts,
    Process,
    Topology,
    VmRecord,
)
from calotype.plan.compose import Outcome
from calotype.plan.restore_plan import Found, Running
from calotype.plan.steps import AwaitSave, Commit, MakeSnapshotFolder
from calotype.store.journal import Began

GIB = 1 << 30
VM_ID = "00000000000000a0"
SNAPSHOT = "00000000000000b1"
OTHER = "00000000000000b2"
DEFINITION = (
    ("machine.type", "q35"),
    ("machine.memory.size", str(GIB)),
    ("device", "driver=virtio-blk-pci,id=d0"),
)

_Value = TypeVar("_Value", bound=Struct)


def _changed(value: _Value, changes: Mapping[str, Any]) -> _Value:
    return replace(value, **changes)


def disk_path(index: int) -> str:
    """The image that the command line names for a disk."""
    return f"/vm/disk{index}.qcow2"


def make_identity(inode: int = 1, **changes: Any) -> Identity:
    """A sighting of a qcow2 of 10 GiB."""
    identity = Identity(
        device=7,
        inode=inode,
        size_bytes=200_000,
        mtime_ns=1_000,
        ctime_ns=2_000,
        format="qcow2",
        virtual_size_bytes=10 * GIB,
        header_digest="header",
        l1_digest="l1",
        snapshots_digest="snapshots",
    )
    return _changed(identity, changes)


def make_layer(path: str, inode: int = 1, **changes: Any) -> ImageFacts:
    """One image of a chain; *changes* are of its identity."""
    identity = make_identity(inode, **changes)
    return ImageFacts(path, identity.format, identity)


def make_disk(index: int = 0, **changes: Any) -> DiskFacts:
    """A disk as QEMU shows it."""
    image = Image(disk_path(index), "qcow2")
    disk = DiskFacts(
        index=index,
        name=f"disk{index}",
        qdev=f"/machine/peripheral/d{index}/virtio-backend",
        node=f"#block{index}",
        image=image,
        virtual_size_bytes=10 * GIB,
        chain=(make_layer(image.path, 100 + index),),
        l2_tables=2,
        cluster_bytes=65536,
        free_bytes=100 * GIB,
        origin=image,
        is_regular_file=True,
        mode=0o640,
        cache_direct=False,
        cache_no_flush=False,
        detect_zeroes="off",
    )
    return _changed(disk, changes)


def make_disk_record(index: int = 0, **changes: Any) -> DiskRecord:
    """A disk as the store keeps it: on the image that the command line names."""
    image = Image(disk_path(index), "qcow2")
    return _changed(DiskRecord(index, f"disk{index}", image, image), changes)


def make_topology(**changes: Any) -> Topology:
    """A machine of 1 GiB with one CPU and one device."""
    topology = Topology(
        machine="pc-q35-10.0",
        memory_bytes=GIB,
        cpus=("qemu64-x86_64-cpu",),
        devices=("d0=virtio-blk-pci",),
    )
    return _changed(topology, changes)


def make_record(disks: Iterable[DiskRecord] | None = None, **changes: Any) -> VmRecord:
    """A VM of one disk that descends from no snapshot."""
    record = VmRecord(
        id=VM_ID,
        name="web",
        argv=("qemu-system-x86_64", "-m", "1G", "-drive", "file=disk0.qcow2,if=virtio"),
        cwd="/vm",
        disks=(make_disk_record(),) if disks is None else tuple(disks),
        created="2025-01-01T00:00:00+00:00",
        topology=make_topology(),
    )
    return _changed(record, changes)


def make_migration(**changes: Any) -> MigrationFacts:
    """QEMU 10, all capabilities off, nothing under way."""
    capabilities = (
        "background-snapshot", "mapped-ram", "multifd", "postcopy-ram", "switchover-ack", "events"
    )  # fmt: skip
    migration = MigrationFacts(
        capabilities=dict.fromkeys(capabilities, False),
        parameters={"max-bandwidth": 134217728, "downtime-limit": 300},
        status="none",
        blocked_reasons=(),
        can_activate=True,
    )
    return _changed(migration, changes)


def make_running(**changes: Any) -> Running:
    """A QEMU that runs, with a pidfile and a socket of ours to hand over."""
    forth, back = exchange("/store/vm/control.sock")
    running = Running(
        was_running=True,
        endpoints=(("pidfile /vm/pid", "written"),),
        forth=(*forth, WritePid("new", "/vm/pid")),
        back=(WritePid("old", "/vm/pid"), *back),
        unshared=(),
        jobs=(),
        can_let_go=True,
        migration=make_migration(),
    )
    return _changed(running, changes)


def make_host(**changes: Any) -> HostFacts:
    """A host with room, and a QEMU that may protect its memory, 1 GiB on huge pages."""
    host = HostFacts(
        write_tracking=True,
        may_unprotect=True,
        store_free_bytes=100 * GIB,
        resident_bytes=GIB,
        huge_bytes=GIB,
    )
    return _changed(host, changes)


def make_agent(**changes: Any) -> AgentFacts:
    """An agent that answers and does all that is asked of it."""
    verbs = ("freeze", "status", "thaw")
    commands = tuple(f"guest-fsfreeze-{verb}" for verb in verbs)
    return _changed(AgentFacts("/vm/agent.sock", version="10.0.0", commands=commands), changes)


def make_facts(disks: Iterable[DiskFacts] | None = None, **changes: Any) -> Facts:
    """A running VM of one disk that nothing is in the way of."""
    facts = Facts(
        version=(10, 0, 0),
        run_state="running",
        topology=make_topology(),
        disks=(make_disk(),) if disks is None else tuple(disks),
        read_only=(),
        strays=(),
        block_jobs=(),
        bitmaps=(),
        memory_backends=(),
        migration=make_migration(),
        host=make_host(),
        graph_digest="graph",
    )
    return _changed(facts, changes)


def make_part(
    index: int = 0, kind: StorageKind = "external", snapshot: str = SNAPSHOT, **changes: Any
) -> StoragePart:
    """The storage snapshot of a disk that stood on the image its command line names."""
    image = Image(disk_path(index), "qcow2")
    part = StoragePart(
        index=index,
        disk=f"disk{index}",
        qdev=f"/machine/peripheral/d{index}/virtio-backend",
        kind=kind,
        reason="default",
        origin=image,
        image=None if kind == "skip" else image,
        layers=(make_layer(image.path, 100 + index),) if kind == "external" else (),
        virtual_size_bytes=10 * GIB,
        internal_id="1" if kind == "internal" else "",
        internal_name=names.internal_name(snapshot) if kind == "internal" else "",
        internal_digest=f"entry {index}" if kind == "internal" else "",
    )
    return _changed(part, changes)


def make_state(**changes: Any) -> MachineStatePart:
    """A machine state of 1 MiB."""
    identity = make_identity(900, format="raw", size_bytes=1 << 20, virtual_size_bytes=1 << 20)
    return _changed(MachineStatePart("machine-state", identity, "digest"), changes)


def make_manifest(storage: Iterable[StoragePart] | None = None, **changes: Any) -> Manifest:
    """A live snapshot of one disk."""
    manifest = Manifest(
        id=SNAPSHOT,
        tag="",
        description="",
        parent=None,
        vm_id=VM_ID,
        vm_name="web",
        instant="2025-01-02T03:04:05.000006+00:00",
        method="live",
        run_state="running",
        machine_state=make_state(),
        storage=(make_part(),) if storage is None else tuple(storage),
        read_only=(),
        topology=make_topology(),
        definition=DEFINITION,
        argv=("qemu-system-x86_64", "-m", "1G"),
        cwd="/vm",
        qemu_version=(10, 0, 0),
        timings=Timings(12.5, 1500.0, {"PassInstant": 20.0, "AwaitSave": 1400.0}),
    )
    return _changed(manifest, changes)


def make_found(manifest: Manifest, record: VmRecord, **changes: Any) -> Found:
    """What a preflight finds where nothing has changed since the snapshot was taken."""
    state = manifest.machine_state
    found = Found(
        definition=manifest.definition,
        identities={
            layer.path: layer.identity for part in manifest.storage for layer in part.layers
        },
        internal={
            (part.image.path, part.internal_name): part.internal_digest
            for part in manifest.storage
            if part.kind == "internal" and part.image
        },
        state=state.identity if state else None,
        modes={disk.active.path: 0o640 for disk in record.disks},
        kept_paths=frozenset(layer.path for part in manifest.storage for layer in part.layers),
    )
    return _changed(found, changes)


def make_outcome(**changes: Any) -> Outcome:
    """What came out of a live snapshot of one disk."""
    outcome = Outcome(
        instant="2025-01-02T03:04:05.000006+00:00",
        stop_us=1_000_000,
        resume_us=1_012_500,
        machine_state=make_state(),
        chains={0: (make_layer(disk_path(0), 100),)},
        internal={},
        total_ms=1500.0,
        phases_ms={"PassInstant": 20.0},
    )
    return _changed(outcome, changes)


def make_began(**changes: Any) -> Began:
    """A take of three steps begins."""
    began = Began(
        operation="take",
        id=SNAPSHOT,
        snapshot=SNAPSHOT,
        at="2025-01-02T03:04:05+00:00",
        owner=Process(41, 4100),
        qemu=Process(42, 4200),
        record=make_record(),
        steps=(MakeSnapshotFolder(SNAPSHOT), AwaitSave(SNAPSHOT, 1 << 20), Commit(SNAPSHOT)),
    )
    return _changed(began, changes)

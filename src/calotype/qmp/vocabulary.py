"""The types that our QMP commands and events speak in: enums, places, and what they tell.

Notation and rules are those of `schema.py`. The words are those of the whole project: a *machine
state* is RAM and devices of one instant, a *storage snapshot* the content of one disk, a *tag* what
a person gave, an *id* what we did; neither is ever looked up as the other.
"""

from typing import Annotated, Literal

from calotype.model.snapshot import Method, StorageKind
from calotype.model.vm import RunState
from calotype.qmp.schema import Branches, Choices, Doc, QmpStruct

# --- what is asked for ----------------------------------------------------------------------------

SnapshotConflictPolicy = Annotated[
    Literal["fail", "replace"],
    Choices(
        "SnapshotConflictPolicy",
        "What becomes of a snapshot that has the tag already.",
        {
            "fail": "Nothing: the command is refused, and says which snapshot has it.",
            "replace": "It is deleted as soon as the new one is complete, and not before.",
        },
    ),
]

StorageSnapshotKind = Annotated[
    StorageKind,
    Choices(
        "StorageSnapshotKind",
        "How one disk is snapshotted.",
        {
            "external": "Its image is frozen, and the guest writes to a new overlay over it.",
            "internal": "A snapshot inside its qcow2 image.",
            "skip": "It is not; its content of that instant is lost with the next write.",
        },
    ),
]

SaveMethod = Annotated[
    Literal["auto", "live", "paused"],
    Choices(
        "SaveMethod",
        "What the guest does while its machine state is saved.",
        {
            "auto": "Runs where the destination allows it.",
            "live": "Runs; it stands still for the instant alone.",
            "paused": "Stands still until all of it is saved.",
        },
    ),
]

MachineStateType = Annotated[
    Literal["none", "internal", "image", "external"],
    Choices(
        "MachineStateType",
        "The kind of place that a machine state goes to.",
        {
            "none": "Nowhere: RAM and devices are not saved.",
            "internal": "A qcow2 node that QEMU holds.",
            "image": "A qcow2 image that QEMU does not hold.",
            "external": "A file in the store.",
        },
    ),
]


class MachineStateNone(QmpStruct, frozen=True, kw_only=True, tag_field="type", tag="none"):
    """No machine state: the snapshot holds storage alone, and a restore of it boots the guest."""


class MachineStateInternal(QmpStruct, frozen=True, kw_only=True, tag_field="type", tag="internal"):
    """The vmstate area of a qcow2 node that QEMU holds.

    The guest stands still while it is saved, and QEMU's monitor answers nothing. A node that is a
    disk of the guest gets an internal storage snapshot by that.
    """

    node_name: Annotated[
        str, Doc("The node: a label of a disk, or the name of a node that is no disk.")
    ]


class MachineStateImage(QmpStruct, frozen=True, kw_only=True, tag_field="type", tag="image"):
    """The vmstate area of a qcow2 image that QEMU does not hold; the guest runs meanwhile."""

    filename: Annotated[str, Doc("The image; it is made if nothing is there.")]


class MachineStateExternal(QmpStruct, frozen=True, kw_only=True, tag_field="type", tag="external"):
    """A file of its own in the store; the guest runs while it is written."""


MachineStateDestination = Annotated[
    MachineStateNone | MachineStateInternal | MachineStateImage | MachineStateExternal,
    Branches(
        "MachineStateDestination",
        "Where a machine state goes. It is always said: no device is ever picked for the caller.",
        MachineStateType,
        "The kind of place; it says which members follow.",
    ),
]


class StorageSnapshotSpec(QmpStruct, frozen=True, kw_only=True):
    """What one disk gets."""

    node_name: Annotated[
        str, Doc("Any label of the disk: its node name, the id of its device or its QOM path.")
    ]
    kind: Annotated[StorageSnapshotKind, Doc("How it is snapshotted.")]


RestoredRunState = Annotated[
    Literal["saved", "running", "paused"],
    Choices(
        "RestoredRunState",
        "What the guest does after a load.",
        {
            "saved": "What it did at the instant of the snapshot.",
            "running": "It runs.",
            "paused": "It stands still, until `cont`.",
        },
    ),
]

# --- what is told ---------------------------------------------------------------------------------

SnapshotMethod = Annotated[
    Method,
    Choices(
        "SnapshotMethod",
        "How a snapshot is, or was, taken.",
        {
            "live": "The guest runs while its machine state is saved.",
            "paused": "The guest stands still while its machine state is saved.",
            "storage-only": "No machine state is saved, and the guest is not stopped.",
            "left-behind": "Nobody asked for it: a load kept what it took the VM from.",
        },
    ),
]

SnapshotRunState = Annotated[
    RunState,
    Choices(
        "SnapshotRunState",
        "What a VM did at an instant.",
        {
            "running": "Its guest ran.",
            "paused": "Its guest stood still.",
            "off": "There was no QEMU.",
        },
    ),
]


class DiskPlan(QmpStruct, frozen=True, kw_only=True):
    """What one disk would get, and why."""

    disk: Annotated[str, Doc("The disk's name in the VM's definition.")]
    kind: Annotated[StorageSnapshotKind, Doc("How it would be snapshotted.")]
    reason: Annotated[str, Doc("Why so: it was asked for, or what stands behind the default.")]
    overlay: Annotated[
        str | None, Doc("The path of the overlay that would be made; with `external` alone.")
    ] = None
    pause_ms: Annotated[float, Doc("Its share of the estimated pause, in milliseconds.")]


class SnapshotBlocker(QmpStruct, frozen=True, kw_only=True):
    """Something in the way of a snapshot."""

    problem: Annotated[str, Doc("What is in the way.")]
    remedy: Annotated[str, Doc("What to do about it.")]


class SystemSnapshotPlan(QmpStruct, frozen=True, kw_only=True):
    """All that a save would do."""

    id: Annotated[
        str | None, Doc("The id that the paths of the plan are named by; a save gets another.")
    ] = None
    machine_state: Annotated[MachineStateDestination, Doc("Where the machine state would go.")]
    method: Annotated[SnapshotMethod, Doc("How it would be taken; `auto` is decided here.")]
    method_reason: Annotated[str, Doc("Why so.")]
    disks: Annotated[
        tuple[DiskPlan, ...], Doc("Each disk; those that are not snapshotted say why.")
    ]
    pause_ms: Annotated[float, Doc("The estimate of how long the guest stands still, in ms.")]
    bytes: Annotated[int, Doc("The estimate of what is written, in bytes.")]
    blockers: Annotated[
        tuple[SnapshotBlocker, ...], Doc("What is in the way; while there is any, a save fails.")
    ]
    warnings: Annotated[tuple[str, ...], Doc("What is not in the way, but should be known.")]


class MachineStateInfo(QmpStruct, frozen=True, kw_only=True):
    """Where the machine state of a snapshot is."""

    type: Annotated[MachineStateType, Doc("The kind of place; never `none`.")]
    file: Annotated[str | None, Doc("The path of the file or image that holds it.")] = None
    node_name: Annotated[
        str | None, Doc("The node that was named when it was saved; with `internal` alone.")
    ] = None
    bytes: Annotated[int | None, Doc("Its size in bytes, where that is known.")] = None


class StorageSnapshotInfo(QmpStruct, frozen=True, kw_only=True):
    """What a snapshot has of one disk."""

    disk: Annotated[str, Doc("The disk's name in the VM's definition.")]
    kind: Annotated[StorageSnapshotKind, Doc("How it was snapshotted.")]
    image: Annotated[
        str | None, Doc("The path of the image that holds the content; not with `skip`.")
    ] = None


class SystemSnapshotInfo(QmpStruct, frozen=True, kw_only=True):
    """A system snapshot: a machine state, or none, and storage snapshots, all of one instant."""

    id: Annotated[str, Doc("What the system calls it: unique, stable, never used again.")]
    tag: Annotated[str, Doc("What a person calls it; empty where nobody said.")]
    description: Annotated[str, Doc("Free text; empty where nobody said.")]
    instant: Annotated[str, Doc("When that was, in UTC, as ISO 8601 has it.")]
    parent: Annotated[
        str | None, Doc("The id of the snapshot that the VM had been put back to, or was taken of.")
    ] = None
    run_state: Annotated[
        SnapshotRunState | None, Doc("What the VM did then; absent where nobody recorded it.")
    ] = None
    method: Annotated[SnapshotMethod, Doc("How it was taken.")]
    machine_state: Annotated[
        MachineStateInfo | None, Doc("Where the machine state is; absent where there is none.")
    ] = None
    storage: Annotated[tuple[StorageSnapshotInfo, ...], Doc("Each writable disk of that instant.")]
    is_foreign: Annotated[
        bool, Doc("Whether it was made by others: `savevm`, `snapshot-save`, `qemu-img snapshot`.")
    ]
    is_whole: Annotated[
        bool, Doc("Whether it has a machine state and, of the same instant, each writable disk.")
    ]

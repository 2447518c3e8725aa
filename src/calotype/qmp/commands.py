"""Our QMP commands, actions of `transaction`, and events: the one definition of each.

What is here is what the service checks, what it answers to `query-qmp-schema`, and what
`docs/qmp.md` says. Examples of all of them are in `examples.py`.

What is known beforehand to be in the way is the command's own error, and there is no job then. What
goes wrong later is the job's error, in `query-jobs` and in SYSTEM_SNAPSHOT_FAILED.
"""

from collections.abc import Mapping
from typing import Annotated

from calotype.qmp.schema import Action, Command, Doc, Event, QmpStruct, Refusal
from calotype.qmp.vocabulary import (
    MachineStateDestination,
    RestoredRunState,
    SaveMethod,
    SnapshotConflictPolicy,
    StorageSnapshotSpec,
    SystemSnapshotInfo,
    SystemSnapshotPlan,
)

_JOB_ID = "The name of the job that does it, which nobody has given to a job that there is."
_TAG, _ID = "The tag of the snapshot; never tried as an id.", "Its whole id; never tried as a tag."

# --- arguments ------------------------------------------------------------------------------------


class SaveOptions(QmpStruct, frozen=True, kw_only=True):
    """What may be said of a snapshot, however it is asked for."""

    description: Annotated[str | None, Doc("Free text that is kept with it.")] = None
    method: Annotated[SaveMethod, Doc("What the guest does meanwhile.")] = "auto"
    pause_limit_ms: Annotated[
        float,
        Doc("If the guest stood still for longer, all is undone; milliseconds, at least 1."),
    ] = 2000.0
    on_conflict: Annotated[
        SnapshotConflictPolicy, Doc("What becomes of a snapshot that has the tag already.")
    ] = "fail"


class SystemSnapshotRequest(SaveOptions, frozen=True, kw_only=True):
    """What a system snapshot is to be."""

    tag: Annotated[str | None, Doc("A person's name for it; at most 1024 characters.")] = None
    machine_state: Annotated[MachineStateDestination, Doc("Where the machine state goes.")]
    storage: Annotated[
        tuple[StorageSnapshotSpec, ...],
        Doc("What disks get. Those that are not listed get an external overlay."),
    ] = ()


class SaveArguments(SystemSnapshotRequest, frozen=True, kw_only=True):
    """Save a system snapshot of the VM, as a job: all parts of one instant, or nothing.

    The job can be cancelled until the snapshot is committed; then, and when it fails, all that was
    begun is undone, and the guest runs on if it ran.
    """

    job_id: Annotated[str, Doc(_JOB_ID)]


class PlanArguments(SystemSnapshotRequest, frozen=True, kw_only=True):
    """Say what `system-snapshot-save` would do, and what is in the way; nothing is changed."""


class LoadArguments(QmpStruct, frozen=True, kw_only=True):
    """Put the VM back to a system snapshot, as a job.

    All that could differ is compared first, the new state is prepared beside the VM that runs, and
    only then it is switched to. A failure leaves the VM as it was. Exactly one of `tag` and `id`.
    """

    exactly_one = ("tag", "id")

    job_id: Annotated[str, Doc(_JOB_ID)]
    tag: Annotated[str | None, Doc(_TAG)] = None
    id: Annotated[str | None, Doc(_ID)] = None
    run_state: Annotated[RestoredRunState, Doc("What the guest does afterwards.")] = "saved"
    keep_current: Annotated[
        bool, Doc("Whether the state that the VM is taken from is kept, as a snapshot too.")
    ] = False


class DeleteArguments(QmpStruct, frozen=True, kw_only=True):
    """Delete a system snapshot, as a job; those that stand on it stay whole.

    The job cannot be cancelled: nothing of a delete is ever undone.

    Exactly one of `tag` and `id`.
    """

    exactly_one = ("tag", "id")

    job_id: Annotated[str, Doc(_JOB_ID)]
    tag: Annotated[str | None, Doc(_TAG)] = None
    id: Annotated[str | None, Doc(_ID)] = None


class QueryArguments(QmpStruct, frozen=True, kw_only=True):
    """List the system snapshots of the VM, those made by others included.

    With `tag` and `id`, those that have both; that there are none is no error.
    """

    tag: Annotated[str | None, Doc("List those alone that have this tag.")] = None
    id: Annotated[str | None, Doc("List that alone which has this id.")] = None


class MachineStateSave(SaveOptions, frozen=True, kw_only=True):
    """Save the machine state of the instant at which the transaction's other actions happen.

    All actions happen at that instant, or none does. The transaction is answered when they have
    happened; the machine state is then written by a job, while the guest runs if it is saved live.
    """

    job_id: Annotated[str, Doc(_JOB_ID)]
    tag: Annotated[str, Doc("A person's name for the snapshot; at most 1024 characters.")]
    destination: Annotated[MachineStateDestination, Doc("Where the machine state goes.")]


# --- commands and actions -------------------------------------------------------------------------

_BAD_REQUEST = (
    Refusal(
        "`tag` or `description` is too long, no text, or holds control characters", "shorten it"
    ),
    Refusal("`pause-limit-ms` is less than 1 or no finite number", "raise it"),
    Refusal("`storage` names a disk that there is not, or one twice", "see `query-block`"),
    Refusal("`method` is `live` and the machine state goes to a node", "name an image, or `auto`"),
)
_JOB_EXISTS = Refusal("there is a job of the name `job-id`", "`job-dismiss` it, or name another")
_BUSY = Refusal(
    "the VM is being changed by another job or command of Calotype", "wait until it has concluded"
)
_SAVING = (
    *_BAD_REQUEST,
    _JOB_EXISTS,
    _BUSY,
    Refusal("another snapshot has the tag, and `on-conflict` is `fail`", "`replace`, or another"),
    Refusal(
        "something is in the way of the snapshot; the first blocker is told",
        "`system-snapshot-plan` lists all of them, each with what to do",
    ),
)
_SELECTING = (
    Refusal("no snapshot has the tag, or the id", "see `query-system-snapshots`"),
    Refusal("more than one snapshot has the tag; their ids are told", "name one by `id`"),
    _JOB_EXISTS,
    _BUSY,
)
_NOTHING = "Nothing: the job was begun."

_COMMANDS = (
    Command("system-snapshot-save", SaveArguments, None, _NOTHING, _SAVING),
    Command(
        "system-snapshot-plan",
        PlanArguments,
        SystemSnapshotPlan,
        "What a save would do. What is in the way is part of it, and no error.",
        _BAD_REQUEST,
    ),
    Command(
        "system-snapshot-load",
        LoadArguments,
        None,
        _NOTHING,
        (
            *_SELECTING,
            Refusal(
                "storage is missing, extra, swapped, resized or altered, or the machine is another",
                "put back what is named",
            ),
            Refusal("no second QEMU can take the place of the one that runs", "as the error says"),
        ),
    ),
    Command(
        "system-snapshot-delete",
        DeleteArguments,
        None,
        _NOTHING,
        (*_SELECTING, Refusal("the snapshot is protected", "`calotype unprotect`")),
    ),
    Command(
        "query-system-snapshots",
        QueryArguments,
        tuple[SystemSnapshotInfo, ...],
        "The snapshots, oldest first.",
        (),
    ),
)
COMMANDS: Mapping[str, Command] = {each.name: each for each in _COMMANDS}
"""The commands that the service answers itself, by name."""

_ACTIONS = (Action("machine-state-save", MachineStateSave, _SAVING),)
ACTIONS: Mapping[str, Action] = {each.name: each for each in _ACTIONS}
"""The actions that the service takes out of a `transaction`, by name."""

UNSERVED: Mapping[str, str] = {
    "internal": "the destination is refused: use `external`",
    "image": "the destination is refused: use `external`",
    "replace": "the policy is refused: delete the old snapshot, or name another tag",
    "is-foreign": "snapshots that others made are not listed: `qemu-img snapshot -l` lists them",
}
"""What is declared and not served yet: its name, and what the service does instead."""

JOB_TYPES: Mapping[str, str] = {
    "system-snapshot-save": "A snapshot is being saved.",
    "system-snapshot-load": "The VM is being put back to a snapshot.",
    "system-snapshot-delete": "A snapshot is being deleted.",
}
"""The types of our jobs in `query-jobs`, and what each means."""

# --- events ---------------------------------------------------------------------------------------


class SystemSnapshotDone(QmpStruct, frozen=True, kw_only=True):
    """A job that has succeeded."""

    job_id: Annotated[str, Doc("The job.")]
    id: Annotated[str, Doc("The id of the snapshot.")]
    tag: Annotated[str, Doc("Its tag; empty where it has none.")]
    pause_ms: Annotated[
        float | None,
        Doc("For how long the guest stood still, in ms; absent where it did not, or did not run."),
    ] = None


class SystemSnapshotFailed(QmpStruct, frozen=True, kw_only=True):
    """A job that has failed or was cancelled."""

    job_id: Annotated[str, Doc("The job.")]
    id: Annotated[
        str | None, Doc("The id of the snapshot; absent of one that was being saved.")
    ] = None
    tag: Annotated[str | None, Doc("Its tag, if it has one.")] = None
    reason: Annotated[str, Doc("What went wrong, and what to do, in one line.")]
    undone: Annotated[
        bool, Doc("Whether all that was begun is undone; if not, `calotype recover` does it.")
    ]


_EVENTS = (
    Event(
        "SYSTEM_SNAPSHOT_SAVED",
        SystemSnapshotDone,
        "A snapshot is committed: from now on it exists, whatever happens.",
    ),
    Event(
        "SYSTEM_SNAPSHOT_LOADED",
        SystemSnapshotDone,
        "The VM is what it was at the snapshot; its guest runs, if it is to.",
    ),
    Event(
        "SYSTEM_SNAPSHOT_DELETED", SystemSnapshotDone, "A snapshot is gone, and its space freed."
    ),
    Event(
        "SYSTEM_SNAPSHOT_FAILED",
        SystemSnapshotFailed,
        "A job has failed, or was cancelled; it is sent once nothing more is being undone.",
    ),
)
EVENTS: Mapping[str, Event] = {each.name: each for each in _EVENTS}
"""The events that the service sends beside QEMU's own, by name."""

"""The steps of an operation, as data: one frozen value for each kind of effect.

A step names everything up front (paths, node names, fd sets, job ids), so that undoing it needs
nothing that doing it returned, and so that a plan can be printed, compared and kept. What each one
does, and what undoes it, stands in `engine/effects.py`, one entry for each class here.

`AnyStep` at the end lists them all: it is how a journal reads them back.
"""

from typing import Any

from msgspec import Struct

from calotype.model.acts import Act
from calotype.model.vm import DiskRecord, Image, RunState, Topology, VmRecord
from calotype.plan.window import WindowMethod


class Step(Struct, frozen=True, tag=True):
    """One effect on the world, with its inverse."""


class MakeSnapshotFolder(Step, frozen=True):
    """Make the folder for a snapshot's own files; without a manifest in it, it is none."""

    snapshot: str


class CreateOverlay(Step, frozen=True):
    """Create an empty qcow2 over *backing*, on a path that never existed before."""

    overlay: str
    backing: Image
    size_bytes: int


class OpenOverlay(Step, frozen=True):
    """Open an overlay as a node of the running QEMU, not yet attached to anything."""

    node: str
    overlay: str
    cache_direct: bool
    cache_no_flush: bool
    detect_zeroes: str


class OpenState(Step, frozen=True):
    """Create the machine state's file, for its owner alone, and hand it to QEMU, opened.

    QEMU is given a descriptor and not a path: it may run as another user, and the store's path
    may hold what QEMU's URIs give a meaning to.
    """

    snapshot: str
    fdset: int
    """The number of the fd set; 0 where QEMU takes it by name (`getfd`)."""


class SetMigration(Step, frozen=True):
    """Set migration capabilities and parameters; both the old and the new values are named."""

    capabilities: dict[str, bool]
    capabilities_before: dict[str, bool]
    parameters: dict[str, int | str | bool]
    parameters_before: dict[str, int | str | bool]


class PutBackMigration(Step, frozen=True):
    """Put migration capabilities and parameters back as they were, the save being over."""

    capabilities: dict[str, bool]
    parameters: dict[str, int | str | bool]


class FlushImages(Step, frozen=True):
    """Write the images' dirty pages to disk while the guest runs, or `stop` would in the pause."""

    paths: tuple[str, ...]


class FreezeFileSystems(Step, frozen=True):
    """Have the agent in the guest freeze its file systems: nothing is written to them then."""

    socket: str
    """The path of the socket that leads to the agent."""
    limit_ms: float
    """After how long they are thawed, whatever has become of us."""


class ThawFileSystems(Step, frozen=True):
    """Have the agent thaw them again; that they had stayed frozen so far is required."""

    socket: str


class SwitchToOverlay(Struct, frozen=True, tag=True):
    """Put an open overlay node over the disk's node: external."""

    node: str
    overlay_node: str
    overlay: str
    base: Image
    base_mode: int
    """The base's permission bits, for when it is written again."""
    merge_job: str


class SnapshotInside(Struct, frozen=True, tag=True):
    """Make a snapshot inside the disk's own image: internal."""

    node: str
    name: str
    image: Image


class Verbatim(Struct, frozen=True, tag=True):
    """Carry out an action that a caller gave, as it was given."""

    action: dict[str, Any]
    take_back: tuple[str, dict[str, Any]] | None
    """The command that takes it back; None where there is none."""


StorageAction = SwitchToOverlay | SnapshotInside | Verbatim
"""What happens to one disk inside the window, or beside the disks."""


class PassInstant(Step, frozen=True):
    """The paused window: all of it one step, for nobody can undo half of an instant."""

    method: WindowMethod
    was_running: bool
    fdset: int
    actions: tuple[StorageAction, ...]
    limit_ms: float
    graph_digest: str
    agent: str = ""
    """The socket of the agent that has frozen the guest's file systems; "" where none has."""
    properties: dict[str, Any] = {}
    """Of the transaction (qapi/transaction.json, TransactionProperties)."""


class RecordAhead(Step, frozen=True):
    """Record the overlays as the newest images before the guest is switched to them.

    An empty overlay is as good as what it stands on: at every moment the record is right.
    """

    active: dict[int, Image]
    active_before: dict[int, Image]
    parent: str | None
    parent_before: str | None


class AwaitSave(Step, frozen=True):
    """Wait until the machine state is written; the guest runs."""

    snapshot: str
    expected_bytes: int


class CloseState(Step, frozen=True):
    """Take the state's file back from QEMU and make it durable."""

    snapshot: str
    fdset: int


class FreezeImages(Step, frozen=True):
    """Make images read-only and, where possible, immutable: they are a snapshot's content now."""

    modes_before: dict[str, int]
    """Path -> permission bits."""


class Commit(Step, frozen=True):
    """Write the manifest; its rename is the moment from which the snapshot exists."""

    snapshot: str


# --- abandoning an instant -----------------------------------------------------------------------


class EndPause(Step, frozen=True):
    """Cancel the save and, if it ran before, let the guest run; then wait until that is done."""

    let_run: bool
    unprotect: bool = False
    """QEMU may leave the guest's memory protected when a save ends: take that off it."""


class MergeBack(Step, frozen=True):
    """Merge an overlay that the guest is on into its base, which takes its place; it runs on."""

    overlay: str
    base: Image
    base_mode: int
    job: str


class MergeBackOffline(Step, frozen=True):
    """Merge what an overlay holds into its base, with no QEMU on either."""

    overlay: str
    base: Image
    base_mode: int


class TakeBack(Step, frozen=True):
    """Give QEMU the command that takes back what an action of the transaction did."""

    command: str
    arguments: dict[str, Any]


class DeleteMade(Step, frozen=True):
    """Delete an internal snapshot of ours from an image, if it was made at all."""

    image: Image
    name: str


# --- restore and start ---------------------------------------------------------------------------


class ApplyInside(Step, frozen=True):
    """Go back to an internal snapshot, keeping the present content as another one."""

    image: Image
    internal_name: str
    keep_as: str
    """The name under which the present content is kept inside the image."""


class ExtractInside(Step, frozen=True):
    """Copy an internal snapshot out of an image that must not change, into one of its own."""

    image: Image
    internal_name: str
    copy: str


class StartQemu(Step, frozen=True):
    """Start QEMU on *active* images: stopped, and waiting for a machine state or not."""

    active: dict[int, Image]
    incoming: bool
    machine: str
    """The versioned machine type to insist on; "" takes the command line's own."""
    beside: bool = False
    """Whether another QEMU runs the VM, whose place it is to take later."""
    sockets: tuple[str, ...] = ()
    """The files that it listens on meanwhile, beside those of the other."""


class CheckTopology(Step, frozen=True):
    """Compare the machine that QEMU built with the one the snapshot was taken of."""

    expected: Topology


class LoadState(Step, frozen=True):
    """Feed a snapshot's machine state to a QEMU that waits for it."""

    snapshot: str
    file: str


class Define(Step, frozen=True):
    """Keep a VM's new definition in place of the one before."""

    record: VmRecord
    before: VmRecord | None


class RecordStarted(Step, frozen=True):
    """Record the names of the disks and the machine, as the QEMU that was started shows them."""

    disks_before: tuple[DiskRecord, ...]
    topology_before: Topology | None


class HandOver(Step, frozen=True):
    """Let a VM go over from the QEMU that runs it to another, prepared on other images.

    The guest of the old one stands still; what only one can have is handed over, the record names
    the new images, and the guest of the new one runs. One step, as every pause is.
    """

    active: dict[int, Image]
    active_before: dict[int, Image]
    parent: str | None
    parent_before: str | None
    forth: tuple[Act, ...]
    back: tuple[Act, ...]
    was_running: bool
    let_run: bool


class SaveLeftBehind(Step, frozen=True):
    """Save the machine state of the old QEMU, whose guest stands still for good."""

    snapshot: str
    capabilities: dict[str, bool]
    parameters: dict[str, int | str | bool]


class EndOld(Step, frozen=True):
    """End the old QEMU, and remove the second names of its sockets."""

    names: tuple[str, ...]


class CommitLeftBehind(Step, frozen=True):
    """Write the manifest of what a restore leaves behind: disks, and a machine state if saved."""

    snapshot: str
    restored: str
    """The snapshot that was gone back to."""
    active: dict[int, Image]
    """Which image each disk goes on with."""
    active_before: dict[int, Image]
    """Which image each was on."""
    parent_before: str | None
    run_state: RunState
    """Where the machine state was saved: what its guest was before it was stopped for good."""


class RecordRestored(Step, frozen=True):
    """Record which images hold the newest content, and which snapshot they descend from."""

    active: dict[int, Image]
    active_before: dict[int, Image]
    parent: str | None
    parent_before: str | None


class LetRun(Step, frozen=True):
    """Let the guest run."""


class SetClock(Step, frozen=True):
    """Have the agent in the guest set its clock; one that cannot is told of, and is no failure."""

    socket: str


class DiscardImages(Step, frozen=True):
    """Remove overlays of ours that nothing needs any more; after the commit, never undone."""

    paths: tuple[str, ...]
    inside: tuple[tuple[Image, str], ...]
    """Internal snapshots to delete, by the image that holds each and its name."""


# --- of a delete: each is right to do again, and none is undone ----------------------------------


class DropSnapshot(Step, frozen=True):
    """Remove a snapshot's manifest: from then on it does not exist, and the rest is finished."""

    snapshot: str


class RemoveSnapshotFiles(Step, frozen=True):
    """Remove what a snapshot that exists no more kept in its folder."""

    snapshot: str


class MergeDown(Step, frozen=True):
    """Put the content of *top* into *base*, and whatever stands on *top* onto *base*."""

    disk: int
    """The index of the disk; -1 where the VM has it no longer."""
    top: Image
    base: Image
    children: tuple[Image, ...]
    active: str
    """The image that holds the disk's newest content afterwards: all others are frozen."""
    job: str
    was_running: bool
    """Whether the guest runs, and so is let run again if we end in the moment of the switch."""


class MergeUp(Step, frozen=True):
    """Put *children* onto another image, each keeping by itself the content that it would lose."""

    children: tuple[Image, ...]
    onto: Image | None
    active: str
    """The image that holds the disk's newest content: all others are frozen."""


class DeleteInside(Step, frozen=True):
    """Delete an internal snapshot, the one with this id, from an image that stays."""

    image: Image
    internal_id: str
    internal_name: str
    active: str
    """The image that holds the disk's newest content: all others are frozen."""


class Retarget(Step, frozen=True):
    """Write a kept manifest anew: which images its parts are in, and who those are now."""

    snapshot: str
    images: dict[str, Image]
    """Path of an image that was merged away -> where its content is."""
    changed: tuple[str, ...]
    """Images that the delete writes to: these alone are looked at anew, others stay as recorded."""
    parent: str | None


class RecordMerged(Step, frozen=True):
    """Record where the newest content is; a disk that is not on its image from before stays."""

    active: dict[int, Image]
    active_before: dict[int, Image]
    parent: str | None


class RemoveImage(Step, frozen=True):
    """Remove an image of ours that nothing stands on and nobody needs."""

    path: str


class TakePath(Step, frozen=True):
    """Put *copy* at the path *origin* as well, in place of what is there."""

    copy: str
    origin: str


AnyStep = (
    MakeSnapshotFolder
    | CreateOverlay
    | OpenOverlay
    | OpenState
    | SetMigration
    | PutBackMigration
    | FlushImages
    | FreezeFileSystems
    | PassInstant
    | ThawFileSystems
    | RecordAhead
    | AwaitSave
    | CloseState
    | FreezeImages
    | Commit
    | EndPause
    | MergeBack
    | MergeBackOffline
    | TakeBack
    | DeleteMade
    | ApplyInside
    | ExtractInside
    | StartQemu
    | CheckTopology
    | LoadState
    | Define
    | RecordStarted
    | HandOver
    | SaveLeftBehind
    | EndOld
    | CommitLeftBehind
    | RecordRestored
    | LetRun
    | SetClock
    | DiscardImages
    | DropSnapshot
    | RemoveSnapshotFiles
    | MergeDown
    | MergeUp
    | DeleteInside
    | Retarget
    | RecordMerged
    | RemoveImage
    | TakePath
)


def qmp_action(action: StorageAction) -> dict[str, Any]:
    """An action as QEMU's `transaction` takes it (qapi/transaction.json)."""
    match action:
        case SwitchToOverlay():
            data = {"node": action.node, "overlay": action.overlay_node}
            return {"type": "blockdev-snapshot", "data": data}
        case SnapshotInside():
            data = {"device": action.node, "name": action.name}
            return {"type": "blockdev-snapshot-internal-sync", "data": data}
        case Verbatim():
            return action.action

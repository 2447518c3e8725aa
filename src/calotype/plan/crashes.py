"""What a crash after each step leaves, and what brings it to an end: the docs' table as data.

`scripts/draw-crashes` prints it for each operation. A kind of step without a row here fails a test:
who adds a step has to say what is left if everything stops right after it.
"""

from collections.abc import Mapping
from typing import NamedTuple

from calotype.plan.steps import (
    ApplyInside,
    AwaitSave,
    CheckTopology,
    CloseState,
    Commit,
    CommitLeftBehind,
    CreateOverlay,
    Define,
    DeleteInside,
    DeleteMade,
    DiscardImages,
    DropSnapshot,
    EndOld,
    EndPause,
    ExtractInside,
    FlushImages,
    FreezeFileSystems,
    FreezeImages,
    HandOver,
    LetRun,
    LoadState,
    MakeSnapshotFolder,
    MergeBack,
    MergeBackOffline,
    MergeDown,
    MergeUp,
    OpenOverlay,
    OpenState,
    PassInstant,
    PutBackMigration,
    RecordAhead,
    RecordMerged,
    RecordRestored,
    RecordStarted,
    RemoveImage,
    RemoveSnapshotFiles,
    Retarget,
    SaveLeftBehind,
    SetClock,
    SetMigration,
    StartQemu,
    Step,
    TakeBack,
    TakePath,
    ThawFileSystems,
)


class Crash(NamedTuple):
    """A crash right after a step."""

    leaves: str
    """What is there that was not, or is not that was."""
    recover: str
    """What `recover` does about it."""


_NOTHING = Crash("nothing of its own", "nothing")

CRASHES: Mapping[type[Step], Crash] = {
    MakeSnapshotFolder: Crash("an empty folder in the store", "removes it"),
    CreateOverlay: Crash("an overlay file that nobody uses", "removes it"),
    OpenOverlay: Crash("a node in QEMU that nothing stands on", "closes it"),
    RecordAhead: Crash(
        "a record that names empty overlays, which are as good as what they stand on",
        "records the images from before",
    ),
    OpenState: Crash("a state file, and an fd set in QEMU", "removes both"),
    SetMigration: Crash("migration settings of ours", "puts them back, in the same QEMU"),
    FlushImages: _NOTHING,
    PassInstant: Crash(
        "a guest that the guard lets run if the pause was cut off; a save under way; disks on"
        " their overlays; internal snapshots",
        "lets the guest run, cancels the save, merges each overlay back (the guest running on; by"
        " qemu-img where QEMU died), deletes the internal snapshots",
    ),
    FreezeFileSystems: Crash(
        "file systems of the guest that are frozen until the guard has the agent thaw them",
        "has the agent thaw them, in the same QEMU",
    ),
    ThawFileSystems: _NOTHING,
    AwaitSave: Crash("a complete state file", "empties it, and undoes the instant as above"),
    PutBackMigration: _NOTHING,
    CloseState: _NOTHING,
    FreezeImages: Crash("images that are read-only and immutable", "puts mode and flag back"),
    Commit: Crash("a snapshot: it exists from the rename of its manifest on", "ends the journal"),
    EndPause: Crash("a guest that runs, and no save", "is done"),
    MergeBack: Crash("a disk on its base again; perhaps a job that concluded", "dismisses the job"),
    MergeBackOffline: Crash("an overlay whose content is in its base too", "removes it"),
    TakeBack: Crash("QEMU without what the action made", "is done"),
    DeleteMade: Crash("an image without the internal snapshot", "is done"),
    ApplyInside: Crash(
        "an image gone back to a snapshot inside it, its content from before kept inside as well",
        "goes back to what was kept, mends leaks of a qemu-img that was killed",
    ),
    ExtractInside: Crash("a copy of an internal snapshot", "removes it"),
    Define: Crash("the record of the new definition", "puts back the one from before"),
    StartQemu: Crash("a QEMU whose guest does not run, perhaps not written down", "ends it"),
    RecordStarted: Crash("names of disks and the machine in the record", "puts back the former"),
    CheckTopology: _NOTHING,
    LoadState: Crash("a QEMU with the state loaded, its guest not running", "ends it"),
    HandOver: Crash(
        "a guest that the guard lets run: of the new QEMU if the record names its images, else of"
        " the old one, with what was handed over handed back",
        "goes on if the record names the new images and their QEMU lives (or the old one does not);"
        " else ends the new one, hands back, and lets the old one run",
    ),
    SaveLeftBehind: Crash("a saved state of the old QEMU, which stands still", "saves it again"),
    EndOld: Crash("no old QEMU", "goes on: the new one runs the VM"),
    CommitLeftBehind: Crash("a snapshot of the disks left behind", "removes it"),
    RecordRestored: Crash(
        "a record that names the new images",
        "lets the guest run if QEMU still holds the state (or none was to be started); else puts"
        " back the images from before",
    ),
    LetRun: Crash("a guest that runs", "finishes what is left: it is past the point of no return"),
    SetClock: Crash("a guest whose clock is right, or behind as before", "sets it"),
    DiscardImages: Crash("no images that nothing needs", "ends the journal"),
    DropSnapshot: Crash(
        "a snapshot that exists no more, its files and images still there",
        "runs the delete's steps again from the first; what is done already is left alone",
    ),
    RemoveSnapshotFiles: Crash("images that nobody needs", "goes on with the delete"),
    DeleteInside: Crash("space inside an image that nobody needs", "goes on with the delete"),
    MergeDown: Crash(
        "an image that holds its own content and that of the one above; a guest that the guard lets"
        " run, on the one that the record names",
        "goes on with the delete; a merge that QEMU had begun is seen through",
    ),
    MergeUp: Crash("images that stand on one further below", "goes on with the delete"),
    RecordMerged: Crash("a record without the images that were merged", "goes on with the delete"),
    Retarget: Crash("a manifest that names where its content is now", "goes on with the delete"),
    RemoveImage: Crash("no image that nobody needs", "goes on with the delete"),
    TakePath: Crash(
        "a copy that has the path of the user's image as a second name", "goes on with the delete"
    ),
}

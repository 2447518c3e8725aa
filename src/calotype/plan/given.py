"""The actions of a transaction, as its caller gave them: what each is to the snapshot.

A caller who gives storage actions beside a machine state says what is to happen to each disk, in
QEMU's words (qapi/transaction.json). Three of them make a storage snapshot, and are planned like
those of a take, so that all that holds for a take holds for them: the record names a new overlay
before the guest is switched to it, and a failure later undoes it.

* `blockdev-snapshot`: an overlay that the caller has made and opened. It must be an empty qcow2
  that names the disk's image as what it stands on, or the VM could not be started from it again.
* `blockdev-snapshot-sync`: QEMU would make the overlay in the midst of the pause. It is made
  before, at the same path, and opened under the name that was given: then it is as the first.
* `blockdev-snapshot-internal-sync`: a snapshot inside the image, under the caller's name.

Every other action goes into the transaction as it was given, in its place. What can be taken back
of it when the save fails later is in a table: a bitmap that was added is removed, a job that was
begun is cancelled. Only what cannot have been there before is taken back. A bitmap that was cleared
stays cleared.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from calotype.model.vm import DiskFacts, Facts, LooseNode
from calotype.plan.take_plan import Blocker, GivenDisk, Transaction

OVERLAY, MADE, INSIDE = (
    "blockdev-snapshot",
    "blockdev-snapshot-sync",
    "blockdev-snapshot-internal-sync",
)
_SNAPSHOTS = frozenset({OVERLAY, MADE, INSIDE})


class Given(Struct, frozen=True):
    """What a transaction's actions come to."""

    disks: Mapping[int, GivenDisk]
    """What each disk gets, by its index; those that are missing are left alone."""
    order: tuple[int | Mapping[str, Any], ...]
    """In their order: the index of the disk that an action is about, or the action as it was."""
    accounted: frozenset[str]
    """Nodes that belong to no disk, and that an action names."""
    blockers: tuple[Blocker, ...]


def read_given(facts: Facts, transaction: Transaction) -> Given:
    """Say what each action of a transaction is about.

    Args:
        facts: One look at the VM.
        transaction: The actions, without ours.
    """
    reading = _Reading(facts)
    for action in transaction.actions:
        reading.take(action)
    return Given(
        reading.disks, tuple(reading.order), frozenset(reading.accounted), tuple(reading.blockers)
    )


class _Reading:
    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._loose = {node.node: node for node in facts.loose}
        self.disks: dict[int, GivenDisk] = {}
        self.order: list[int | Mapping[str, Any]] = []
        self.accounted: set[str] = set()
        self.blockers: list[Blocker] = []

    def take(self, action: Mapping[str, Any]) -> None:
        data = action.get("data", {})
        self.accounted |= {
            value for value in data.values() if isinstance(value, str) and value in self._loose
        }
        if action["type"] not in _SNAPSHOTS:
            self.order.append(action)
            if action["type"] == "block-dirty-bitmap-add":
                self._refuse_existing_bitmap(data)
            return
        name = data.get("node") or data.get("node-name") or data.get("device") or ""
        disk = next((each for each in self._facts.disks if name in each.labels), None)
        if disk is None:
            self._refuse(f"Cannot find device='{name}' nor node-name='{name}'", "name a disk")
        elif disk.index in self.disks:
            self._refuse(f"disk {disk.name!r} is snapshotted by two actions", "give it one")
        else:
            self.blockers += _READ[action["type"]](disk, data, self._loose)
            self.disks[disk.index] = _given(action["type"], data, self._loose)
            self.order.append(disk.index)

    def _refuse_existing_bitmap(self, data: Mapping[str, Any]) -> None:
        """A bitmap that was there before must not be removed when the snapshot fails."""
        if any(bitmap.name == data.get("name") for bitmap in self._facts.bitmaps):
            self._refuse(f"Bitmap already exists: {data.get('name')}", "name another")

    def _refuse(self, problem: str, remedy: str) -> None:
        self.blockers.append(Blocker(problem, remedy))


def _given(kind: str, data: Mapping[str, Any], loose: Mapping[str, LooseNode]) -> GivenDisk:
    if kind == INSIDE:
        name, device = str(data.get("name", "")), str(data.get("device", ""))
        return GivenDisk("internal", internal_name=name, device=device)
    if kind == MADE:
        return GivenDisk(
            "external",
            overlay=str(data.get("snapshot-file", "")),
            node=str(data.get("snapshot-node-name", "")),
            is_made=True,
        )
    name = str(data.get("overlay", ""))
    return GivenDisk("external", overlay=loose[name].path if name in loose else "", node=name)


Loose = Mapping[str, LooseNode]


def _overlay_blockers(disk: DiskFacts, data: Mapping[str, Any], loose: Loose) -> Iterator[Blocker]:
    name = data.get("overlay", "")
    found = loose.get(name)
    if found is None:
        yield Blocker(f"Cannot find device='{name}' nor node-name='{name}'", "open it first")
    elif found.driver != "qcow2" or found.backing != disk.image.path:
        yield Blocker(
            f"the overlay {name!r} is no qcow2 that stands on {disk.image.path}: the VM could not"
            " be started from it",
            f"qemu-img create -u -f qcow2 -b {disk.image.path} -F {disk.image.format}, then"
            " blockdev-add it with 'backing': null",
        )
    elif found.l2_tables:
        yield Blocker(f"the overlay {name!r} holds data already", "make an empty one")


def _made_blockers(_: DiskFacts, data: Mapping[str, Any], __: Loose) -> Iterator[Blocker]:
    if data.get("format", "qcow2") != "qcow2":
        yield Blocker(f"an overlay of format {data['format']!r} cannot be frozen", "use qcow2")
    if data.get("mode", "absolute-paths") != "absolute-paths":
        yield Blocker(
            f"the mode {data['mode']!r} takes an image as it is",
            "open it yourself, and use blockdev-snapshot",
        )
    if not str(data.get("snapshot-file", "")).startswith("/"):
        yield Blocker("'snapshot-file' is no absolute path", "give a whole path")


def _inside_blockers(disk: DiskFacts, data: Mapping[str, Any], _: Loose) -> Iterator[Blocker]:
    name = data.get("name", "")
    if not name:
        yield Blocker("Name is empty", "name the snapshot")
    if name in disk.internal_names:
        yield Blocker(
            f"Snapshot with name '{name}' already exists on device '{disk.name}'",
            "name another, or delete that one first",
        )


_READ = {OVERLAY: _overlay_blockers, MADE: _made_blockers, INSIDE: _inside_blockers}

TAKEN_BACK: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "block-dirty-bitmap-add": ("block-dirty-bitmap-remove", {"node": "node", "name": "name"}),
    "blockdev-backup": ("block-job-cancel", {"device": "job-id"}),
    "drive-backup": ("block-job-cancel", {"device": "job-id"}),
}
"""Action -> the command that takes it back, and which member of the action each argument is."""


def taken_back(action: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The command that takes back an action which happened; None where there is none."""
    command, members = TAKEN_BACK.get(action["type"], ("", {}))
    data = action.get("data", {})
    arguments = {name: data[member] for name, member in members.items() if member in data}
    return (command, arguments) if command and arguments.keys() == members.keys() else None

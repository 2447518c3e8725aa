"""What the deletes of the crash tests are played on: images in every place that a delete knows.

The snapshot that is deleted, tagged DOOMED, lies on each disk in another way, so that one delete
merges, deletes inside, and gives the user's path back, each once. What the snapshots that stay hold
is read before and after. All but the delete itself is done in this process: a command takes longer
to be imported than to do its work.
"""

import asyncio
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from calotype.engine import deletion, lifecycle, operations
from calotype.model.snapshot import StorageKind
from calotype.model.vm import Image
from calotype.plan.delete import DeleteRequest
from calotype.plan.restore_plan import RestoreRequest
from calotype.plan.take_plan import TakeRequest
from calotype.store import images
from calotype.store.store import Store

if TYPE_CHECKING:
    from crashing import Subject

DOOMED = "doomed"
NOW = "now"
_READ_MIB = 8

Contents = dict[str, list[bytes]]
"""By snapshot, and of now: what each of its disks holds."""


def _take(vm: "Subject", pattern: int, *kinds: StorageKind, tag: str = "") -> str:
    """Write on, and take a snapshot of the disks: the state of RAM too if it has a tag."""
    vm.write(pattern, pattern)
    disks = {f"virtio{place}": kind for place, kind in enumerate(kinds)}
    request = TakeRequest(machine_state="external" if tag else "none", disks=disks)
    return asyncio.run(operations.take(Store(vm.store), vm.name, request, tag=tag)).id


def merge_under_a_guest(vm: "Subject") -> None:
    """It runs: the middle of a chain, the top of one, and a snapshot inside go."""
    _take(vm, 3, "external", "skip", "skip")
    _take(vm, 4, "external", "external", "internal", tag=DOOMED)
    _take(vm, 5, "external", "skip", "skip")


def merge_at_rest(vm: "Subject") -> None:
    """It is off: the base of two branches, a holder with a copy that is newer, a top go."""
    _take(vm, 3, "external", "skip", "skip")
    doomed = _take(vm, 4, "external", "internal", "external", tag=DOOMED)
    holder = _take(vm, 5, "skip", "external", "skip")
    _take(vm, 6, "external", "skip", "skip")
    store = Store(vm.store)
    asyncio.run(lifecycle.stop(store, vm.name, now=True))
    request = RestoreRequest(discard_current=True)
    asyncio.run(operations.restore(store, vm.name, doomed, request))
    vm.write(7, 7)
    asyncio.run(lifecycle.stop(store, vm.name, now=True))
    asyncio.run(deletion.delete(store, vm.name, DeleteRequest(frozenset({holder}))))


def contents(vm: "Subject") -> Contents:
    """What every snapshot holds, and what a guest reads now."""
    store = Store(vm.store)
    record = store.record(vm.home.name)
    found = {NOW: [_content(vm.folder, disk.active) for disk in record.disks]}
    for manifest in store.manifests(record.id):
        found[manifest.id] = [
            _content(vm.folder, part.image, part.internal_name)
            for part in manifest.storage
            if part.image is not None
        ]
    return found


def unknown(vm: "Subject") -> list[str]:
    """The images of snapshots that are not what their manifests say: none could be restored."""
    return [
        layer.path
        for manifest in Store(vm.store).manifests(vm.home.name)
        for part in manifest.storage
        for layer in part.layers
        if images.identify(Path(layer.path), layer.format) != layer.identity
    ]


def _content(folder: Path, image: Image, inside: str = "") -> bytes:
    """The beginning of a disk, where all that is ever written to one in a cell lies."""
    copy = folder / "copy"
    one = ("-l", f"snapshot.name={inside}") if inside else ()
    tool = ("qemu-img", "convert", "-U", "-f", image.format, "-O", "raw", *one)
    subprocess.run([*tool, image.path, copy], check=True)
    with copy.open("rb") as file:
        content = file.read(_READ_MIB << 20)
    copy.unlink()
    return content

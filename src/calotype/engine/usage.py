"""How much space the snapshots of a VM take: what is whose alone, and what is shared."""

from typing import NamedTuple

from calotype.engine.deletion import look_around
from calotype.errors import StoreError
from calotype.model.vm import VmRecord
from calotype.plan.delete import Catalogue, DeleteRequest, plan_delete
from calotype.store.store import Store


class SnapshotUsage(NamedTuple):
    """What one snapshot takes."""

    id: str
    tag: str
    own_bytes: int
    """What deleting it alone would free, at least."""
    shared_bytes: int
    """What it stands on as well, and something else does too."""


class Usage(NamedTuple):
    """What a VM takes: all images of its disks that are ours, and all machine states."""

    record: VmRecord
    total_bytes: int
    snapshots: tuple[SnapshotUsage, ...]
    damage: tuple[StoreError, ...]
    """What is wrong with the snapshots that cannot be read; what they need nobody knows."""


async def usage(store: Store, record: VmRecord) -> Usage:
    """Say how much space a VM and each of its snapshots take."""
    manifests, damage = store.sound_manifests(record.id)
    catalogue = await look_around(store, record, manifests)
    allocated = {
        layer.path: layer.allocated_bytes
        for disk in catalogue.disks
        for layer in disk.layers.values()
        if layer.is_ours
    }
    tags = {entry.id: entry.tag for entry in store.index.snapshots(record.id)}
    return Usage(
        record=record,
        total_bytes=sum(allocated.values()) + sum(catalogue.state_bytes.values()),
        snapshots=tuple(_snapshots(catalogue, allocated, tags, is_whole=not damage)),
        damage=tuple(damage),
    )


def _snapshots(
    catalogue: Catalogue, allocated: dict[str, int], tags: dict[str, str], *, is_whole: bool
) -> list[SnapshotUsage]:
    """Each snapshot; where one cannot be read any image may be needed: none is whose alone."""
    told = []
    for manifest in catalogue.manifests:
        own_bytes = catalogue.state_bytes[manifest.id]
        if is_whole:
            plan = plan_delete(catalogue, DeleteRequest(frozenset({manifest.id})))
            own_bytes = max(0, plan.freed_bytes)
        paths = {layer.path for part in manifest.storage for layer in part.layers}
        paths |= {part.image.path for part in manifest.storage if part.image}
        all_bytes = sum(allocated.get(path, 0) for path in paths)
        all_bytes += catalogue.state_bytes[manifest.id]
        shared_bytes = max(0, all_bytes - own_bytes)
        told.append(SnapshotUsage(manifest.id, tags.get(manifest.id, ""), own_bytes, shared_bytes))
    return told

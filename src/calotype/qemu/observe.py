"""One look at a running VM: what QEMU says of itself, and what its files and its process say.

It asks and changes nothing. What QEMU shows is joined with the definition by the image that each
disk is known to be on, never by a node name: names of `-drive` nodes are new at every start. A
writable node that belongs to no disk of the definition is a *stray*; the plan refuses it, by name.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from blake3 import blake3

from calotype.errors import QemuError
from calotype.model.names import OURS
from calotype.model.vm import (
    Bitmap,
    DiskFacts,
    DiskRecord,
    Facts,
    HostFacts,
    Image,
    ImageFacts,
    MigrationFacts,
    Process,
    ReadOnlyDisk,
    Topology,
    VmRecord,
)
from calotype.qemu import process
from calotype.qemu.monitor import CommandRefused, Monitor
from calotype.store import images

DISK_DRIVERS = frozenset({"qcow2", "raw"})
"""What may stand at the top of a disk; filters and other formats are strays, by name."""

HARMLESS_DRIVERS = frozenset({"null-co", "null-aio"})
"""Writable, but nothing that is written to them is kept."""

_FILES = frozenset({"file", "host_device", "host_cdrom"})
"""The drivers whose name for a node is a path, from QEMU's folder on."""

LIVE_BACKENDS = frozenset({"memory-backend-ram", "memory-backend-memfd"})


async def observe(monitor: Monitor, record: VmRecord, qemu: Process, store: Path) -> Facts:
    """Look at a running VM.

    Args:
        monitor: A connection to its QEMU.
        record: The VM's definition.
        qemu: QEMU's process.
        store: The folder that a machine state would be written to.

    Raises:
        QemuError: QEMU went away or does not answer.
        HostError: An image of the VM cannot be read.
    """
    blocks = await _blocks(monitor)
    found = _join(record.disks, blocks)
    return Facts(
        version=await _version(monitor),
        run_state=(await monitor.execute("query-status"))["status"],
        topology=await observe_topology(monitor),
        disks=tuple([await asyncio.to_thread(_disk, *joined) for joined in found]),
        read_only=tuple(_read_only(blocks)),
        strays=tuple(_strays(found, blocks)),
        block_jobs=tuple(job["device"] for job in await monitor.execute("query-block-jobs")),
        bitmaps=tuple(_bitmaps(blocks)),
        memory_backends=tuple([reason async for reason in _unprotectable(monitor)]),
        migration=await _migration(monitor),
        host=_host(qemu, store),
        graph_digest=_digest(blocks),
    )


async def observe_graph_digest(monitor: Monitor) -> str:
    """The digest of the block graph alone, to be compared as the last act before `stop`."""
    return _digest(await _blocks(monitor))


async def active_paths(monitor: Monitor) -> set[str]:
    """The image files that the guest's devices are on now, whether or not we know them."""
    blocks = await _blocks(monitor)
    files = _files(blocks)
    return {files[_root(backend)] for backend in blocks.backends if backend.get("inserted")}


async def delete_inside(monitor: Monitor, image: Image, identity: str, name: str) -> None:
    """Delete an internal snapshot of an image that a device is on, by its id and its name."""
    blocks = await _blocks(monitor)
    for node, path in _files(blocks).items():
        if path == image.path and node in {_root(backend) for backend in blocks.backends}:
            await monitor.execute(
                "blockdev-snapshot-delete-internal-sync", device=node, id=identity, name=name
            )


async def sweep(monitor: Monitor) -> None:
    """Close nodes and descriptors of ours that nothing uses."""
    blocks = await _blocks(monitor)
    names = {node["id"]: node["name"] for node in blocks.graph["nodes"]}
    children = {names[edge["child"]] for edge in blocks.graph["edges"]}
    in_use = children | {_root(backend) for backend in blocks.backends}
    for node in blocks.nodes:
        if node["node-name"].startswith(OURS) and node["node-name"] not in in_use:
            await monitor.execute("blockdev-del", node_name=node["node-name"])
    for fdset in await monitor.execute("query-fdsets"):
        if any(each.get("opaque", "").startswith(OURS) for each in fdset["fds"]):
            await monitor.execute("remove-fd", fdset_id=fdset["fdset-id"])


class Standing(NamedTuple):
    """The node of an image that a device is on, and the node that it stands on."""

    node: str
    below: str
    """"" where it stands on nothing."""


async def find_standing(monitor: Monitor, path: str) -> Standing | None:
    """Find the node of the image *path*, by the file and not by a name; None if no device is on it.

    Nodes of `-drive` have a new name at each start.
    """
    blocks = await _blocks(monitor)
    files = _files(blocks)
    names = {node["id"]: node["name"] for node in blocks.graph["nodes"]}
    below = {
        names[edge["parent"]]: names[edge["child"]]
        for edge in blocks.graph["edges"]
        if edge["name"] == "backing"
    }
    roots = (_root(backend) for backend in blocks.backends if backend.get("inserted"))
    found = next((root for root in roots if files[root] == path), None)
    return None if found is None else Standing(found, below.get(found, ""))


async def observe_topology(monitor: Monitor) -> Topology:
    """What the guest sees of its machine, and what a machine state must match."""
    machine = await monitor.execute("qom-get", path="/machine", property="type")
    memory = await monitor.execute("query-memory-size-summary")
    cpus = [
        await monitor.execute("qom-get", path=cpu["qom-path"], property="type")
        for cpu in await monitor.execute("query-cpus-fast")
    ]
    return Topology(
        machine=machine.removesuffix("-machine"),
        memory_bytes=memory["base-memory"] + memory.get("plugged-memory", 0),
        cpus=tuple(cpus),
        devices=tuple([device async for device in _devices(monitor)]),
    )


async def relative_names(monitor: Monitor) -> tuple[str, ...]:
    """The files that QEMU knows by a path from its folder on, as it spells them."""
    nodes = await monitor.execute("query-named-block-nodes", flat=True)
    paths = {node["file"] for node in nodes if node["drv"] in _FILES}
    return tuple(sorted(path for path in paths if not path.startswith("/")))


async def plugged_in(monitor: Monitor) -> frozenset[str]:
    """The devices, as `Topology` has them, that were plugged in after QEMU was started.

    Their QOM property says so (hw/core/qdev.c, device_get_hotplugged).
    """
    found = set()
    async for device in _devices(monitor):
        name = device.partition("=")[0]
        for place in ("peripheral", "peripheral-anon"):
            if await _property(monitor, f"/machine/{place}/{name}", "hotplugged") is True:
                found.add(device)
    return frozenset(found)


async def name_disks(monitor: Monitor, disks: tuple[DiskRecord, ...]) -> tuple[DiskRecord, ...]:
    """The disks, those without a name of the user's called by the drive name that QEMU gave.

    Raises:
        QemuError: QEMU does not hold a disk that the command line names.
    """
    found = {disk.index: backend for disk, backend in _join(disks, await _blocks(monitor))}
    named = []
    for disk in disks:
        if disk.index not in found:
            raise QemuError(
                f"QEMU has no device on {disk.active.path}",
                "give the disk a device (if=virtio, or -device ...,drive=...)",
            )
        given = found[disk.index]["device"] or _root(found[disk.index])
        named.append(msgspec.structs.replace(disk, name=disk.name or given))
    return tuple(named)


# --- disks ---------------------------------------------------------------------------------------

Joined = tuple[DiskRecord, Mapping[str, Any]]


class Blocks(NamedTuple):
    """QEMU's block layer, as three commands show it."""

    nodes: list[dict[str, Any]]
    backends: list[dict[str, Any]]
    graph: dict[str, Any]


async def _blocks(monitor: Monitor) -> Blocks:
    nodes = await monitor.execute("query-named-block-nodes", flat=True)
    return Blocks(
        [{**node, "file": _placed(node, monitor.cwd)} for node in nodes],
        await monitor.execute("query-block"),
        await monitor.execute("x-debug-query-block-graph"),
    )


def _placed(node: Mapping[str, Any], cwd: str) -> str:
    """A node's file name; what a user's QEMU may know by another name, by the one that we know."""
    name = str(node["file"])
    return os.path.realpath(Path(cwd) / name) if cwd and node["drv"] in _FILES else name


def _join(disks: tuple[DiskRecord, ...], blocks: Blocks) -> list[Joined]:
    """Each disk of the definition with the block backend that holds its active image."""
    files = _files(blocks)
    by_image = {
        os.path.realpath(files[_root(backend)]): backend
        for backend in blocks.backends
        if backend.get("inserted") and not backend["inserted"]["ro"]
    }
    return [
        (disk, backend)
        for disk in disks
        if (backend := by_image.get(os.path.realpath(disk.active.path)))
    ]


def _files(blocks: Blocks) -> dict[str, str]:
    """The file that each node's content is in: the name of the last node along `file`.

    An upper node's own name will not do: that of an overlay is a `json:` one.
    """
    names = {node["id"]: node["name"] for node in blocks.graph["nodes"]}
    below = {
        names[edge["parent"]]: names[edge["child"]]
        for edge in blocks.graph["edges"]
        if edge["name"] == "file"
    }
    files = {node["node-name"]: node["file"] for node in blocks.nodes}

    def last(name: str) -> str:
        return last(below[name]) if name in below else files[name]

    return {name: last(name) for name in files}


def _root(backend: Mapping[str, Any]) -> str:
    return str(backend.get("inserted", {}).get("node-name", ""))


def _digest(blocks: Blocks) -> str:
    """A digest of what stands on what, without sizes and without overlays that only wait open."""
    attached = [
        (backend["device"], backend.get("qdev"), _root(backend)) for backend in blocks.backends
    ]
    in_use = _below({root for _, _, root in attached}, blocks.graph)
    ours = {node["node-name"] for node in blocks.nodes if node["node-name"].startswith(OURS)}
    waiting = _below(ours - in_use, blocks.graph)
    files = _files(blocks)
    standing = [
        (name, node["drv"], files[name], node["ro"])
        for node in blocks.nodes
        if (name := node["node-name"]) not in waiting
    ]
    return blake3(msgspec.json.encode([sorted(attached, key=str), sorted(standing)])).hexdigest()


def _disk(disk: DiskRecord, backend: Mapping[str, Any]) -> DiskFacts:
    """What QEMU and the file system say of one disk; reads its metadata, blocks."""
    inserted = backend["inserted"]
    cache = inserted["cache"]
    path = Path(disk.active.path)
    tables = images.read_metadata(path) if inserted["drv"] == "qcow2" else None
    return DiskFacts(
        index=disk.index,
        name=disk.name,
        qdev=backend.get("qdev", ""),
        node=inserted["node-name"],
        image=Image(disk.active.path, inserted["drv"]),
        virtual_size_bytes=inserted["image"]["virtual-size"],
        chain=tuple(image_chain(disk.active)),
        l2_tables=tables.l2_tables if tables else 0,
        cluster_bytes=1 << tables.header.cluster_bits if tables else 0,
        free_bytes=images.free_bytes(Path(disk.origin.path).parent),
        origin=disk.origin,
        is_regular_file=path.is_file(),
        mode=images.mode(path),
        cache_direct=cache["direct"],
        cache_no_flush=cache["no-flush"],
        detect_zeroes=inserted["detect_zeroes"],
        may_be_immutable=images.may_be_immutable(path),
    )


def image_chain(image: Image) -> Iterator[ImageFacts]:
    """An image and what it stands on, top first, each with its identity; reads metadata only."""
    for path, format_ in images.backing_chain(Path(image.path), image.format):
        yield ImageFacts(str(path), format_, images.identify(path, format_))


def _read_only(blocks: Blocks) -> Iterator[ReadOnlyDisk]:
    files = _files(blocks)
    for backend in blocks.backends:
        if backend.get("inserted") and backend["inserted"]["ro"]:
            name = backend["device"] or _root(backend)
            yield ReadOnlyDisk(name, files[_root(backend)], _read_only_image(backend, files))


def _read_only_image(backend: Mapping[str, Any], files: Mapping[str, str]) -> ImageFacts | None:
    """Who a read-only image is; None where it is nothing of this host, or of another format.

    The name that QEMU has for what is no file is none of a file: `json:{...}`, `nbd://...`.
    """
    path, format_ = Path(files[_root(backend)]), backend["inserted"]["drv"]
    if format_ not in DISK_DRIVERS or not (path.is_file() or path.is_block_device()):
        return None
    return ImageFacts(str(path), format_, images.identify(path, format_))


def _strays(found: list[Joined], blocks: Blocks) -> Iterator[str]:
    """Writable storage that no disk of the definition accounts for."""
    accounted = _below({_root(backend) for _, backend in found}, blocks.graph)
    users = {
        _root(backend): backend["device"] or backend.get("qdev") for backend in blocks.backends
    }
    for disk, backend in found:
        if backend["inserted"]["drv"] not in DISK_DRIVERS:
            yield f"disk {disk.name!r} has a {backend['inserted']['drv']!r} node at its top"
    named = {node["id"]: node["name"] for node in blocks.graph["nodes"]}
    for edge in blocks.graph["edges"]:
        if named[edge["parent"]] in accounted and edge["name"] not in ("file", "backing"):
            yield f"node {named[edge['parent']]!r} keeps data in another file ({edge['name']})"
    for node in blocks.nodes:
        name = node["node-name"]
        if not node["ro"] and name not in accounted and node["drv"] not in HARMLESS_DRIVERS:
            user = f" of {users[name]!r}" if users.get(name) else ""
            yield f"writable node {name!r}{user} on {node['file']!r} is no disk of the definition"


def _below(roots: set[str], graph: Mapping[str, Any]) -> set[str]:
    """The nodes in *roots* and all that they stand on."""
    names = {node["id"]: node["name"] for node in graph["nodes"]}
    edges = [(names[edge["parent"]], names[edge["child"]]) for edge in graph["edges"]]
    reached, fresh = set(roots), set(roots)
    while fresh:
        fresh = {child for parent, child in edges if parent in fresh} - reached
        reached |= fresh
    return reached


def _bitmaps(blocks: Blocks) -> Iterator[Bitmap]:
    for node in blocks.nodes:
        for bitmap in node.get("dirty-bitmaps", []):
            yield Bitmap(node["node-name"], bitmap.get("name", ""))


# --- machine -------------------------------------------------------------------------------------


async def _version(monitor: Monitor) -> tuple[int, int, int]:
    version = (await monitor.execute("query-version"))["qemu"]
    return version["major"], version["minor"], version["micro"]


async def _devices(monitor: Monitor) -> AsyncIterator[str]:
    """`name=type` of each device that the command line or a hot-plug added."""
    for place in ("peripheral", "peripheral-anon"):
        for child in await monitor.execute("qom-list", path=f"/machine/{place}"):
            if child["type"].startswith("child<"):
                yield f"{child['name']}={child['type'].removeprefix('child<').removesuffix('>')}"


async def _unprotectable(monitor: Monitor) -> AsyncIterator[str]:
    """Each memory backend that a live snapshot cannot protect, in words."""
    for backend in await monitor.execute("query-memdev"):
        path = f"/objects/{backend['id']}" if backend.get("id") else ""
        kind = await _property(monitor, path, "type") if path else ""
        if not kind or kind in LIVE_BACKENDS:
            continue
        file = str(await _property(monitor, path, "mem-path"))
        if kind != "memory-backend-file" or not images.is_on_tmpfs(Path(file)):
            yield f"memory backend {backend['id']!r} ({kind} on {file!r}) cannot be protected"


async def _property(monitor: Monitor, path: str, name: str) -> Any:
    try:
        return await monitor.execute("qom-get", path=path, property=name)
    except CommandRefused:
        return ""


async def _migration(monitor: Monitor) -> MigrationFacts:
    capabilities = await monitor.execute("query-migrate-capabilities")
    state = await monitor.execute("query-migrate")
    return MigrationFacts(
        capabilities={entry["capability"]: entry["state"] for entry in capabilities},
        parameters={
            name: value
            for name, value in (await monitor.execute("query-migrate-parameters")).items()
            if isinstance(value, int | str)
        },
        status=state.get("status", "none"),
        blocked_reasons=tuple(state.get("blocked-reasons", ())),
    )


def _host(qemu: Process, store: Path) -> HostFacts:
    memory = process.memory(qemu.pid)
    return HostFacts(
        write_tracking=process.may_protect_memory(qemu.pid),
        store_free_bytes=images.free_bytes(store),
        resident_bytes=memory.resident_bytes,
        huge_bytes=memory.huge_bytes,
    )

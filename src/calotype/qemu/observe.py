"""One look at a running VM: what QEMU says of itself, and what its files and its process say.

It asks and changes nothing. What QEMU shows is joined with the definition by the image that each
disk is known to be on, never by a node name: names of `-drive` nodes are new at every start. How a
kind of node is treated stands in `plan/kinds.py`. A writable node that belongs to no disk of the
definition, or is of a kind that cannot be frozen, is a *stray*; the plan refuses it, by name.
"""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from calotype.errors import CalotypeError, QemuError
from calotype.model.identity import Format
from calotype.model.names import OURS
from calotype.model.vm import (
    Bitmap,
    DiskFacts,
    DiskRecord,
    Export,
    Facts,
    HostFacts,
    Image,
    ImageFacts,
    LooseNode,
    MigrationFacts,
    Process,
    ReadOnlyDisk,
    Stray,
    Topology,
    VmRecord,
)
from calotype.plan.kinds import IMAGES, kind_of, treatment
from calotype.qemu import process
from calotype.qemu.blocks import (
    NAMED_BY_PATH,
    Blocks,
    below,
    digest,
    edges,
    files,
    filters,
    image_node,
    read_blocks,
    root,
)
from calotype.qemu.monitor import CommandRefused, Monitor
from calotype.store import images

_NETWORK = re.compile(r"^\s*(?:\\ )?(\S+): index=\d+,type=([\w-]+)", re.MULTILINE)
"""A line of `info network`; QMP has none for it (net/net.c, hmp_info_network)."""


async def observe(monitor: Monitor, record: VmRecord, qemu: Process, store: Path) -> Facts:
    """Look at a running VM.

    Args:
        monitor: A connection to its QEMU.
        record: The VM's definition.
        qemu: QEMU's process.
        store: The folder that a machine state would be written to.

    Raises:
        QemuError: QEMU went away or does not answer.
        ConflictError: An image is not the file that QEMU has open.
        HostError: An image of the VM cannot be read.
    """
    blocks = await read_blocks(monitor)
    found = _join(record.disks, blocks)
    _require_open(qemu, [disk.active for disk, _ in found])
    return Facts(
        version=await _version(monitor),
        run_state=(await monitor.execute("query-status"))["status"],
        topology=await observe_topology(monitor),
        disks=tuple([await asyncio.to_thread(_disk, *each, blocks) for each in found]),
        read_only=tuple(_read_only(blocks)),
        strays=tuple(_strays(found, blocks)),
        block_jobs=tuple(job["device"] for job in await monitor.execute("query-block-jobs")),
        bitmaps=tuple(_bitmaps(blocks)),
        loose=tuple(await asyncio.to_thread(lambda: tuple(_loose(blocks)))),
        exports=tuple(
            Export(each["id"], each["type"], each["node-name"])
            for each in await monitor.execute("query-block-exports")
        ),
        networks=await _networks(monitor),
        memory_backends=tuple([reason async for reason in _unprotectable(monitor)]),
        migration=await observe_migration(monitor),
        host=_host(qemu, store),
        graph_digest=digest(blocks),
    )


async def observe_graph_digest(monitor: Monitor, opened: Collection[str] = ()) -> str:
    """The digest of the block graph alone, to be compared as the last act before `stop`.

    Args:
        monitor: A connection to QEMU.
        opened: Nodes that were opened since, and that no device is on yet.
    """
    return digest(await read_blocks(monitor), opened)


async def active_paths(monitor: Monitor) -> set[str]:
    """The image files that the guest's devices are on now, links followed, known to us or not."""
    blocks = await read_blocks(monitor)
    where = files(blocks)
    return {where[root(backend)] for backend in blocks.backends if backend.get("inserted")}


async def delete_inside(monitor: Monitor, image: Image, identity: str, name: str) -> None:
    """Delete an internal snapshot of an image that a device is on, by its id and its name."""
    blocks = await read_blocks(monitor)
    roots = {root(backend) for backend in blocks.backends}
    for node, path in files(blocks).items():
        if path == os.path.realpath(image.path) and node in roots:
            await monitor.execute(
                "blockdev-snapshot-delete-internal-sync", device=node, id=identity, name=name
            )


async def sweep(monitor: Monitor) -> None:
    """Close nodes and descriptors of ours that nothing uses."""
    blocks = await read_blocks(monitor)
    in_use = {child for _, _, child in edges(blocks)} | {root(each) for each in blocks.backends}
    for node in blocks.nodes:
        if node["node-name"].startswith(OURS) and node["node-name"] not in in_use:
            await monitor.execute("blockdev-del", node_name=node["node-name"])
    for fdset in await monitor.execute("query-fdsets"):
        if any(each.get("opaque", "").startswith(OURS) for each in fdset["fds"]):
            await monitor.execute("remove-fd", fdset_id=fdset["fdset-id"])


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
        media=tuple(_media(await read_blocks(monitor))),
    )


async def relative_names(monitor: Monitor) -> tuple[str, ...]:
    """The files that QEMU knows by a path from its folder on, as it spells them."""
    nodes = await monitor.execute("query-named-block-nodes", flat=True)
    paths = {node["file"] for node in nodes if node["drv"] in NAMED_BY_PATH}
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
    found = {disk.index: backend for disk, backend in _join(disks, await read_blocks(monitor))}
    named = []
    for disk in disks:
        if disk.index not in found:
            raise QemuError(
                f"QEMU has no device on {disk.active.path}",
                "give the disk a device (if=virtio, or -device ...,drive=...)",
            )
        given = found[disk.index]["device"] or root(found[disk.index])
        named.append(msgspec.structs.replace(disk, name=disk.name or given))
    return tuple(named)


# --- disks ---------------------------------------------------------------------------------------

Joined = tuple[DiskRecord, Mapping[str, Any]]


def _join(disks: tuple[DiskRecord, ...], blocks: Blocks) -> list[Joined]:
    """Each disk of the definition with the block backend that holds its active image."""
    where = files(blocks)
    by_image = {
        os.path.realpath(where[root(backend)]): backend
        for backend in blocks.backends
        if backend.get("inserted") and not backend["inserted"]["ro"]
    }
    return [
        (disk, backend)
        for disk in disks
        if (backend := by_image.get(os.path.realpath(disk.active.path)))
    ]


def _require_open(qemu: Process, tops: Iterable[Image]) -> None:
    """Refuse images that were moved or replaced under QEMU, as far as its files may be seen."""
    try:
        opened = process.open_files(qemu.pid)
    except OSError:
        return
    for top in tops:
        process.require_open(top.path, opened)
        for layer in image_chain(top):
            process.require_open(layer.path, opened)


def _disk(disk: DiskRecord, backend: Mapping[str, Any], blocks: Blocks) -> DiskFacts:
    """What QEMU and the file system say of one disk; reads its metadata, blocks."""
    node = image_node(blocks, backend)
    cache = node["cache"]
    path = Path(disk.active.path)
    tables = images.read_metadata(path) if node["drv"] == "qcow2" else None
    return DiskFacts(
        index=disk.index,
        name=disk.name,
        qdev=backend.get("qdev", ""),
        node=node["node-name"],
        filters=filters(blocks, backend),
        internal_names=frozenset(each.name for each in tables.snapshots) if tables else frozenset(),
        image=Image(disk.active.path, _format(node)),
        virtual_size_bytes=node["image"]["virtual-size"],
        chain=tuple(image_chain(disk.active)),
        l2_tables=tables.l2_tables if tables else 0,
        cluster_bytes=1 << tables.header.cluster_bits if tables else 0,
        free_bytes=images.free_bytes(Path(disk.origin.path).parent),
        origin=disk.origin,
        is_regular_file=path.is_file(),
        mode=images.mode(path),
        cache_direct=cache["direct"],
        cache_no_flush=cache["no-flush"],
        detect_zeroes=node["detect_zeroes"],
        may_hold_overlay=images.may_create_in(Path(disk.origin.path).parent),
        may_be_immutable=images.may_be_immutable(path),
    )


def _format(node: Mapping[str, Any]) -> Format:
    """How a node reads its image; a file by itself is a raw one. Other kinds are strays."""
    return "qcow2" if node["drv"] == "qcow2" else "raw"


def image_chain(image: Image) -> Iterator[ImageFacts]:
    """An image and what it stands on, top first, each with its identity; reads metadata only."""
    for path, format_ in images.backing_chain(Path(image.path), image.format):
        yield ImageFacts(str(path), format_, images.identify(path, format_))


def _read_only(blocks: Blocks) -> Iterator[ReadOnlyDisk]:
    where = files(blocks)
    for backend in blocks.backends:
        if backend.get("inserted") and backend["inserted"]["ro"]:
            name, path = backend["device"] or root(backend), where[root(backend)]
            yield ReadOnlyDisk(name, path, _read_only_image(image_node(blocks, backend), path))


def _read_only_image(node: Mapping[str, Any], file: str) -> ImageFacts | None:
    """Who a read-only image is; None where it is nothing of this host, or of another format.

    The name that QEMU has for what is no file is none of a file: `json:{...}`, `nbd://...`.
    """
    path, format_ = Path(file), _format(node)
    if treatment("node", node["drv"]) not in IMAGES:
        return None
    if not (path.is_file() or path.is_block_device()):
        return None
    return ImageFacts(str(path), format_, images.identify(path, format_))


def _media(blocks: Blocks) -> Iterator[str]:
    """`device=file` of each read-only medium that is in a drive; an empty drive has none."""
    where = files(blocks)
    for backend in blocks.backends:
        if backend.get("qdev") and backend.get("inserted") and backend["inserted"]["ro"]:
            yield f"{backend['qdev']}={where[root(backend)]}"


def _strays(found: list[Joined], blocks: Blocks) -> Iterator[Stray]:
    """Writable storage that no disk of the definition accounts for, or that is of no known kind."""
    roots = {root(backend) for _, backend in found}
    accounted = below(roots, blocks)
    users = {root(backend): backend["device"] or backend.get("qdev") for backend in blocks.backends}
    loose = _loose_roots(blocks)
    for parent, role, _ in edges(blocks):
        if parent in accounted and role not in ("file", "backing"):
            yield Stray(f"node {parent!r} keeps data in another file ({role})")
    for node in blocks.nodes:
        name, driver = node["node-name"], node["drv"]
        if node["ro"] or treatment("node", driver) in ("empty", "job"):
            continue
        if treatment("node", driver) == "blocks":
            yield _unfit(node, users.get(name))
        elif name not in accounted:
            user = f" of {users[name]!r}" if users.get(name) else ""
            yield Stray(
                f"writable node {name!r}{user} on {node['file']!r} is no disk of the definition",
                node=loose.get(name, ""),
            )


def _loose_roots(blocks: Blocks) -> dict[str, str]:
    """Each node that no device is on, with the topmost that stands on it or is it."""
    attached = below({root(backend) for backend in blocks.backends}, blocks)
    children = {child for _, _, child in edges(blocks)}
    tops = {node["node-name"] for node in blocks.nodes} - children - attached
    return {name: top for top in tops for name in below({top}, blocks) - attached}


def _loose(blocks: Blocks) -> Iterator[LooseNode]:
    """The images that are open for writing and that no device is on; reads their metadata."""
    tops, where = set(_loose_roots(blocks).values()), files(blocks)
    for node in blocks.nodes:
        name, driver = node["node-name"], node["drv"]
        if node["ro"] or name not in tops or driver not in ("qcow2", "raw"):
            continue
        unread = LooseNode(name, driver, where[name])
        try:
            yield _as_overlay(unread) if driver == "qcow2" else unread
        except CalotypeError:  # it is none that a snapshot could use, and says so by its backing
            yield unread


def _as_overlay(node: LooseNode) -> LooseNode:
    """A loose node with what its image says of itself.

    Raises:
        HostError: The image, or what it stands on, cannot be read.
        StoreError: It is not sound.
    """
    path = Path(node.path)
    below_it = images.backing_chain(path, "qcow2")[1:2]
    backing = str(below_it[0][0]) if below_it else ""
    l2_tables = images.read_metadata(path).l2_tables
    return msgspec.structs.replace(node, backing=backing, l2_tables=l2_tables)


def _unfit(node: Mapping[str, Any], user: str | None) -> Stray:
    """A writable node of a kind that cannot be frozen, or of one that nobody has heard of."""
    name, driver = node["node-name"], node["drv"]
    of_whom = f" of {user!r}" if user else ""
    kind = kind_of("node", driver)
    if kind is None:
        return Stray(f"node {name!r}{of_whom} is of the kind {driver!r}, which is not known here")
    return Stray(f"node {name!r}{of_whom} is {driver!r}: {kind.reason}", kind.remedy)


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


async def _networks(monitor: Monitor) -> tuple[str, ...]:
    """`name=type` of each end of a network, the guest's and the host's."""
    said = await monitor.execute("human-monitor-command", command_line="info network")
    return tuple(f"{name}={kind}" for name, kind in _NETWORK.findall(said))


async def _unprotectable(monitor: Monitor) -> AsyncIterator[str]:
    """Each memory backend that a live snapshot cannot protect, in words."""
    for backend in await monitor.execute("query-memdev"):
        path = f"/objects/{backend['id']}" if backend.get("id") else ""
        kind = await _property(monitor, path, "type") if path else ""
        if not kind or treatment("memory", kind) == "saved":
            continue
        file = str(await _property(monitor, path, "mem-path"))
        if treatment("memory", kind) != "on tmpfs" or not images.is_on_tmpfs(Path(file)):
            yield f"memory backend {backend['id']!r} ({kind} on {file!r}) cannot be protected"


async def _property(monitor: Monitor, path: str, name: str) -> Any:
    try:
        return await monitor.execute("qom-get", path=path, property=name)
    except CommandRefused:
        return ""


async def observe_migration(monitor: Monitor) -> MigrationFacts:
    """What QEMU's migration can do, how it is set, and what is in its way."""
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
        can_activate=await _knows(monitor, "blockdev-set-active"),
    )


async def _knows(monitor: Monitor, command: str) -> bool:
    return command in {known["name"] for known in await monitor.execute("query-commands")}


def _host(qemu: Process, store: Path) -> HostFacts:
    memory = process.memory(qemu.pid)
    return HostFacts(
        write_tracking=process.may_protect_memory(qemu.pid),
        may_unprotect=process.may_unprotect_memory(qemu.pid),
        store_free_bytes=images.free_bytes(store),
        resident_bytes=memory.resident_bytes,
        huge_bytes=memory.huge_bytes,
    )

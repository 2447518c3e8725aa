"""QEMU's block layer as it shows itself: nodes, what stands on what, and the devices on top.

Node names of `-drive` are new at each start, so what is known of a node is the file at its end.
Between a device and its image there may be *filters*, which hold nothing: an overlay goes below
them, and what is looked for by a device is the image under its filters. Some commands want the
*root* all the same, the node that the device itself is on (blockdev.c, qmp_get_root_bs).
"""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from blake3 import blake3

from calotype.model.names import OURS
from calotype.plan.kinds import treatment
from calotype.qemu.monitor import Monitor

NAMED_BY_PATH = frozenset({"file", "host_device", "host_cdrom"})
"""The drivers whose name for a node is a path, from QEMU's folder on."""


class Blocks(NamedTuple):
    """QEMU's block layer, as three commands show it."""

    nodes: list[dict[str, Any]]
    backends: list[dict[str, Any]]
    graph: dict[str, Any]


async def read_blocks(monitor: Monitor) -> Blocks:
    """Ask for all of it; what changes between the three questions is found by the digest."""
    nodes = await monitor.execute("query-named-block-nodes", flat=True)
    return Blocks(
        [{**node, "file": _placed(node, monitor.cwd)} for node in nodes],
        await monitor.execute("query-block"),
        await monitor.execute("x-debug-query-block-graph"),
    )


def _placed(node: Mapping[str, Any], cwd: str) -> str:
    """A node's file name; of a file the whole one, however the command line spelled it."""
    name = str(node["file"])
    return os.path.realpath(Path(cwd) / name) if cwd and node["drv"] in NAMED_BY_PATH else name


def files(blocks: Blocks) -> dict[str, str]:
    """The file that each node's content is in: the name of the last node along `file`.

    An upper node's own name will not do: that of an overlay is a `json:` one.
    """
    below_it = children(blocks, "file")
    named = {node["node-name"]: node["file"] for node in blocks.nodes}

    def last(name: str) -> str:
        return last(below_it[name]) if name in below_it else named[name]

    return {name: last(name) for name in named}


def children(blocks: Blocks, role: str) -> dict[str, str]:
    """The child that each node has in this role, by name: its `file`, or its `backing`."""
    return {
        parent: child for parent, edge_role, child in edges(blocks) if edge_role == role and parent
    }


def edges(blocks: Blocks) -> Iterator[tuple[str, str, str]]:
    """Parent, role and child of each edge of the graph, by name."""
    names = {node["id"]: node["name"] for node in blocks.graph["nodes"]}
    for edge in blocks.graph["edges"]:
        yield names[edge["parent"]], edge["name"], names[edge["child"]]


def root(backend: Mapping[str, Any]) -> str:
    """The node that a device is on; "" where its drive is empty."""
    return str(backend.get("inserted", {}).get("node-name", ""))


def filters(blocks: Blocks, backend: Mapping[str, Any]) -> tuple[str, ...]:
    """The filters between a device and its image, the device's own node first."""
    drivers = {node["node-name"]: node["drv"] for node in blocks.nodes}
    below_it = children(blocks, "file")
    passed, name = [], root(backend)
    while treatment("node", drivers.get(name, "")) == "filter" and name in below_it:
        passed.append(name)
        name = below_it[name]
    return tuple(passed)


def image_node(blocks: Blocks, backend: Mapping[str, Any]) -> dict[str, Any]:
    """The node of a device's image: the one below its filters, with all that QEMU shows of it."""
    passed = filters(blocks, backend)
    name = children(blocks, "file")[passed[-1]] if passed else root(backend)
    return next(node for node in blocks.nodes if node["node-name"] == name)


def below(roots: set[str], blocks: Blocks) -> set[str]:
    """The nodes in *roots* and all that they stand on."""
    pairs = [(parent, child) for parent, _, child in edges(blocks)]
    reached, fresh = set(roots), set(roots)
    while fresh:
        fresh = {child for parent, child in pairs if parent in fresh} - reached
        reached |= fresh
    return reached


def digest(blocks: Blocks, opened: Collection[str] = ()) -> str:
    """A digest of what stands on what, without sizes and without overlays that only wait open.

    Those have names of ours; *opened* are others that were opened to wait.
    """
    attached = [
        (backend["device"], backend.get("qdev"), root(backend)) for backend in blocks.backends
    ]
    in_use = below({name for _, _, name in attached}, blocks)
    names = {node["node-name"] for node in blocks.nodes}
    ours = {name for name in names if name.startswith(OURS) or name in opened}
    waiting = below(ours - in_use, blocks)
    where = files(blocks)
    standing = [
        (name, node["drv"], where[name], node["ro"])
        for node in blocks.nodes
        if (name := node["node-name"]) not in waiting
    ]
    return blake3(msgspec.json.encode([sorted(attached, key=str), sorted(standing)])).hexdigest()

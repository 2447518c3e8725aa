"""Merge images of a running VM: QEMU's own jobs, on nodes that are looked up by their files.

Node names are new at every start, so none is ever remembered: what is known of an image is its
path, and the node is whichever has that file now. A job has a name of ours, by which one that was
begun by somebody who died since is found again.

A merge of the top image has two halves. The first copies while the guest writes on, until both
images are the same ("ready"). The second switches the guest over, and only when the caller says so:
before that the one is the newest, after it the other, and the record must never name the wrong one.
"""

import asyncio
import contextlib
import itertools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from calotype.errors import ConflictError, QemuError
from calotype.model.vm import Image
from calotype.plan.kinds import IMAGES, treatment
from calotype.qemu.blocks import Blocks, children, files, image_node, read_blocks, root
from calotype.qemu.image_tool import Share
from calotype.qemu.monitor import LAST_WORDS, CommandRefused, Monitor

_POLL_S = 0.02


class Node(NamedTuple):
    """A node of a disk's chain, and the file that its content is in, its links followed."""

    name: str
    path: str
    driver: str


class Open(NamedTuple):
    """What a QEMU has open."""

    files: frozenset[str]
    chains: tuple[tuple[Node, ...], ...]
    """For each device that is written to: the nodes of its images, top first."""
    roots: Mapping[str, str]
    """Node of the top image -> the node that the device is on, above its filters."""
    busy: tuple[str, ...]
    """Jobs that are under way, and bitmaps: what a merge would disturb, in words."""

    def chain(self, path: str) -> tuple[Node, ...]:
        """The chain that has the image *path* at its top."""
        wanted = os.path.realpath(path)
        return next((chain for chain in self.chains if chain and chain[0].path == wanted), ())

    def is_below_a_device(self, path: str) -> bool:
        """Whether some device stands on the image *path*."""
        wanted = os.path.realpath(path)
        return any(node.path == wanted for chain in self.chains for node in chain)

    def has(self, path: str) -> bool:
        """Whether the image *path* is open."""
        return os.path.realpath(path) in self.files


async def look(monitor: Monitor) -> Open:
    """See which images QEMU has open."""
    blocks = await read_blocks(monitor)
    where = {name: os.path.realpath(path) for name, path in files(blocks).items()}
    backends = [
        backend
        for backend in blocks.backends
        if backend.get("inserted") and not backend["inserted"]["ro"]
    ]
    chains = tuple(tuple(_chain(image_node(blocks, each), blocks, where)) for each in backends)
    jobs = await monitor.execute("query-jobs")
    bitmaps = [node for node in blocks.nodes if node.get("dirty-bitmaps")]
    return Open(
        files=frozenset(where.values()),
        chains=chains,
        roots={
            chain[0].name: root(each) for chain, each in zip(chains, backends, strict=True) if chain
        },
        busy=(
            *(f"the job {job['id']!r} is under way" for job in jobs),
            *(f"node {node['node-name']!r} has a dirty bitmap" for node in bitmaps),
        ),
    )


def _chain(top: dict[str, Any], blocks: Blocks, where: dict[str, str]) -> list[Node]:
    below = children(blocks, "backing")
    drivers = {node["node-name"]: node["drv"] for node in blocks.nodes}
    chain: list[Node] = []
    name: str | None = top["node-name"]
    while name is not None:
        if treatment("node", drivers[name]) != "job":
            chain.append(Node(name, where[name], drivers[name]))
        name = below.get(name)
    return chain


def is_plain(chain: tuple[Node, ...]) -> bool:
    """Whether a chain holds images and nothing between them."""
    return all(treatment("node", node.driver) in IMAGES for node in chain)


async def status(monitor: Monitor, job: str) -> str | None:
    """How far a merge of this name is; None where none was begun."""
    jobs = {each["id"]: each["status"] for each in await monitor.execute("query-jobs")}
    return jobs.get(job)


async def begin(monitor: Monitor, job: str, top: Image, base: Image) -> None:
    """Begin to merge *top* into *base*, the next below it in the chain of a device.

    Raises:
        ConflictError: QEMU does not have the one on the other.
        QemuError: QEMU refused.
    """
    found = await look(monitor)
    wanted = (os.path.realpath(top.path), os.path.realpath(base.path))
    for chain in found.chains:
        for upper, lower in itertools.pairwise(chain):
            if (upper.path, lower.path) == wanted:
                device = found.roots[chain[0].name]
                names = {"device": device, "top-node": upper.name, "base-node": lower.name}
                # QEMU takes the name for the file above; the top of all has none above
                noted = {} if upper is chain[0] else {"backing-file": base.path}
                job_words = {"job-id": job, "auto-dismiss": False}
                await monitor.send("block-commit", {**job_words, **names, **noted})
                return
    raise ConflictError(
        f"QEMU does not have {top.path} on {base.path}", "stop the VM, and try again"
    )


async def reached(monitor: Monitor, job: str, wanted: str, told: Share) -> str:
    """Wait until a job is as *wanted*, "ready" if it merges the top image, or is concluded.

    Returns:
        Its status: one of the two.

    Raises:
        QemuError: The job failed.
    """
    while True:
        state = await _state(monitor, job)
        if state["total-progress"]:
            told(state["current-progress"] / state["total-progress"])
        if state["status"] in (wanted, "concluded"):
            return str(state["status"])
        await asyncio.sleep(_POLL_S)


async def caught_up(monitor: Monitor, job: str) -> None:
    """Wait until both images of a ready job are the same, on the disk too; the guest is stopped.

    `stop` flushes all images, of a VM that is stopped as well (system/cpus.c, do_vm_stop).
    """
    while True:
        state = await _state(monitor, job)
        if state["current-progress"] == state["total-progress"]:
            break
        await asyncio.sleep(_POLL_S / 10)
    await monitor.execute("stop")


async def _state(monitor: Monitor, job: str) -> dict[str, Any]:
    for state in await monitor.execute("query-jobs"):
        if state["id"] == job:
            if "error" in state:
                await monitor.execute("job-dismiss", id=job)
                raise QemuError(
                    f"QEMU cannot merge: {state['error']}", LAST_WORDS, qemu=state["error"]
                )
            return dict(state)
    raise QemuError(f"the job {job} is gone", "another client of QEMU's monitor ended it")


async def end(monitor: Monitor, job: str, top: Image, told: Share) -> None:
    """Wait until a job is done, and have QEMU close the image that went away.

    Raises:
        QemuError: The job failed, or QEMU keeps the image open.
    """
    await reached(monitor, job, "concluded", told)
    await monitor.execute("job-dismiss", id=job)
    await close(monitor, top)


async def give_up(monitor: Monitor, job: str) -> None:
    """End a job that is not done; the guest goes on writing to the image that it was on.

    A ready job writes to both images, and would fail, late, once the one below is frozen.
    """
    while (found := await status(monitor, job)) is not None:
        command = "job-dismiss" if found == "concluded" else "job-cancel"
        with contextlib.suppress(CommandRefused):  # it was concluding
            await monitor.execute(command, id=job)
        await asyncio.sleep(_POLL_S)


async def close(monitor: Monitor, image: Image) -> None:
    """Have QEMU close an image that no device stands on any more; one that is closed is no error.

    Raises:
        QemuError: QEMU keeps it open.
    """
    for _ in ("its nodes", "the files of those, where they are nodes by themselves"):
        blocks = await read_blocks(monitor)
        for name, path in files(blocks).items():
            if os.path.realpath(path) == os.path.realpath(image.path):
                with contextlib.suppress(CommandRefused):  # it is in use by another, or gone
                    await monitor.execute("blockdev-del", node_name=name)
    if (await look(monitor)).has(image.path):
        raise QemuError(f"QEMU keeps {image.path} open", "stop the VM, and try again")


async def delete_inside(monitor: Monitor, image: Image, internal_id: str, name: str) -> None:
    """Delete the internal snapshot with this id and name from an image at the top of a device.

    Raises:
        ConflictError: The image is not at the top of a device.
        QemuError: QEMU refused.
    """
    found = await look(monitor)
    chain = found.chain(image.path)
    if not chain:
        raise ConflictError(
            f"the VM stands on {image.path}, which cannot be changed while it runs", "stop the VM"
        )
    command = "blockdev-snapshot-delete-internal-sync"
    device = found.roots[chain[0].name]
    await monitor.execute(command, device=device, id=internal_id, name=name)

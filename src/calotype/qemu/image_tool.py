"""qemu-img, for images that no QEMU has open: made, gone back in, copied out of.

A path is never parsed: it is given as a JSON description of a node wherever qemu-img would
otherwise look for a protocol or for commas in it.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from calotype.errors import HostError
from calotype.model.vm import Image
from calotype.store import images
from calotype.store.files import sync_directory

Share = Callable[[float], None]
"""Told which share of something is done: 0 to 1."""

_PERCENT = re.compile(rb"\(\s*([0-9.]+)/100%\)")
_READ_BYTES = 4096

_DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")
"""A qemu-img that outlived us would write to what `recover` is about to undo."""


async def create_overlay(overlay: str, backing: Image, size_bytes: int) -> None:
    """Create an empty qcow2 at *overlay* that stands on *backing*, without opening that.

    Raises:
        HostError: qemu-img failed, or something is at *overlay* already.
    """
    if Path(overlay).exists():
        raise HostError(
            f"{overlay} exists already", "it is none of ours: move it away", path=overlay
        )
    await run("create", "-q", "-u", "-f", "qcow2", "-b", backing.path, "-F", backing.format,
               f"file:{overlay}", str(size_bytes))  # fmt: skip
    below = Path(backing.path).stat()
    if (below.st_uid, below.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(PermissionError):  # QEMU may run as the image's owner
            os.chown(overlay, below.st_uid, below.st_gid)
    Path(overlay).chmod(below.st_mode & 0o444 | 0o600)
    await asyncio.to_thread(_make_durable, Path(overlay))


def _make_durable(path: Path) -> None:
    """Sync a new file and its name: what is recorded next names it."""
    images.sync_data(path)
    sync_directory(path.parent)


async def snapshot_inside(image: Image, name: str) -> None:
    """Make an internal snapshot called *name* of an image that nobody has open."""
    await run("snapshot", "-q", "-c", name, f"file:{image.path}")


async def apply_inside(image: Image, name: str) -> None:
    """Set an image's content to that of its internal snapshot *name*."""
    await run("snapshot", "-q", "-a", name, f"file:{image.path}")


async def commit(overlay: str) -> None:
    """Merge an overlay's content into what it stands on, and leave it empty; nobody has it open."""
    await run("commit", "-q", "-f", "qcow2", f"file:{overlay}")


async def mend(image: Image) -> None:
    """Mend what one who was killed has left of a change to the tables; nobody has the image open.

    qcow2 orders its writes so that no data is lost: clusters are counted too often, or said to be
    shared that are not (block/qcow2-snapshot.c counts all clusters before the table is written).
    """
    await run("check", "-q", "-r", "all", "-f", image.format, f"file:{image.path}")


async def delete_inside(image: Image, name: str) -> None:
    """Delete an internal snapshot of an image that nobody has open."""
    await run("snapshot", "-q", "-d", name, f"file:{image.path}")


async def extract_inside(image: Image, name: str, copy: str) -> None:
    """Copy the content of an internal snapshot into a new qcow2 at *copy*.

    A VM may run on the image meanwhile: what the snapshot holds does not change while it is there.
    """
    node = {"driver": image.format, "file": {"driver": "file", "filename": image.path}}
    await run("convert", "-q", "-U", "-O", "qcow2", "-l", f"snapshot.name={name}",
               f"json:{json.dumps(node)}", f"file:{copy}")  # fmt: skip


def unheard(_: float) -> None:
    """Hear how far a qemu-img is, and tell nobody."""


async def run(*arguments: str, told: Share = unheard) -> None:
    """Run qemu-img, which ends with us, and pass on how far it is.

    It has a session of its own: Ctrl-C is for us, who undo what it did, perhaps by another one.

    Args:
        arguments: Its command line, with `-p` where somebody is told.
        told: Told which share is done.

    Raises:
        HostError: It failed, or is not there.
    """
    if shutil.which("qemu-img") is None:
        raise HostError("qemu-img cannot be started", "install Debian's qemu-utils")
    try:
        tool = await asyncio.create_subprocess_exec(
            *_DIE_WITH_US,
            "qemu-img",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise HostError("setpriv cannot be started", "install Debian's util-linux") from error
    assert tool.stdout
    assert tool.stderr
    try:
        said, _ = await asyncio.gather(tool.stderr.read(), _listen(tool.stdout, told))
        await tool.wait()
    except asyncio.CancelledError:
        tool.kill()
        await tool.wait()
        raise
    if tool.returncode:
        text = said.decode(errors="replace").strip()
        raise HostError(
            f"qemu-img {arguments[0]} failed: {text}",
            "see what it says of the file system and of the image; `qemu-img check` looks into one",
            qemu=text,
        )


async def _listen(output: asyncio.StreamReader, told: Share) -> None:
    """Pass on the percentages that qemu-img writes."""
    while said := await output.read(_READ_BYTES):
        if percents := _PERCENT.findall(said):
            told(float(percents[-1]) / 100)

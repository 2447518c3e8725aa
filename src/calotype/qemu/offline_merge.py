"""Merge images that no QEMU has open, with qemu-img: down, up, and the names between them.

What is read is the same before, during and after each of these, for the image that they name: a
commit writes into the base what the top hides, a rebase writes into an image what it shows already.
So each may be cut off and done again. When one returns, what it wrote is on the disk.
"""

import asyncio
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from calotype.errors import HostError
from calotype.model.vm import Image
from calotype.qemu.image_tool import _DIE_WITH_US
from calotype.store import images

Share = Callable[[float], None]
"""Told which share of a merge is done: 0 to 1."""

_PERCENT = re.compile(rb"\(\s*([0-9.]+)/100%\)")
_READ_BYTES = 4096


async def commit(top: Image, base: Image, told: Share) -> None:
    """Write the content of *top* into *base*, which it stands on; *top* stays as it is.

    Raises:
        HostError: qemu-img failed, or the images are in use.
    """
    await run_told(
        told, "commit", "-p", "-d", "-f", top.format, "-b", base.path, f"file:{top.path}"
    )
    await asyncio.to_thread(images.sync_data, Path(base.path))


async def rebase(image: Image, onto: Image | None, told: Share) -> None:
    """Put *image* onto another one, or on none, keeping its content.

    Raises:
        HostError: As `commit`.
    """
    await run_told(told, "rebase", "-p", "-f", image.format, *_backing(onto), f"file:{image.path}")
    await asyncio.to_thread(images.sync_data, Path(image.path))


async def repoint(image: Image, onto: Image) -> None:
    """Name another image, of the same content, as the one that *image* stands on.

    Raises:
        HostError: As `commit`.
    """
    await run_told(
        _unheard, "rebase", "-u", "-f", image.format, *_backing(onto), f"file:{image.path}"
    )
    await asyncio.to_thread(images.sync_data, Path(image.path))


def _backing(onto: Image | None) -> tuple[str, ...]:
    return ("-b", onto.path, "-F", onto.format) if onto else ("-b", "")


def _unheard(_: float) -> None:
    pass


async def run_told(told: Share, *arguments: str) -> None:
    """Run qemu-img, which ends with us, and pass on how far it is.

    It has a session of its own: Ctrl-C is for us, who undo what it did.

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

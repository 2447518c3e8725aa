"""Merge images that no QEMU has open, with qemu-img: down, up, and the names between them.

What is read is the same before, during and after each of these, for the image that they name: a
commit writes into the base what the top hides, a rebase writes into an image what it shows already.
So each may be cut off and done again. When one returns, what it wrote is on the disk.
"""

import asyncio
from pathlib import Path

from calotype.model.vm import Image
from calotype.qemu.image_tool import Share, run
from calotype.store import images


async def commit(top: Image, base: Image, told: Share) -> None:
    """Write the content of *top* into *base*, which it stands on; *top* stays as it is.

    Raises:
        HostError: qemu-img failed, or the images are in use.
    """
    await run(
        "commit", "-p", "-d", "-f", top.format, "-b", base.path, f"file:{top.path}", told=told
    )
    await asyncio.to_thread(images.sync_data, Path(base.path))


async def rebase(image: Image, onto: Image | None, told: Share) -> None:
    """Put *image* onto another one, or on none, keeping its content.

    Raises:
        HostError: As `commit`.
    """
    name = f"file:{image.path}"
    await run("rebase", "-p", "-f", image.format, *_backing(onto), name, told=told)
    await asyncio.to_thread(images.sync_data, Path(image.path))


async def repoint(image: Image, onto: Image) -> None:
    """Name another image, of the same content, as the one that *image* stands on.

    Raises:
        HostError: As `commit`.
    """
    await run("rebase", "-u", "-f", image.format, *_backing(onto), f"file:{image.path}")
    await asyncio.to_thread(images.sync_data, Path(image.path))


def _backing(onto: Image | None) -> tuple[str, ...]:
    return ("-b", onto.path, "-F", onto.format) if onto else ("-b", "")

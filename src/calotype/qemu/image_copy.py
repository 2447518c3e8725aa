"""Copy the content of an image into a new one, while a QEMU may have it open.

qemu-img takes no lock (`-U`), so that neither the guest nor a merge has to wait for it. What is
read must therefore not change meanwhile: a frozen image does not, nor what a snapshot inside an
image holds, whatever the guest writes to that image; whoever calls makes sure that nobody deleted
it while it was read.

A path is never parsed: it is given as a JSON description of a node, as in `image_tool.py`.
"""

import json
from pathlib import Path

from calotype.model.identity import Format
from calotype.model.vm import Image
from calotype.qemu.image_tool import Share, run
from calotype.store import images


async def copy_content(
    source: Image,
    inside: str,
    target: Path,
    format: Format,  # noqa: A002 - QEMU's own word for it
    told: Share,
) -> None:
    """Copy a whole image, with all that it stands on, or a snapshot inside it.

    Args:
        source: The image.
        inside: The name of the snapshot inside it that is meant; "" for all of it.
        target: A file that is there, whose content is replaced, and whose mode stays.
        format: The format of the copy.
        told: Told which share is done.

    Raises:
        HostError: qemu-img failed; the disk may be full.
    """
    driver = "host_device" if Path(source.path).is_block_device() else "file"
    node = {"driver": source.format, "file": {"driver": driver, "filename": source.path}}
    one = ("-l", f"snapshot.name={inside}") if inside else ()
    await run("convert", "-p", "-U", "-O", format, *one,
              f"json:{json.dumps(node)}", f"file:{target}", told=told)  # fmt: skip


async def cut_to(image: Path, format: Format, size_bytes: int) -> None:  # noqa: A002 - QEMU's own
    """Take off an image's disk what is behind *size_bytes*; one that is as long stays.

    A snapshot inside an image whose disk has grown since is read with the new size.

    Raises:
        HostError: qemu-img failed.
    """
    if images.identify(image, format).virtual_size_bytes > size_bytes:
        await run("resize", "-q", "--shrink", "-f", format, f"file:{image}", str(size_bytes))

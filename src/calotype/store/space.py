"""What a folder's file system offers: room, sharing of blocks, whether it outlives a boot."""

import errno
import fcntl
import os
from pathlib import Path

from calotype.plan.sights import Space
from calotype.store import images

_FICLONE = 0x40049409
"""Source: ioctl_ficlone(2), include/uapi/linux/fs.h."""
_CANNOT = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.ENOSYS})
_TRIED_BYTES = 4096


def look(path: Path) -> Space:
    """Look at a folder.

    Raises:
        HostError: It is not there.
    """
    return Space(
        path=str(path),
        free_bytes=images.free_bytes(path),
        is_in_memory=images.is_on_tmpfs(path),
        has_reflinks=has_reflinks(path),
    )


def has_reflinks(folder: Path) -> bool | None:
    """Whether files in a folder can share blocks: tried with two files that never have a name.

    None where that cannot be tried: the folder may not be written to, or is full.
    """
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    opened: list[int] = []
    try:
        opened += [os.open(folder, flags, 0o600), os.open(folder, flags, 0o600)]
        os.write(opened[0], bytes(_TRIED_BYTES))
        fcntl.ioctl(opened[1], _FICLONE, opened[0])
    except OSError as error:
        return False if len(opened) == 2 and error.errno in _CANNOT else None  # noqa: PLR2004
    else:
        return True
    finally:
        for descriptor in opened:
            os.close(descriptor)

"""Who has a file open, and whether for writing: asked of /proc, which waits for nobody.

A file is known by device and inode, so that no other name of it is missed. Source: proc(5), the
`flags` of /proc/PID/fdinfo, in octal as open(2) was given them. A process of another user shows its
files to root alone; how many could not be looked at is told as well.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from calotype.plan.sights import Opener

_Key = tuple[int, int]


def openers(paths: Iterable[str]) -> tuple[tuple[Opener, ...], int]:
    """The processes that have one of these files open, and how many could not be looked at."""
    keys = dict(_keys(paths))
    found: list[Opener] = []
    unseen = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found += _of_process(folder, keys)
        except PermissionError:
            unseen += 1
        except OSError:
            continue  # it has ended
    return tuple(sorted(set(found), key=lambda each: (each.path, each.pid))), unseen


def _keys(paths: Iterable[str]) -> Iterator[tuple[_Key, str]]:
    for path in paths:
        with contextlib.suppress(OSError):
            found = os.stat(path)  # noqa: PTH116 - by name, like what follows
            yield (found.st_dev, found.st_ino), path


def _of_process(folder: Path, keys: Mapping[_Key, str]) -> Iterator[Opener]:
    for link in (folder / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed
            found = link.stat()
            if path := keys.get((found.st_dev, found.st_ino)):
                command = (folder / "comm").read_text(errors="replace").strip()
                yield Opener(path, int(folder.name), command, _may_write(folder, link.name))


def _may_write(folder: Path, number: str) -> bool:
    for line in (folder / "fdinfo" / number).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "flags":
            return int(value, 8) & os.O_ACCMODE != os.O_RDONLY
    return False

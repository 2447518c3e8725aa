"""Who an image is, and how two sightings of it differ.

A name proves nothing: a file can be replaced, resized or written behind its name. So a snapshot
records an `Identity` of each image, and whoever comes back compares it with what is there now.
An identity is cheap (a stat, and of a qcow2 its tables), so it is a strong hint and not a proof;
the proof is a digest of the whole image.

What each field is good for:

* *device* and *inode* name the file itself. A copy moved into its place has another inode. For a
  block device, *device* is the device's own number and the other three of the file system are 0:
  its node is made anew at each boot.
* *mtime_ns* moves with each write, but anyone may set it back, and kernels before 6.13 do not
  tell two writes of one tick (1 to 10 ms) apart. *ctime_ns* nobody can set back, but it also
  moves with chmod, chattr, rename and link: record an image after it was frozen.
* the digests say in which of its parts a qcow2 has changed; they are empty for raw images. Guest
  data in an external data file is another file, with an identity of its own.
"""

from datetime import UTC, datetime, timedelta
from typing import Literal

import msgspec

Format = Literal["raw", "qcow2"]
"""The image formats that Calotype can vouch for."""

Change = Literal["replaced", "resized", "written", "touched", "header", "snapshots"]
"""What happened to an image, in a word; "touched": perhaps only its mode, name or flags."""


class Identity(msgspec.Struct, frozen=True):
    """What an image was at one sighting: sizes in bytes, times in ns since the epoch."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    format: Format
    virtual_size_bytes: int
    header_digest: str = ""
    l1_digest: str = ""
    snapshots_digest: str = ""


_MEANINGS: dict[str, tuple[Change, str]] = {
    "device": ("replaced", "it is on another device: {found} instead of {recorded}"),
    "inode": ("replaced", "it is another file: inode {found} instead of {recorded}"),
    "format": ("replaced", "its format is {found} instead of {recorded}"),
    "virtual_size_bytes": ("resized", "its disk has {found} bytes instead of {recorded}"),
    "size_bytes": ("written", "its file has {found} bytes instead of {recorded}"),
    "mtime_ns": ("written", "it was written at {found}, last known {recorded}"),
    "l1_digest": ("written", "guest data was written: its L1 table has changed"),
    "header_digest": ("header", "its qcow2 header has changed"),
    "snapshots_digest": ("snapshots", "its internal snapshots have changed"),
    "ctime_ns": (
        "touched",
        "its mode, owner, name or content was changed at {found}, last known {recorded}",
    ),
}
"""Field of `Identity` -> what a difference there means; gravest first."""


_TIMES = frozenset({"mtime_ns", "ctime_ns"})
_NS = 10**9


class Difference(msgspec.Struct, frozen=True):
    """One field of an `Identity` that is not what was recorded."""

    field: str
    recorded: int | str
    found: int | str

    @property
    def change(self) -> Change:
        """What this difference means, in a word."""
        return _MEANINGS[self.field][0]

    @property
    def text(self) -> str:
        """What this difference means, in one line."""
        told = _times if self.field in _TIMES else _as_they_are
        recorded, found = told(self.recorded, self.found)
        return _MEANINGS[self.field][1].format(recorded=recorded, found=found)


def _as_they_are(recorded: int | str, found: int | str) -> tuple[str, str]:
    return str(recorded), str(found)


def _times(recorded: int | str, found: int | str) -> tuple[str, str]:
    """Two times in ns, in UTC: to the second, or to the ns where the second is the same."""
    seconds = int(recorded) // _NS, int(found) // _NS
    is_fine = seconds[0] == seconds[1]
    return _time(int(recorded), is_fine), _time(int(found), is_fine)


def _time(since_epoch_ns: int, is_fine: bool) -> str:
    seconds, rest_ns = divmod(since_epoch_ns, _NS)
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    fraction = f".{rest_ns:09}" if is_fine else ""
    return f"{moment:%Y-%m-%dT%H:%M:%S}{fraction}Z"


def differences(recorded: Identity, found: Identity) -> tuple[Difference, ...]:
    """Compare two sightings of an image.

    Args:
        recorded: The one that is trusted.
        found: The one of now.

    Returns:
        The fields that differ, gravest first; empty if nothing is known to have changed.
    """
    pairs = ((field, getattr(recorded, field), getattr(found, field)) for field in _MEANINGS)
    return tuple(Difference(*pair) for pair in pairs if pair[1] != pair[2])

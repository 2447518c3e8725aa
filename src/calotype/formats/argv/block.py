"""What Calotype understands of block options, the keys of -drive and -blockdev, and refuses.

A key that no table names is refused on a writable disk: it may change what the image holds or
where it is. Source: blockdev.c (drive_new and its option lists), block.c (bdrv_runtime_opts),
block/file-posix.c, and BlockdevOptions in qapi/block-core.json.
"""

from collections.abc import Mapping
from typing import Any

from calotype.formats.argv.line import Argument
from calotype.formats.options import text_of

SHORTHANDS: dict[str, dict[str, str]] = {
    "hda": {"index": "0", "media": "disk"},
    "hdb": {"index": "1", "media": "disk"},
    "hdc": {"index": "2", "media": "disk"},
    "hdd": {"index": "3", "media": "disk"},
    "cdrom": {"index": "2", "media": "cdrom"},
    "fda": {"if": "floppy", "index": "0"},
    "fdb": {"if": "floppy", "index": "1"},
    "sd": {"if": "sd"},
    "mtdblock": {"if": "mtd"},
    "pflash": {"if": "pflash"},
}
"""Option -> the keys of the -drive that it stands for, besides `file` (system/vl.c)."""

PROTOCOLS: frozenset[str] = frozenset({"file", "host_device", "host_cdrom"})
"""The drivers of files and block devices."""

NULLS: frozenset[str] = frozenset({"null-co", "null-aio"})
"""The drivers of disks that hold nothing."""

FORMAT_KEYS: dict[str, frozenset[str]] = {
    "raw": frozenset({"offset", "size"}),
    "qcow2": frozenset({
        "cache-clean-interval", "cache-size", "discard-no-unref", "l2-cache-entry-size",
        "l2-cache-size", "lazy-refcounts", "overlap-check", "pass-discard-other",
        "pass-discard-request", "pass-discard-snapshot", "refcount-cache-size",
    }),
}  # fmt: skip
"""Format -> the keys that only it has, by their first fragment."""

PROTOCOL_KEYS: frozenset[str] = frozenset({
    "aio", "aio-max-batch", "drop-cache", "filename", "locking", "pr-manager",
    "x-check-cache-dropped",
})  # fmt: skip
"""The keys that only files and block devices have; all others may stay on the format node."""

_SHORT_WAYS = {"total": "", "read": "_rd", "write": "_wr"}
_NODE_KEYS = frozenset({
    "active", "auto-read-only", "cache.direct", "cache.no-flush", "detect-zeroes", "discard",
    "driver", "force-share", "node-name", "read-only",
})  # fmt: skip
LIMIT_KEYS: frozenset[str] = frozenset({"group", "iops_size", "throttling.group"}) | {
    key
    for unit in ("bps", "iops")
    for way in ("total", "read", "write")
    for key in (
        f"{unit}{_SHORT_WAYS[way]}",
        f"{unit}{_SHORT_WAYS[way]}_max",
        f"{unit}{_SHORT_WAYS[way]}_max_length",
        f"throttling.{unit}-{way}",
        f"throttling.{unit}-{way}-max",
        f"throttling.{unit}-{way}-max-length",
        "throttling.iops-size",
    )
}
"""The limits of a -drive: they belong to the device's side and stay, whatever the image."""

FILTER_KEYS: dict[str, frozenset[str]] = {
    "throttle": _NODE_KEYS | {"file", "throttle-group"},
    "copy-on-read": _NODE_KEYS | {"file"},
}
"""Filter that an overlay passes below -> the keys that its -blockdev may have."""

_DRIVE_KEYS = _NODE_KEYS | LIMIT_KEYS | {
    "aio", "bus", "cache", "cache.writeback", "copy-on-read", "file", "format", "id", "if",
    "index", "media", "readonly", "rerror", "snapshot", "stats-account-failed",
    "stats-account-invalid", "unit", "werror",
}  # fmt: skip
_FILE_KEYS = _NODE_KEYS | PROTOCOL_KEYS

KNOWN_KEYS: dict[str, frozenset[str]] = {
    "drive": _DRIVE_KEYS | {f"file.{key}" for key in _FILE_KEYS},
    "format node": _NODE_KEYS | {"file"} | {f"file.{key}" for key in _FILE_KEYS},
    "file node": _FILE_KEYS,
}
"""What the options belong to -> the keys that a writable disk may have there, of any format."""

_REASONS: dict[str, str] = {
    "backing": "what an image stands on is read from the image itself",
    "data-file": "an image in two files cannot be frozen as one",
    "encrypt": "encrypted images are not supported: an overlay would hold the guest's writes in"
    " the clear",
    "offset": "a part of a file cannot be frozen on its own",
    "size": "a part of a file cannot be frozen on its own",
}
_SWITCHES: dict[str, str] = {
    "copy-on-read": "the image would be written to behind the guest's back",
    "snapshot": "the disk's writes would go to a file that is gone when QEMU ends",
}
_FILES_ONLY = "Calotype freezes raw and qcow2 images in files or on block devices: use one"


def is_on(options: Mapping[str, Any], key: str) -> bool:
    """Whether the switch *key* is on, in any spelling that QEMU takes."""
    return text_of(options.get(key)) in {"on", "yes", "true", "y"}


def check_driver(argument: Argument, driver: str, allowed: frozenset[str]) -> None:
    """Refuse a *driver* that is not among the *allowed* ones.

    Raises:
        CommandLineError: It is a filter, a network protocol or another format.
    """
    if driver not in allowed:
        raise argument.refused(f"driver '{driver}' is none of {sorted(allowed)}", _FILES_ONLY)


def check_filename(argument: Argument, filename: str, *, literal: bool) -> None:
    """Refuse a *filename* that does not name a file.

    Args:
        argument: Where it stands.
        filename: As written.
        literal: Whether QEMU takes it literally; else a colon before the first slash ends the
            name of a protocol (block.c, path_has_protocol).

    Raises:
        CommandLineError: It has a protocol, or it is a passed file descriptor.
    """
    before_slash = filename.partition("/")[0]
    if ":" in before_slash and not literal:
        protocol = before_slash.partition(":")[0]
        remedy = f"{_FILES_ONLY}; a file of that name is written ./{filename}"
        raise argument.refused(f"QEMU takes '{protocol}:' as a protocol", remedy)
    if filename.startswith("/dev/fdset/"):
        raise argument.refused("a passed file cannot be opened again", "name the image itself")


def check_keys(argument: Argument, options: Mapping[str, Any], owner: str) -> None:
    """Refuse what may not stand on a writable disk.

    Args:
        argument: Where the options stand.
        options: Flat.
        owner: What they belong to, a key of `KNOWN_KEYS`.

    Raises:
        CommandLineError: A key is unknown, or known to stand in the way.
    """
    for key in options:
        stem = key.partition(".")[0]
        if reason := _REASONS.get(stem) or (is_on(options, key) and _SWITCHES.get(key)):
            raise argument.refused(f"{key}: {reason}", f"leave {key} out")
        if key not in KNOWN_KEYS[owner] and stem not in FORMAT_KEYS["qcow2"]:
            raise argument.refused(f"Calotype does not know {key}", f"leave {key} out")

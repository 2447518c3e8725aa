"""Disk images as files of this host: who they are, what they stand on, keeping them as they are.

* An image is only ever read here, never written: writing is QEMU's business. What changes is its
  protection (`freeze`, `thaw`), never its content, its name or its place: QEMU opens images by
  path again, so a path that changes hands under a running QEMU destroys data.
* Opening must not hang on a pipe that took the image's place, nor be fooled by one: only regular
  files and block devices are images. Symbolic links are followed, as QEMU does.
* Facts about the file are read before its content: if somebody writes meanwhile, the older time is
  recorded, and the next comparison tells of a write too many, never of one too few.
* A frozen image has mode 0444, less what those who might not read it before would gain. That stops
  everybody but root; QEMU often is root, so the immutable flag goes with it where the file system
  has one and we may set it. On ext4 and others it also stops those who hold the file open for
  writing: freeze an image only when QEMU holds it read-only.
"""

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from blake3 import blake3
from msgspec.structs import replace

from calotype.errors import CommandLineError, HostError, StoreError
from calotype.formats import qcow2
from calotype.model.identity import Format, Identity
from calotype.store.files import host_errors

MAX_CHAIN_LENGTH = 200
"""The longest chain of backing files that is followed."""

DIGEST_CHUNK_BYTES = 1 << 20

_SECTOR_BYTES = 512
_READ_ONLY_MODE = 0o444

_LONG_BYTES = struct.calcsize("l")
_FS_IOC_GETFLAGS = 2 << 30 | _LONG_BYTES << 16 | ord("f") << 8 | 1
_FS_IOC_SETFLAGS = 1 << 30 | _LONG_BYTES << 16 | ord("f") << 8 | 2
_FS_IMMUTABLE_FL = 0x10
_NO_FLAGS = frozenset({errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM})
"""The file system has no such flag, or we may not set it; anything else is a failure."""

Value = TypeVar("Value")


Protection = Literal["immutable", "read-only", "writable", "missing", "unknown"]
"""How an image is kept from being written to; read-only is by its mode alone, and not for root."""

_CAP_LINUX_IMMUTABLE = 9
_NO_DISKS = {
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


class Frozen(msgspec.Struct, frozen=True):
    """What a freeze changes, hence what `thaw` has to put back.

    *mode_before* holds the permission bits that the file had. *immutable* says that the immutable
    flag was set by the freeze; False also if it stood there before, and is then not ours to clear.
    """

    mode_before: int
    immutable: bool


def identify(path: Path, format: Format) -> Identity:  # noqa: A002 - QEMU's own word for it
    """Say who an image is, from its file's facts and, of a qcow2, its tables.

    Args:
        path: The image: a file or a block device.
        format: How QEMU reads it; never guessed here, since a guest writes what a guess reads.

    Raises:
        HostError: It is missing, may not be read, or is not a file.
        StoreError: It is not a sound qcow2 image; `path`, `offset`, `reason` are in its data.
    """
    with _opened(path) as fd:
        identity = _file_identity(fd, format)
        if format == "raw":
            return identity
        metadata = _parse(path, fd, qcow2.read_metadata())
    return replace(
        identity,
        virtual_size_bytes=metadata.header.virtual_size_bytes,
        header_digest=metadata.header.digest,
        l1_digest=metadata.l1_digest,
        snapshots_digest=metadata.snapshots_digest,
    )


def read_metadata(path: Path) -> qcow2.Metadata:
    """Read what a qcow2 image says about itself.

    Raises:
        HostError: As `identify`.
        StoreError: As `identify`.
    """
    with _opened(path) as fd:
        return _parse(path, fd, qcow2.read_metadata())


def probe_format(path: Path) -> Format:
    """Guess an image's format as QEMU does: qcow2 by its first bytes, else raw.

    A guest can write a qcow2 header into its raw disk: ask only where nobody knows the format.

    Raises:
        HostError: As `identify`.
    """
    magic = struct.Struct(">4sI")
    with _opened(path) as fd:
        start = os.pread(fd, magic.size, 0)
    is_qcow2 = len(start) == magic.size and start[:4] == qcow2.MAGIC and magic.unpack(start)[1] > 1
    return "qcow2" if is_qcow2 else "raw"


def backing_chain(path: Path, format: Format) -> list[tuple[Path, Format]]:  # noqa: A002 - QEMU's own word for it
    """Follow an image's backing files down to the one that stands on nothing.

    A relative name is relative to the directory of the image that names it. The format is the one
    noted beside the name; where there is none it is probed, as QEMU does.

    Args:
        path: The image on top.
        format: Its format.

    Returns:
        All images of the chain with their formats, the one on top first.

    Raises:
        HostError: An image is missing or may not be read.
        StoreError: The chain is a loop, or too long; an image is not sound; a backing file is named
            by a protocol or has a format that Calotype cannot vouch for.
    """
    chain: list[tuple[Path, Format]] = []
    seen: set[tuple[int, int]] = set()
    link: tuple[Path, Format] | None = (path, format)
    while link:
        with _opened(link[0]) as fd:
            _refuse_loop(link[0], fd, seen)
            chain.append(link)
            link = _backing(*link, fd)
    return chain


def freeze(path: Path) -> Frozen:
    """Make an image read-only, for root too where the file system can; idempotent.

    Mode and flag belong to the inode: they are durable when this returns, no name was changed.

    Returns:
        What was changed. Only the first of several freezes knows the mode from before: a journal
        takes it from `before_freeze`, ahead of the effect.

    Raises:
        HostError: It is missing, no regular file, or not ours to change.
    """
    with _opened(path) as fd:
        before = _protection(path, fd)
        if not before.immutable:
            return Frozen(before.mode_before, immutable=False)
        if before.mode_before & ~_READ_ONLY_MODE:
            os.fchmod(fd, before.mode_before & _READ_ONLY_MODE)
        was_set = _set_immutable(fd)
        os.fsync(fd)
    return Frozen(before.mode_before, immutable=was_set)


def before_freeze(path: Path) -> Frozen:
    """Say what a freeze would change: what `thaw` needs to undo it, done, half-done or not begun.

    Raises:
        HostError: As `freeze`.
    """
    with _opened(path) as fd:
        return _protection(path, fd)


def thaw(path: Path, frozen: Frozen) -> None:
    """Put back what a freeze changed; idempotent, and right also if the freeze never happened.

    Raises:
        HostError: It is missing, no regular file, or not ours to change.
    """
    with _opened(path) as fd:
        now = _protection(path, fd)
        if frozen.immutable:
            _clear_immutable(fd)
        if now.mode_before != frozen.mode_before:
            os.fchmod(fd, frozen.mode_before)
        os.fsync(fd)


def protection(path: Path) -> Protection:
    """Say how an image is protected now; it never fails, for it is asked only to be told."""
    if not path.exists():
        return "missing"
    try:
        now = before_freeze(path)
    except HostError:
        return "unknown"
    if not now.immutable:
        return "immutable"
    return "writable" if now.mode_before & ~_READ_ONLY_MODE else "read-only"


def may_be_immutable(path: Path) -> bool:
    """Whether a freeze could make this image immutable; nothing is changed to find out.

    Source: capabilities(7), ioctl_iflags(2). In a user namespace the answer may be too good.

    Raises:
        HostError: As `identify`.
    """
    with _opened(path) as fd:
        return _flags(fd) is not None and _has_capability(_CAP_LINUX_IMMUTABLE)


def may_create_in(folder: Path) -> bool:
    """Whether we may create a file in a folder; nothing is changed to find out."""
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        return False
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # one that may be written need not be one that may be read
        return True
    try:
        return not (_flags(fd) or 0) & _FS_IMMUTABLE_FL
    finally:
        os.close(fd)


def _has_capability(number: int) -> bool:
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next(line for line in lines if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> number & 1)


def require_disk(path: Path) -> None:
    """Refuse what cannot be a disk that is snapshotted: only a file or a block device can.

    It is not opened: opening some devices has effects.

    Raises:
        HostError: Nothing is there, or it may not be looked at.
        CommandLineError: It is neither.
    """
    with host_errors(path):
        kind = stat.S_IFMT(path.stat().st_mode)
    if kind in _NO_DISKS:
        raise CommandLineError(
            f"{path} is {_NO_DISKS[kind]}, which holds no disk",
            "name a file or a block device; for an empty disk, a null-co node",
            path=str(path),
        )


def free_bytes(path: Path) -> int:
    """How much an ordinary user may still write to the file system of *path*, a file or directory.

    Raises:
        HostError: Nothing is there.
    """
    with host_errors(path):
        facts = os.statvfs(path)
    return facts.f_bavail * facts.f_frsize


def is_on_tmpfs(path: Path) -> bool:
    """Whether a file is on tmpfs, and so in memory; one that is missing is not.

    Source: the lines of /proc/self/mountinfo, as proc(5) lays them out.
    """
    try:
        device = path.stat().st_dev
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    fields = [mount.split() for mount in mounts]
    return any(row[2] == number and row[row.index("-") + 1] == "tmpfs" for row in fields)


def mode(path: Path) -> int:
    """Look up the permission bits of an image.

    Raises:
        HostError: Nothing is there.
    """
    with host_errors(path):
        return stat.S_IMODE(path.stat().st_mode)


def allocated_bytes(path: Path) -> int:
    """How much space an image takes on the host: less than its size where it has holes.

    Raises:
        HostError: As `identify`.
    """
    with _opened(path) as fd:
        found = os.fstat(fd)
        is_device = stat.S_ISBLK(found.st_mode)
        return os.lseek(fd, 0, os.SEEK_END) if is_device else found.st_blocks * _SECTOR_BYTES


def sync_data(path: Path) -> float:
    """Write an image's dirty page cache to its disk, from outside, so that QEMU has less to flush.

    Returns:
        How long it took, in ms.

    Raises:
        HostError: As `identify`; also if the disk failed.
    """
    with _opened(path) as fd:
        start = time.monotonic()
        os.fdatasync(fd)
        return (time.monotonic() - start) * 1000


def digest(path: Path, chunk: int = DIGEST_CHUNK_BYTES) -> str:
    """Compute the BLAKE3 of a whole image or file, in hex.

    Args:
        path: The file or block device; holes count as zeros.
        chunk: How many bytes to hold in memory.

    Raises:
        HostError: As `identify`; also if the disk failed.
    """
    hasher = blake3(max_threads=2)
    buffer = bytearray(chunk)
    with _opened(path) as fd, memoryview(buffer) as view:
        while length := os.readv(fd, [buffer]):
            hasher.update(view[:length])
    return hasher.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a file or block device for reading; failures of the block are failures of *path*."""
    with host_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            _require(path, fd, stat.S_ISREG, stat.S_ISBLK)
            yield fd
        finally:
            os.close(fd)


def _require(path: Path, fd: int, *kinds: Callable[[int], bool]) -> None:
    mode = os.fstat(fd).st_mode
    if not any(is_kind(mode) for is_kind in kinds):
        raise HostError(
            f"{path}: not a file that can be used so ({stat.filemode(mode)})",
            "name a regular file, or a block device where one will do",
            path=str(path),
        )


def _file_identity(fd: int, format: Format) -> Identity:  # noqa: A002 - QEMU's own word for it
    """What the file system knows of an image, its disk taken to be the file in whole sectors."""
    found = os.fstat(fd)
    is_device = stat.S_ISBLK(found.st_mode)
    size_bytes = os.lseek(fd, 0, os.SEEK_END)
    return Identity(
        device=found.st_rdev if is_device else found.st_dev,
        inode=0 if is_device else found.st_ino,
        size_bytes=size_bytes,
        mtime_ns=0 if is_device else found.st_mtime_ns,
        ctime_ns=0 if is_device else found.st_ctime_ns,
        format=format,
        virtual_size_bytes=-(-size_bytes // _SECTOR_BYTES) * _SECTOR_BYTES,
    )


def _parse(path: Path, fd: int, parser: Generator[qcow2.Need, bytes, Value]) -> Value:
    """Run a parser on an open image; its error tells the path."""
    try:
        return qcow2.drive(parser, lambda offset, length: os.pread(fd, length, offset))
    except StoreError as error:
        raise StoreError(
            f"{path}: {error.problem}", error.remedy, path=str(path), **error.data
        ) from error


def _refuse_loop(path: Path, fd: int, seen: set[tuple[int, int]]) -> None:
    """Note an image of a chain as seen."""
    found = os.fstat(fd)
    this = (found.st_dev, found.st_ino)
    if this in seen or len(seen) == MAX_CHAIN_LENGTH:
        fault = "is its own backing file" if this in seen else "stands on too many backing files"
        raise StoreError(
            f"{path}: {fault}",
            "name another backing file for one of them ('qemu-img rebase -u')",
            path=str(path),
        )
    seen.add(this)


def _backing(path: Path, format: Format, fd: int) -> tuple[Path, Format] | None:  # noqa: A002
    """The image that this one stands on."""
    if format == "raw":
        return None
    header = _parse(path, fd, qcow2.read_header())
    if header.backing_file is None:
        return None
    if _has_protocol(header.backing_file):
        raise _unfollowed(path, "is not named by a plain path", header.backing_file)
    backing = path.parent / header.backing_file
    match header.backing_format:
        case None:
            return backing, probe_format(backing)
        case "raw" | "qcow2" as named:
            return backing, named
        case other:
            raise _unfollowed(path, f"has the format {other}", header.backing_file)


def _has_protocol(name: str) -> bool:
    """Whether QEMU takes *name* for PROTOCOL:REST (or json:...) and not for a path."""
    return ":" in name.partition("/")[0]


def _unfollowed(path: Path, fault: str, name: str) -> StoreError:
    return StoreError(
        f"{path}: its backing file {fault}: {name}",
        "give it a raw or qcow2 file: 'qemu-img rebase -u -b PATH -F FORMAT IMAGE'",
        path=str(path),
        backing_file=name,
    )


def _protection(path: Path, fd: int) -> Frozen:
    """What a freeze of this file would change."""
    _require(path, fd, stat.S_ISREG)
    flags = _flags(fd)
    is_immutable = flags is not None and bool(flags & _FS_IMMUTABLE_FL)
    return Frozen(stat.S_IMODE(os.fstat(fd).st_mode), immutable=not is_immutable)


def _flags(fd: int) -> int | None:
    """The inode's flags; None where the file system has none."""
    buffer = bytearray(_LONG_BYTES)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, buffer)
    except OSError as error:
        if error.errno in _NO_FLAGS:
            return None
        raise
    (flags,) = struct.unpack_from("i", buffer)
    return int(flags)


def _set_immutable(fd: int) -> bool:
    """Set the immutable flag; say whether that was possible."""
    flags = _flags(fd)
    if flags is None:
        return False
    try:
        _write_flags(fd, flags | _FS_IMMUTABLE_FL)
    except OSError as error:
        if error.errno in _NO_FLAGS:
            return False
        raise
    return True


def _clear_immutable(fd: int) -> None:
    """Clear the immutable flag if it is set; that we may not is a failure."""
    flags = _flags(fd)
    if flags is not None and flags & _FS_IMMUTABLE_FL:
        _write_flags(fd, flags & ~_FS_IMMUTABLE_FL)


def _write_flags(fd: int, flags: int) -> None:
    fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("i", flags).ljust(_LONG_BYTES, b"\0"))

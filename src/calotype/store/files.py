"""Durable, private files: what is said to be written is still there after a power cut.

A name is durable only when its directory was synced, bytes only when their file was; a reader of
a file written by `write_atomically` finds the old bytes or the new ones, never a mixture:

    temporary file (O_EXCL) -> write -> fsync -> rename -> fsync of the directory

A crash before the rename leaves a file whose name starts with `TEMPORARY_PREFIX`; nobody refers to
it and anybody may remove it. Failures of the host become a `HostError` here, once.
"""

import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calotype.errors import HostError

TEMPORARY_PREFIX = ".calotype-"

_PRIVATE_FILE_MODE = 0o600
_PRIVATE_DIRECTORY_MODE = 0o700
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
_REMEDIES = {
    errno.ENOENT: "check the path: nothing is there",
    errno.ENOTDIR: "check the path: a part of it is not a directory",
    errno.EEXIST: "remove what is there, or choose another name",
    errno.EACCES: "run as a user who may do this, or grant the permission",
    errno.EPERM: "run as a user who may do this, or clear the immutable flag (chattr -i)",
    errno.EROFS: "remount the file system for writing, or choose another place",
    errno.ENOSPC: "free some space on that file system",
    errno.EDQUOT: "free some space, or raise the quota",
    errno.EIO: "look into the kernel log: the disk below may be failing",
}


@contextmanager
def host_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `HostError` about *path*.

    Raises:
        HostError: With `path` and the name of the `errno` in its data.
    """
    try:
        yield
    except OSError as error:
        raise host_error(path, error) from error


def host_error(path: Path | str, error: OSError) -> HostError:
    """The error of ours for what the system said of *path*."""
    number = error.errno or 0
    return HostError(
        f"{path}: {error.strerror or error}",
        _REMEDIES.get(number, "look into the kernel log, and whether the file system is sound"),
        path=str(path),
        errno=errno.errorcode.get(number, str(number)),
    )


def write_atomically(path: Path, data: bytes, mode: int = _PRIVATE_FILE_MODE) -> None:
    """Put *data* at *path*, durably and all at once; what was there is replaced.

    A symbolic link at *path* is replaced, not followed. If only the last step fails (the sync of
    the directory), the new bytes are visible but may be lost by a power cut.

    Args:
        path: Where; its directory must exist.
        data: The whole content.
        mode: The permissions of the file, whatever the umask.

    Raises:
        HostError: It could not be written; *path* is as it was, but for the case above.
    """
    temporary = path.with_name(TEMPORARY_PREFIX + secrets.token_hex(8))
    fd = create_private(temporary)
    with host_errors(path):
        try:
            _fill(fd, data, mode)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_directory(path.parent)


def make_private_directory(path: Path) -> None:
    """Make *path* a directory that only its owner may enter, durably; idempotent.

    Missing parents are made in the same way; a directory that exists becomes private, its parents
    stay as they are. A symbolic link at *path* is refused.

    Raises:
        HostError: It cannot be made, or something else is there.
    """
    if not path.parent.exists():
        make_private_directory(path.parent)
    with host_errors(path):
        try:
            path.mkdir(_PRIVATE_DIRECTORY_MODE)
        except FileExistsError:
            _make_private(path)
            return
    sync_directory(path.parent)


def create_private(path: Path) -> int:
    """Create a file that only its owner may read, for writing.

    The caller closes it, syncs it, and syncs its directory.

    Returns:
        The file descriptor: write-only, not inherited by other programs.

    Raises:
        HostError: It cannot be made, or exists.
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    with host_errors(path):
        return os.open(path, flags, _PRIVATE_FILE_MODE)


def require_free(path: Path) -> None:
    """Refuse to put something where something is already, be it a link to nothing.

    Raises:
        HostError: Something is there, or there is no such directory.
    """
    with host_errors(path):
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"there is no directory {path.parent}")
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "something is there already")


def publish(temporary: Path, path: Path) -> None:
    """Give a file that is complete and durable its own name, durably; nothing is ever replaced.

    The caller removes the temporary name, which may be gone by then.

    Raises:
        HostError: Something is at *path*; or the file system cannot do that.
    """
    with host_errors(path):
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            _rename_to_free(temporary, path)
    sync_directory(path.parent)


def _rename_to_free(old: Path, new: Path) -> None:
    """Rename, unless something is at *new*: for file systems without hard links, such as FAT.

    Source: renameat2(2).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def sync_directory(path: Path) -> None:
    """Make the names in *path* durable: files made, renamed and removed there.

    Raises:
        HostError: It is no directory, or the disk failed.
    """
    with host_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _fill(fd: int, data: bytes, mode: int) -> None:
    """Write all of *data* to *fd*, sync and close it."""
    try:
        os.fchmod(fd, mode)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_private(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if stat.S_IMODE(os.fstat(fd).st_mode) != _PRIVATE_DIRECTORY_MODE:
            os.fchmod(fd, _PRIVATE_DIRECTORY_MODE)
    finally:
        os.close(fd)

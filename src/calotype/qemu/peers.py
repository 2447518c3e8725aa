"""Who is connected to a unix socket: asked of the kernel, for an error that names him.

A QEMU monitor serves one client, and a second one waits for a greeting for ever. The kernel tells
of each connected socket which file it was bound to and the inode of its peer (sock_diag(7);
include/uapi/linux/unix_diag.h); who holds a socket with that inode is in /proc/PID/fd.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_AND_DUMP = 0x301
_ESTABLISHED = 1 << 1
_SHOW_VFS, _SHOW_PEER = 0x02, 0x04
_VFS, _PEER = 1, 2

_PATIENCE_S = 1.0

_HEADER = struct.Struct("=IHHII")
"""nlmsghdr: length, type, flags, sequence, port."""
_QUESTION = struct.Struct("=BBHIIIII")
"""unix_diag_req: family, protocol, padding, states, inode, what to show, cookie (two words)."""
_ANSWER_BYTES = 16
"""unix_diag_msg: family, type, state, padding, inode, cookie; attributes follow."""
_ATTRIBUTE = struct.Struct("=HH")
"""rtattr: length with this header, type; padded to four bytes."""
_WORD = struct.Struct("=I")


def clients(path: Path) -> list[int]:
    """The pids of the others that are connected to the unix socket at *path*.

    Empty where the kernel does not tell, or not of somebody else's processes.
    """
    try:
        inode = path.stat().st_ino & 0xFFFFFFFF
        peers = {f"socket:[{peer}]" for peer in _peers(inode)}
    except (OSError, struct.error):
        return []
    return sorted(pid for pid in _holders(peers) if pid != os.getpid())


def _peers(inode: int) -> Iterator[int]:
    """The socket at the other end of each connection to the one that is bound to file *inode*."""
    question = _QUESTION.pack(
        socket.AF_UNIX, 0, 0, _ESTABLISHED, 0, _SHOW_VFS | _SHOW_PEER, 0xFFFFFFFF, 0xFFFFFFFF
    )
    header = _HEADER.pack(
        _HEADER.size + len(question), _SOCK_DIAG_BY_FAMILY, _REQUEST_AND_DUMP, 1, 0
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(_PATIENCE_S)
        kernel.sendall(header + question)
        while data := kernel.recv(1 << 16):
            for kind, message in _messages(data):
                if kind != _SOCK_DIAG_BY_FAMILY:
                    return
                told = dict(_attributes(message[_ANSWER_BYTES:]))
                if _VFS in told and _PEER in told and _word(told[_VFS]) == inode:
                    yield _word(told[_PEER])


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(data)
        yield kind, data[_HEADER.size : length]
        data = data[_aligned(length) :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        yield kind, data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]


def _aligned(length: int) -> int:
    """Where what follows *length* bytes begins; never here, whatever the length says."""
    return max(4, (length + 3) & ~3)


def _word(data: bytes) -> int:
    (word,) = _WORD.unpack_from(data)
    return int(word)


def _holders(links: set[str]) -> Iterator[int]:
    """The processes that have one of these open."""
    for folder in Path("/proc").glob("[0-9]*/fd") if links else ():
        with contextlib.suppress(OSError):
            if any(str(link.readlink()) in links for link in folder.iterdir()):
                yield int(folder.parent.name)

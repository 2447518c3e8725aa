"""A connected socket on the event loop: bytes and file descriptors, both ways, bounded.

asyncio's transports lose the descriptors that come with bytes (SCM_RIGHTS, unix(7)), and QMP needs
them: `getfd` and `add-fd` take what came with them. So this reads with recvmsg(2) and writes with
sendmsg(2) itself. What cannot be written yet is kept, up to a limit: who does not read is cut off.
"""

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

UNSENT_BYTES = 16 << 20
"""How much is kept for one who does not read; QEMU's longest answers have less than a tenth."""
MOST_DESCRIPTORS = 16
"""As many as QEMU takes at once (chardev/char-socket.c, TCP_MAX_FDS)."""

Heard = Callable[[bytes, list[int]], None]


class Channel:
    """One end of a connection; reading begins at once.

    Args:
        connection: A stream socket, which belongs to the channel from now on.
        heard: Called with what came; the descriptors are the callee's to close.
        ended: Called once, when the connection is over, whoever ended it.
        finished: Called when the other has said all that it will, and may still read; without it
            the connection is closed then.
        unsent_bytes: How much is kept that is not read, before the other is cut off; None: all.
        read_bytes: How much is read at once: between two reads everybody else has a turn.
    """

    def __init__(
        self,
        connection: socket.socket,
        heard: Heard,
        ended: Callable[[], None],
        *,
        finished: Callable[[], None] | None = None,
        unsent_bytes: int | None = UNSENT_BYTES,
        read_bytes: int = 1 << 16,
    ) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._heard = heard
        self._ended = ended
        self._finished = finished
        self._read_bytes = read_bytes
        self._limit_bytes = unsent_bytes
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._unsent_bytes = 0
        self._is_ending = False
        self._is_read = False
        """The other has said all that it will."""
        self.is_open = True
        self._loop.add_reader(connection, self._read)

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send *data*, with copies of *descriptors* beside its first byte; or cut the other off."""
        if not self.is_open or not data:
            return
        copies = tuple(os.dup(each) for each in descriptors)
        self._unsent.append((memoryview(data), copies))
        self._unsent_bytes += len(data)
        if len(self._unsent) == 1:
            self._write()
        if self._limit_bytes is not None and self._unsent_bytes > self._limit_bytes:
            self.close()

    def hold(self) -> None:
        """Read no more until `go_on`."""
        if self.is_open:
            self._loop.remove_reader(self._connection)

    def go_on(self) -> None:
        """Read again."""
        if self.is_open and not self._is_read:
            self._loop.add_reader(self._connection, self._read)

    def end(self) -> None:
        """Close once all is sent."""
        self._is_ending = True
        if not self._unsent:
            self.close()

    def close(self) -> None:
        """Close now; what was not sent is lost."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        self._connection.close()
        for _, descriptors in self._unsent:
            _close(descriptors)
        self._unsent.clear()
        self._ended()

    def _read(self) -> None:
        try:
            data, descriptors = self._received()
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if data:
            self._heard(data, descriptors)
        elif self._finished is not None:
            self._loop.remove_reader(self._connection)
            self._is_read = True
            self._finished()
        else:
            self.close()

    def _received(self) -> tuple[bytes, list[int]]:
        if self._connection.family != socket.AF_UNIX:
            return self._connection.recv(self._read_bytes), []
        data, descriptors, _, _ = socket.recv_fds(
            self._connection, self._read_bytes, MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
        return data, descriptors

    def _write(self) -> None:
        """Write as much as can be; the rest when the other has read."""
        while self._unsent:
            data, descriptors = self._unsent[0]
            try:
                written = self._wrote(data, descriptors)
            except BlockingIOError:
                self._loop.add_writer(self._connection, self._write)
                return
            except OSError:
                self.close()
                return
            _close(descriptors)
            self._unsent_bytes -= written
            if written == len(data):
                self._unsent.popleft()
            else:
                self._unsent[0] = (data[written:], ())
        self._loop.remove_writer(self._connection)
        if self._is_ending:
            self.close()

    def _wrote(self, data: memoryview, descriptors: Sequence[int]) -> int:
        if descriptors:
            return socket.send_fds(self._connection, [data], list(descriptors))
        return self._connection.send(data)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)

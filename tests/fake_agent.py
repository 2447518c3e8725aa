"""A guest agent played in a thread, on a socket: one that is right, and each way of being wrong.

It takes one client at a time and one command after another, as the real one does, and remembers
what it was told: whether file systems are frozen, and what time it is. It answers the delimiter
with an error, as the real one was seen to.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FREEZING = tuple(f"guest-fsfreeze-{verb}" for verb in ("freeze", "status", "thaw"))
PATIENCE_S = 20.0


class FakeAgent:
    """An agent with two file systems; it serves the socket *path*, in place of what is there.

    Args:
        path: The socket.
        instead: What is done in place of a command, by its name: called with the connection, and
            its value is the answer unless it is None.
    """

    def __init__(
        self, path: Path, instead: dict[str, Callable[[socket.socket], Any]] | None = None
    ) -> None:
        self.instead = instead or {}
        self.frozen = 0
        self.commands: tuple[str, ...] = FREEZING
        self.asked: list[str] = []
        self.time_ns = 0
        self.stale = b""
        """What a client hears first that nobody asked for."""
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        self._listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)
        self._listener.listen(4)
        self._client: socket.socket | None = None
        self._serving = threading.Thread(target=self._serve, daemon=True)
        self._serving.start()

    def end(self) -> None:
        """Go away, as QEMU would."""
        for each in (self._listener, self._client):
            if each is not None:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()
        self._serving.join(PATIENCE_S)

    def is_thawed(self) -> bool:
        """Whether it is thawed in the end, without being told by the test."""
        deadline = time.monotonic() + PATIENCE_S
        while self.frozen and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.frozen

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._client, _ = self._listener.accept()
                with self._client, contextlib.suppress(OSError, ValueError):
                    self._client.sendall(self.stale)
                    for line in self._client.makefile("rb"):
                        self._obey(self._client, line)

    def _obey(self, client: socket.socket, line: bytes) -> None:
        if line.startswith(b"\xff"):
            client.sendall(b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n')
        told = json.loads(line.lstrip(b"\xff"))
        command = told["execute"]
        self.asked.append(command)
        if command in self.instead:
            value = self.instead[command](client)
            if value is not None:
                client.sendall(value)
            return
        is_sync = command == "guest-sync-delimited"
        try:
            answer = {"return": self._answer(command, told.get("arguments", {}))}
        except ValueError as error:
            answer = {"error": {"class": "GenericError", "desc": str(error)}}
        client.sendall(b"\xff" * is_sync + json.dumps(answer).encode() + b"\n")

    def _answer(self, command: str, arguments: dict[str, Any]) -> Any:
        match command:
            case "guest-sync-delimited":
                return arguments["id"]
            case "guest-info":
                listed = [{"name": name, "enabled": True} for name in self.commands]
                return {"version": "10.0.0", "supported_commands": listed}
            case "guest-fsfreeze-status":
                return "frozen" if self.frozen else "thawed"
            case "guest-fsfreeze-freeze":
                self.frozen = 2
                return 2
            case "guest-fsfreeze-thaw":
                thawed, self.frozen = self.frozen, 0
                return thawed
            case "guest-set-time":
                self.time_ns = arguments["time"]
        return {}


def refused(text: str) -> bytes:
    """The answer of one who refuses."""
    return json.dumps({"error": {"class": "GenericError", "desc": text}}).encode() + b"\n"

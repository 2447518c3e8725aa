"""What the tests of the service share: it runs as a user starts it, and a client that counts."""

import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from calotype.testing.machine import Machine, wait

PATIENCE_S = 60.0
AnyMachine = TypeVar("AnyMachine", bound=Machine)


class Qmp:
    """A client: it negotiates, and keeps the events that came between answers."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(str(path))
        self._lines = self.socket.makefile("rb")
        self.events: list[dict[str, Any]] = []
        self.greeting = self.read()
        self.ask("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self.socket.close()

    def read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise EOFError
        told: dict[str, Any] = json.loads(line)
        return told

    def send(self, command: str, fd: int | None = None, **arguments: Any) -> None:
        spelled = {name.replace("_", "-"): value for name, value in arguments.items()}
        line = json.dumps({"execute": command, "arguments": spelled, "id": command}).encode()
        if fd is None:
            self.socket.sendall(line)
        else:
            socket.send_fds(self.socket, [line], [fd])

    def answer(self) -> dict[str, Any]:
        """The next answer; events that come before it are kept."""
        while "event" in (message := self.read()):
            self.events.append(message)
        return message

    def tell(self, command: str, fd: int | None = None, **arguments: Any) -> dict[str, Any]:
        self.send(command, fd, **arguments)
        return self.answer()

    def ask(self, command: str, fd: int | None = None, **arguments: Any) -> Any:
        answer = self.tell(command, fd, **arguments)
        assert "return" in answer, answer
        return answer["return"]

    def refusal(self, command: str, **arguments: Any) -> str:
        answer = self.tell(command, **arguments)
        assert "error" in answer, answer
        return str(answer["error"]["desc"])

    def await_event(self, name: str, **data: Any) -> dict[str, Any]:
        """The first event of that name and data, one that has come already included."""
        while True:
            for event in self.events:
                told = event.get("data", {})
                if event["event"] == name and all(told.get(key) == data[key] for key in data):
                    self.events.remove(event)
                    return dict(told)
            self.events.append(self.read())

    def await_job(self, name: str) -> None:
        """Wait until a job has ended, whoever has begun it."""
        wait(lambda: self._status(name) == "concluded", f"the end of {name}")

    def _status(self, name: str) -> str:
        (job,) = (each for each in self.ask("query-jobs") if each["id"] == name)
        return str(job["status"])

    def run_job(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Run a job to its end, and dismiss it; what `query-jobs` told of it in the end."""
        self.ask(command, job_id="job", **arguments)
        self.await_event("JOB_STATUS_CHANGE", id="job", status="concluded")
        (job,) = (each for each in self.ask("query-jobs") if each["id"] == "job")
        self.ask("job-dismiss", id="job")
        return dict(job)


@contextlib.contextmanager
def serving(folder: Path, *words: str, store: Path | None = None) -> Iterator[Path]:
    """`calotype serve` for the length of a `with` block; the socket that it listens on."""
    path = folder / "qmp.sock"
    where = ["--store", str(store)] if store else []
    command = [sys.executable, "-m", "calotype", "serve", *words, "--qmp", str(path), *where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as service:
        try:
            assert service.stdout is not None
            assert service.stdout.readline() == f"listening on {path}\n"
            yield path
        finally:
            service.send_signal(signal.SIGTERM)
            service.wait(PATIENCE_S)


@contextlib.contextmanager
def client_of(vm: Machine) -> Iterator[Qmp]:
    """A client of the service in front of a VM that runs."""
    with serving(vm.folder, vm.name, store=vm.store) as path, Qmp(path) as client:
        yield client


@contextlib.contextmanager
def running(vm: AnyMachine) -> Iterator[AnyMachine]:
    """A machine that is made and runs; ended in the end by its pid."""
    vm.make_disks()
    vm.run()
    try:
        yield vm
    finally:
        vm.clean_up()


@contextlib.contextmanager
def bare_qemu(folder: Path, words: Sequence[str] = ()) -> Iterator[Path]:
    """A QEMU without a machine, as a test suite starts it; its monitor."""
    path = folder / "monitor.sock"
    command = ["qemu-system-x86_64", "-M", "none", "-display", "none", "-S", *words]
    monitor = ("-qmp", f"unix:{path},server=on,wait=off")
    with subprocess.Popen([*command, *monitor], cwd=folder) as qemu:
        try:
            wait(path.exists, "the monitor")
            yield path
        finally:
            qemu.kill()


def is_readable(connection: socket.socket, patience_s: float) -> bool:
    return bool(select.select([connection], [], [], patience_s)[0])

"""The witness itself: it lives, it obeys, and it notices each thing that it is there to notice.

Every other test trusts the witness, so here it is lied to on purpose: what it does not notice,
no test would. Hosts have no KVM, so all of this runs under TCG.
"""

import json
import mmap
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest

from calotype.testing.witness import (
    Boot,
    Check,
    Fact,
    Failure,
    Inconsistency,
    Ready,
    Reply,
    Tick,
    Witness,
    read,
    verdict,
    witness,
)

pytestmark = pytest.mark.qemu

SECTOR_BYTES = 512
SLOTS = 64
PAGE_BYTES = 4096
RAM_BYTES = 256 << 20
PATIENCE_S = 100

SomeFact = TypeVar("SomeFact", bound=Fact)


class Guest:
    """A witness in a QEMU of its own: disk 0 is qcow2, disk 1 is raw, its RAM is a file."""

    def __init__(self, image: Witness, folder: Path, ram: Path, faults: str) -> None:
        self.raw = folder / "one.raw"
        self.ram = ram
        self._console = folder / "console"
        self._qmp = folder / "qmp"
        qcow2 = folder / "zero.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, "1M"], check=True)
        with self.raw.open("wb") as raw:
            raw.truncate(1 << 20)
        file = "file.driver=blkdebug,file.image.driver=file,file.image.filename"
        command: list[str | Path] = [
            *("qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-nodefaults"),
            *("-display", "none", "-machine", "q35,memory-backend=ram"),
            *("-object", f"memory-backend-file,id=ram,size={RAM_BYTES},mem-path={ram},share=on"),
            *("-kernel", image.kernel, "-initrd", image.initrd),
            *("-append", image.append(["vda", "vdb"], ram_mib=16)),
            *("-drive", f"if=virtio,format=qcow2,file={qcow2}"),
            *("-drive", f"if=virtio,format=raw,werror=report,{file}={self.raw}{faults}"),
            *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
            *("-qmp", f"unix:{self._qmp},server=on,wait=off"),
        ]
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=console)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def tell(self, order: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{order}\n".encode())
        self._process.stdin.flush()

    def execute(self, command: str) -> Any:
        """One QMP command, on a connection of its own."""
        with closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.settimeout(PATIENCE_S)
            connection.connect(str(self._qmp))
            with connection.makefile("rw") as lines:
                for name in ("qmp_capabilities", command):
                    lines.write(json.dumps({"execute": name}))
                    lines.flush()
                    while "return" not in (reply := json.loads(lines.readline())):
                        assert "error" not in reply, reply
        return reply["return"]

    @property
    def text(self) -> str:
        return self._console.read_text(errors="replace")

    def until(self, kind: type[SomeFact], suits: Callable[[SomeFact], object] = bool) -> SomeFact:
        """The first suitable fact of the console, waited for."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            has_ended = self._process.poll() is not None
            for fact in read(self.text):
                if isinstance(fact, kind) and suits(fact):
                    return fact
            assert not has_ended, f"QEMU ended: {self.text}"
            time.sleep(0.02)
        pytest.fail(f"no suitable {kind.__name__} came: {self.text[-2000:]}")

    def ring(self) -> list[bytes]:
        """The slots of disk 1, as they are outside."""
        with self.raw.open("rb") as raw:
            return [raw.read(SECTOR_BYTES) for _ in range(SLOTS)]

    def overwrite(self, slot: int, content: bytes) -> None:
        """Put *content* into a slot of disk 1, behind QEMU's back."""
        with self.raw.open("r+b") as raw:
            raw.seek(slot * SECTOR_BYTES)
            raw.write(content)


def n_of(sector: bytes) -> int:
    return int.from_bytes(sector[16:24], "little")


def newest(ring: list[bytes]) -> int:
    """The slot written last: the only one that no write under way is about to replace."""
    return max(range(SLOTS), key=lambda slot: n_of(ring[slot]))


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Witness:
    return witness(tmp_path_factory.getbasetemp().parent / "witness")


@pytest.fixture
def faults() -> str:
    """More of the raw disk's options, for tests that want it to fail."""
    return ""


@pytest.fixture
def guest(image: Witness, tmp_path: Path, faults: str) -> Iterator[Guest]:
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="calotype-") as ram:
        guest = Guest(image, tmp_path, Path(ram.name), faults)
        try:
            guest.until(Ready)
            yield guest
        finally:
            guest.end()


def test_an_honest_machine_is_found_consistent(guest: Guest) -> None:
    later = guest.until(Tick, lambda tick: tick.n > 3 * SLOTS)
    guest.tell("check")
    check = guest.until(Check)

    assert guest.until(Ready) == Ready(n=0, disks=2, pages=4096)
    assert (check.pages, check.bad) == (4096, 0)
    assert check.n >= later.n
    assert verdict(read(guest.text)).is_consistent
    assert verdict(read(guest.text)).boots == 1


def test_it_pauses_and_goes_on_when_told(guest: Guest) -> None:
    guest.until(Tick)
    guest.tell("pause")
    paused = guest.until(Reply, lambda reply: reply.word == "PAUSED")
    text = guest.text
    time.sleep(0.3)
    assert guest.text == text

    guest.tell("go")
    guest.until(Tick, lambda tick: tick.n > paused.n + 1)
    guest.tell("dirty 100")
    guest.until(Reply, lambda reply: reply.word == "DIRTY")
    assert verdict(read(guest.text)).is_consistent


def test_another_boot_is_told_apart(guest: Guest) -> None:
    first = guest.until(Boot)
    guest.execute("system_reset")
    guest.until(Boot, lambda boot: boot.id != first.id)
    assert verdict(read(guest.text)).boots == 2


def test_a_disk_older_than_ram_is_noticed(guest: Guest) -> None:
    guest.until(Tick, lambda tick: tick.n > SLOTS)
    guest.execute("stop")
    older = guest.ring()
    last = max(map(n_of, older))
    guest.execute("cont")
    guest.until(Tick, lambda tick: tick.n > last + SLOTS)
    guest.execute("stop")
    newer = guest.ring()
    slot = newest(newer)
    guest.overwrite(slot, older[slot])
    guest.execute("cont")

    found = guest.until(Inconsistency)
    assert (found.disk, found.slot, found.slots) == (1, slot, 1)
    assert (found.expected, found.found) == (n_of(newer[slot]), n_of(older[slot]))
    tick = guest.until(Tick, lambda tick: tick.n > last + 3 * SLOTS)
    assert tick.bad == 1
    assert not verdict(read(guest.text)).is_consistent


def test_a_damaged_sector_is_noticed(guest: Guest) -> None:
    guest.until(Tick, lambda tick: tick.n > SLOTS)
    guest.execute("stop")
    ring = guest.ring()
    slot = newest(ring)
    guest.overwrite(slot, bytes([ring[slot][0] ^ 1]) + ring[slot][1:])
    guest.execute("cont")

    found = guest.until(Inconsistency)
    assert (found.disk, found.slot) == (1, slot)
    assert (found.expected, found.found) == (n_of(ring[slot]), None)


def test_a_flipped_byte_of_ram_is_noticed(guest: Guest) -> None:
    guest.tell("dirty 0")  # or the page might be rewritten before it is checked
    guest.until(Reply)
    guest.execute("stop")
    with guest.ram.open("r+b") as file, mmap.mmap(file.fileno(), RAM_BYTES) as ram:
        pages = [
            offset
            for offset in range(0, RAM_BYTES, PAGE_BYTES)
            if ram[offset : offset + 8] == b"WITNPAGE"
        ]
        offset = pages[len(pages) // 2]
        number = int.from_bytes(ram[offset + 16 : offset + 24], "little")
        ram[offset + 2000] ^= 1
    guest.execute("cont")
    guest.tell("check")

    assert len(pages) >= 4096
    assert guest.until(Check).bad == 1
    assert guest.until(Inconsistency).page == number


@pytest.mark.parametrize(
    "faults", [",file.inject-error.0.event=write_aio,file.inject-error.0.once=on"]
)
def test_a_failed_write_is_told_and_repeated(guest: Guest) -> None:
    failure = guest.until(Failure)
    assert failure.line == "FAILED n=0 disk=1 errno=5"
    assert guest.until(Tick, lambda tick: tick.n > SLOTS).bad == 0
    assert not verdict(read(guest.text)).is_consistent

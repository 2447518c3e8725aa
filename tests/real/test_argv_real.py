"""The command line, judged by QEMU: it opens, names and gives the guest what we say it does."""

import json
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from calotype.formats.argv import (
    CommandLine,
    DiskArgument,
    Endpoints,
    disks,
    for_restore,
    has_console,
    memory_bytes,
    supervised,
    with_images,
    with_machine,
)
from calotype.formats.argv.arity import FLAGS, VALUED
from calotype.formats.argv.machine import has_default_serial
from calotype.model.vm import Image

pytestmark = pytest.mark.qemu

QEMU = "qemu-system-x86_64"
PATIENCE_S = 30.0
QUIET = ("-S", "-accel", "tcg", "-m", "64", "-display", "none", "-nodefaults")

Qmp = Callable[..., Any]
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets in it."""
    path = Path(tempfile.mkdtemp(prefix="cal"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start QEMU; whatever becomes of the test, it is ended."""
    started: list[subprocess.Popen[bytes]] = []

    def starter(words: Sequence[str], cwd: Path, *fds: int) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            words,
            cwd=cwd,
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started.append(child)
        return child

    yield starter
    for child in started:
        child.kill()
        child.communicate()


def connect(path: Path, child: subprocess.Popen[bytes]) -> Qmp:
    """Connect to a monitor of *child*; the function returned gives a command and its answer."""
    deadline = time.monotonic() + PATIENCE_S
    monitor = socket.socket(socket.AF_UNIX)
    while True:
        try:
            monitor.connect(str(path))
        except OSError:
            assert child.poll() is None, child.communicate()[0].decode()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        else:
            break
    monitor.settimeout(PATIENCE_S)
    stream = monitor.makefile("rwb")
    assert "QMP" in json.loads(stream.readline() or child.communicate()[0])

    def command(name: str, **arguments: Any) -> Any:
        stream.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        stream.flush()
        while "event" in (reply := json.loads(stream.readline())):
            pass
        return reply["return"]

    command("qmp_capabilities")
    return command


def asked(start: Start, folder: Path, command: CommandLine, cwd: Path) -> Qmp:
    """Start *command* with a monitor of the test's own."""
    path = folder / f"{time.monotonic_ns()}.sock"
    return connect(path, start([*command.argv(), "-qmp", f"unix:{path},server=on,wait=off"], cwd))


def line(*words: str) -> CommandLine:
    return CommandLine.parse([QEMU, *words])


def image(path: Path, fmt: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", fmt, path, "4M"], check=True)


def overlay(disk: DiskArgument) -> Image:
    path = f"{disk.path}.over"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", disk.format or "raw"]
    subprocess.run([*create, "-b", disk.path, path], check=True)
    return Image(path, "qcow2")


VIRTIO = ("-device", "virtio-blk-pci,drive=d0,id=v0")
DISKS: dict[str, tuple[str, ...]] = {
    "hda": ("-hda", "a.raw"),
    "hda, odd name": ("-hda", "a,,b=c d.raw"),
    "positional": ("a.raw",),
    "cdrom": ("-cdrom", "a.raw"),
    "pflash": ("-machine", "pc", "-pflash", "a.raw"),
    "fda": ("-machine", "pc", "-fda", "a.raw"),
    "drive": ("-drive", "file=a,,b.qcow2,if=virtio,format=qcow2,cache=none,discard=unmap"),
    "drive, blank": ("-drive", "file=sub/../a b.qcow2,index=1,driver=qcow2,l2-cache-size=1M"),
    "drive, raw": ("-drive", "file=a.raw,if=none,id=d0,format=raw,aio=threads", *VIRTIO),
    "drive, dotted": (
        "-drive", "file.filename=n:x.raw,file.driver=file,file.locking=off,format=raw,if=none,"
        "id=d0,node-name=n0,detect-zeroes=on", *VIRTIO,
    ),
    "drive, read-only": ("-drive", "file=a.raw,if=virtio,readonly=on,format=raw"),
    "inline": (
        "-blockdev", "qcow2,node-name=d0,discard=unmap,detect-zeroes=unmap,cache.direct=on,"
        "file.driver=file,file.filename=a,,b.qcow2", *VIRTIO,
    ),
    "inline, JSON": (
        "-blockdev", '{"driver": "qcow2", "node-name": "d0", "cache": {"no-flush": true},'
        '"file": {"driver": "file", "filename": "a b.qcow2", "aio": "threads"}}', *VIRTIO,
    ),
    "split": (
        "-blockdev", "file,node-name=f0,filename=a.raw,cache.direct=on",
        "-blockdev", "raw,node-name=d0,file=f0,cache.direct=on", *VIRTIO,
    ),
    "split, JSON": (
        "-blockdev", '{"driver": "file", "node-name": "f0", "filename": "n:x.raw"}',
        "-blockdev", '{"driver": "raw", "node-name": "d0", "file": "f0"}', *VIRTIO,
    ),
    "bare": (
        "-blockdev", "file,node-name=d0,filename=a.raw,aio=threads,locking=off,cache.direct=on,"
        "auto-read-only=on,discard=unmap,detect-zeroes=unmap", *VIRTIO,
    ),
    "bare, JSON": (
        "-blockdev", '{"driver": "file", "node-name": "d0", "filename": "a.raw",'
        '"read-only": true}', *VIRTIO,
    ),
    "two": ("-hda", "a.raw", "-blockdev", "file,node-name=d0,filename=n:x.raw", *VIRTIO),
}  # fmt: skip


def shown(qmp: Qmp) -> list[dict[str, Any]]:
    """What QEMU shows of its disks, by what the guest and the user know them by."""
    return [
        {
            "names": (each["device"], each.get("qdev"), each["removable"]),
            "node": re.sub("^#.*", "", each["inserted"]["node-name"]),
            "cache": each["inserted"]["cache"],
            "options": (each["inserted"]["ro"], each["inserted"]["detect_zeroes"]),
            "image": each["inserted"]["image"],
        }
        for each in qmp("query-block")
        if "inserted" in each
    ]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("a.raw", "a,,b=c d.raw", "n:x.raw"):
        image(tmp_path / name, "raw")
    for name in ("a,b.qcow2", "a b.qcow2"):
        image(tmp_path / name, "qcow2")
    return tmp_path


@pytest.mark.parametrize("words", DISKS.values(), ids=DISKS)
def test_another_image_changes_nothing_else(
    start: Start, folder: Path, images: Path, words: tuple[str, ...]
) -> None:
    before = line(*QUIET, "-machine", "q35", *words)
    found = disks(before, str(images))
    overlays = {disk.index: overlay(disk) for disk in found}
    after = with_images(before, overlays)
    was = shown(asked(start, folder, before, images))
    become = shown(asked(start, folder, after, Path("/")))
    paths = {str(images / each["image"]["filename"]): each for each in was}

    assert {disk.path for disk in found} == {str(Path(path).resolve()) for path in paths}
    for disk, each in zip(found, was, strict=True):
        assert disk.read_only == each["options"][0]
        assert disk.format in {"", each["image"]["format"].replace("file", "raw")}
        assert not disk.name or disk.name in {each["node"], each["names"][0]}
    for old, new, over in zip(was, become, overlays.values(), strict=True):
        assert new["image"]["filename"] == over.path
        assert new["image"]["format"] == "qcow2"
        assert new["image"]["backing-image"]["virtual-size"] == old["image"]["virtual-size"]
        assert {**new, "image": None} == {**old, "image": None}


def test_every_option_of_this_qemu_is_known_with_its_arity() -> None:
    """QEMU looks through all words before it does anything, and stops at what it does not know."""
    helped = subprocess.run([QEMU, "-help"], check=True, capture_output=True, text=True).stdout
    named = set(re.findall(r"^(?:-\w+ or )?-([\w-]+)", helped, re.MULTILINE))
    named |= set(re.findall(r"^-\w+/-(\w+)", helped, re.MULTILINE))
    assert len(named) > 100
    assert named <= VALUED | FLAGS

    def says(option: str) -> str:
        words = [QEMU, f"-{option}", *(["-no-such-option"] if option in FLAGS else [])]
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
        return done.stderr

    options = sorted(VALUED | FLAGS)
    with ThreadPoolExecutor(8) as pool:
        wrong = {
            option: said
            for option, said in zip(options, pool.map(says, options), strict=True)
            if (option in VALUED and "requires an argument" not in said)
            or (option in FLAGS and "-no-such-option: invalid option" not in said)
        }
    gone = {option for option, said in wrong.items() if f"-{option}: invalid option" in said}
    assert wrong.keys() == gone
    assert not gone & named


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("-m", "96"),
        ("-m", "size=0.125G"),
        ("-m", "70000000b"),
        ("-m", "64", "-m", "80"),
        ("-machine", "memory.size=80M"),
        ("-object", "memory-backend-ram,id=r,size=80M", "-machine", "memory-backend=r"),
    ],
)
def test_memory_is_counted_as_qemu_counts_it(
    start: Start, folder: Path, words: tuple[str, ...]
) -> None:
    command = line("-S", "-accel", "tcg", "-display", "none", *words)
    qmp = asked(start, folder, command, folder)
    assert qmp("query-memory-size-summary")["base-memory"] == memory_bytes(command)


def test_the_machine_type_is_exchanged(start: Start, folder: Path) -> None:
    command = line(*QUIET, "-machine", "accel=tcg,type=q35,smm=off")
    resolved = next(
        each["name"]
        for each in asked(start, folder, command, folder)("query-machines")
        if each.get("alias") == "q35"
    )
    qmp = asked(start, folder, with_machine(command, resolved), folder)
    assert qmp("qom-get", path="/machine", property="type") == f"{resolved}-machine"
    assert qmp("qom-get", path="/machine", property="smm") == "off"


SERIAL = {
    "none": ("-machine", "q35", "-display", "none"),
    "nodefaults": ("-machine", "q35", "-display", "none", "-nodefaults"),
    "stdio": ("-machine", "pc", "-display", "none", "-serial", "stdio"),
    "mon:stdio": ("-display", "none", "-serial", "mon:stdio", "-serial", "null"),
    "file": ("-nographic", "-serial", "file:out"),
    "port off": ("-nographic", "-serial", "none", "-monitor", "none"),
    "nographic": ("-nographic",),
    "nographic, nodefaults": ("-nographic", "-nodefaults"),
    "isa-serial": (
        "-display", "none", "-chardev", "stdio,id=c,mux=on,signal=off", "-device",
        "isa-serial,chardev=c", "-mon", "chardev=c",
    ),
    "global": ("-display", "none", "-global", "isa-serial.wakeup=0"),
    "monitor": ("-display", "none", "-monitor", "stdio"),
}  # fmt: skip


def devices(qmp: Qmp) -> str:
    """The device tree, without the names of the host's sides."""
    tree: str = qmp("human-monitor-command", **{"command-line": "info qtree"})
    return re.sub(r'chardev = "\w[^"]*"', "chardev", tree)


class Watched:
    """A supervised QEMU: its endpoints are listening before it starts."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / name for name in ("control", "query", "console")]
        self.log = folder / "log,of console"
        self.listeners = [socket.socket(socket.AF_UNIX) for _ in self.paths]
        for listener, path in zip(self.listeners, self.paths, strict=True):
            listener.bind(str(path))
            listener.listen()
        self.fds = [listener.fileno() for listener in self.listeners]
        self.endpoints = Endpoints(*self.fds, str(self.log))

    def start(self, start: Start, command: CommandLine, cwd: Path) -> tuple[Qmp, Qmp]:
        child = start(supervised(command, self.endpoints).argv(), cwd, *self.fds)
        for listener in self.listeners:
            listener.close()
        return connect(self.paths[0], child), connect(self.paths[1], child)


@pytest.mark.parametrize("words", SERIAL.values(), ids=SERIAL)
def test_supervision_is_invisible_to_the_guest(
    start: Start, folder: Path, words: tuple[str, ...]
) -> None:
    command = line("-S", "-accel", "tcg", "-m", "64", *words)
    watched = Watched(folder)
    control, query = watched.start(start, command, folder)
    alone = asked(start, folder, command, folder)
    assert devices(control) == devices(alone)
    assert query("query-status")["running"] is False

    chardevs = {each["label"]: each["filename"] for each in query("query-chardev")}
    assert "stdio" not in chardevs.values()
    assert (f"{watched.paths[2]},server=on" in " ".join(chardevs.values())) == has_console(command)
    if not command.has("serial"):
        labels = {each["label"] for each in alone("query-chardev")}
        assert ("serial0" in labels) == has_default_serial(command)


@pytest.mark.parametrize(
    "words",
    [
        ("-nographic",),
        ("-nographic", "-serial", "mon:stdio"),
        ("-machine", "graphics=off", "-display", "none", "-chardev", "stdio,id=c,mux=on")
        + ("-serial", "chardev:c"),
    ],
)
def test_what_the_console_says_is_logged_and_heard(
    start: Start, folder: Path, words: tuple[str, ...]
) -> None:
    watched = Watched(folder)
    command = line("-accel", "tcg", "-m", "64", *words)
    control, _ = watched.start(start, command, folder)
    with socket.socket(socket.AF_UNIX) as console:
        console.connect(str(watched.paths[2]))
    deadline = time.monotonic() + PATIENCE_S
    while b"SeaBIOS" not in watched.log.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert control("query-status")["running"] is True


def test_a_restored_qemu_waits_for_its_state(start: Start, folder: Path) -> None:
    watched = Watched(folder)
    control, _ = watched.start(start, line(*QUIET), folder)
    second = Watched(Path(tempfile.mkdtemp(dir=folder)))
    waiting = for_restore(supervised(line(*QUIET), second.endpoints))
    child = start(waiting.argv(), folder, *second.fds)
    qmp = connect(second.paths[0], child)
    assert control("query-status")["status"] == "prelaunch"
    assert qmp("query-status")["status"] == "inmigrate"
    uri = f"unix:{folder}/state"
    qmp("migrate-incoming", uri=uri)
    control("migrate", uri=uri)
    deadline = time.monotonic() + PATIENCE_S
    while qmp("query-status")["status"] == "inmigrate":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert qmp("query-status")["running"] is False

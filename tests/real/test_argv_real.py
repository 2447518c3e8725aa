"""The command line, judged by QEMU: it opens, names and gives the guest what we say it does."""

import json
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from calotype.formats.argv import (
    Argument,
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
from calotype.formats.options import parse
from calotype.model.vm import Image

pytestmark = pytest.mark.qemu

QEMU = "qemu-system-x86_64"
PATIENCE_S = 30.0
QUIET = ("-S", "-accel", "tcg", "-m", "64", "-display", "none", "-nodefaults")

Qmp = Callable[..., Any]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets in it."""
    path = Path(tempfile.mkdtemp(prefix="cal"))
    yield path
    shutil.rmtree(path)


@contextmanager
def started(command: CommandLine, cwd: Path, *fds: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run QEMU; whatever becomes of the test, it is ended."""
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(
            command.argv(),
            cwd=cwd,
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        ) as child,
    ):
        try:
            yield child
        except BaseException as error:
            output.seek(0)
            error.add_note(output.read().decode())
            raise
        finally:
            child.kill()


@contextmanager
def connected(path: Path, child: subprocess.Popen[bytes]) -> Iterator[Qmp]:
    """Connect to a monitor of *child*, and give a function from command to answer."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(PATIENCE_S)
        eventually(lambda: connects(monitor, path, child))
        with monitor.makefile("rwb") as stream:
            assert "QMP" in json.loads(stream.readline())

            def command(name: str, **arguments: Any) -> Any:
                stream.write(json.dumps({"execute": name, "arguments": arguments}).encode())
                stream.flush()
                while "event" in (reply := json.loads(stream.readline())):
                    pass
                return reply["return"]

            command("qmp_capabilities")
            yield command


def connects(monitor: socket.socket, path: Path, child: subprocess.Popen[bytes]) -> bool:
    assert child.poll() is None
    with suppress(OSError):
        monitor.connect(str(path))
        return True
    return False


def eventually(claim: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def asked(command: CommandLine, folder: Path, cwd: Path) -> Iterator[Qmp]:
    """Run *command* with a monitor of the test's own."""
    path = folder / f"{time.monotonic_ns()}.sock"
    monitor = Argument("qmp", f"unix:{path},server=on,wait=off")
    with started(command.having({}, monitor), cwd) as child, connected(path, child) as qmp:
        yield qmp


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
        "-drive",
        "file.filename=n:x.raw,file.driver=file,file.locking=off,format=raw,if=none,id=d0",
        *VIRTIO,
    ),
    "drive, node name": (
        "-drive",
        "file=a.raw,format=raw,if=none,id=d0,node-name=n0,detect-zeroes=on",
        *VIRTIO,
    ),
    "drive, read-only": ("-drive", "file=a.raw,if=virtio,readonly=on,format=raw"),
    "inline": (
        "-blockdev",
        "qcow2,node-name=d0,discard=unmap,cache.direct=on,file.driver=file,file.filename=a,,b.qcow2",
        *VIRTIO,
    ),
    "inline, JSON": (
        "-blockdev",
        """{"driver": "qcow2", "node-name": "d0", "cache": {"no-flush": true},
            "file": {"driver": "file", "filename": "a b.qcow2", "aio": "threads"}}""",
        *VIRTIO,
    ),
    "split": (
        "-blockdev",
        "file,node-name=f0,filename=a.raw,cache.direct=on",
        "-blockdev",
        "raw,node-name=d0,file=f0,cache.direct=on",
        *VIRTIO,
    ),
    "split, JSON": (
        "-blockdev",
        '{"driver": "file", "node-name": "f0", "filename": "n:x.raw"}',
        "-blockdev",
        '{"driver": "raw", "node-name": "d0", "file": "f0"}',
        *VIRTIO,
    ),
    "bare": (
        "-blockdev",
        "file,node-name=d0,filename=a.raw,aio=threads,locking=off,cache.direct=on,discard=unmap",
        *VIRTIO,
    ),
    "bare, JSON": (
        "-blockdev",
        '{"driver": "file", "node-name": "d0", "filename": "a.raw", "detect-zeroes": "on"}',
        *VIRTIO,
    ),
    "bare, read-only": ("-blockdev", "file,node-name=d0,filename=a.raw,read-only=on", *VIRTIO),
    "two": ("-hda", "a.raw", "-blockdev", "file,node-name=d0,filename=n:x.raw", *VIRTIO),
}


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
    folder: Path, images: Path, words: tuple[str, ...]
) -> None:
    before = line(*QUIET, "-machine", "q35", *words)
    found = disks(before, str(images))
    overlays = {disk.index: overlay(disk) for disk in found}
    after = with_images(before, overlays)
    with asked(before, folder, images) as qmp:
        was = shown(qmp)
    with asked(after, folder, Path("/")) as qmp:
        become = shown(qmp)
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
    named = set(re.findall(r"^(?:-\w+ or )?--?(\w[\w-]*)", helped, re.MULTILINE))
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
    "text", [",", ",,", "a,,b", "a,,,,b,", ",,a=b,,c", "guest=a,,,guest=b=,,", "a b,guest=é'"]
)
def test_an_option_string_is_split_as_qemu_splits_it(folder: Path, text: str) -> None:
    command = line("-S", "-machine", "none", "-display", "none", "-nodefaults", "-name", text)
    with asked(command, folder, folder) as qmp:
        told = qmp("query-name")
    assert told.get("name") == dict(parse(text, "guest"))["guest"]


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
def test_memory_is_counted_as_qemu_counts_it(folder: Path, words: tuple[str, ...]) -> None:
    command = line("-S", "-accel", "tcg", "-display", "none", *words)
    with asked(command, folder, folder) as qmp:
        told = qmp("query-memory-size-summary")
    assert told["base-memory"] == memory_bytes(command)


def test_the_machine_type_is_exchanged(folder: Path) -> None:
    command = line(*QUIET, "-machine", "smm=off,type=q35")
    with asked(command, folder, folder) as qmp:
        machines = {each.get("alias"): each["name"] for each in qmp("query-machines")}
    with asked(with_machine(command, machines["q35"]), folder, folder) as qmp:
        assert qmp("qom-get", path="/machine", property="type") == f"{machines['q35']}-machine"
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


SOCKETS = ("control", "query", "guard", "service", "console")


class Watched:
    """What a supervised QEMU inherits: sockets that listen before it starts, and a log."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.console, self.log = self.folder / "console", self.folder / "log,of console"

    @contextmanager
    def running(
        self, command: CommandLine, change: Callable[[CommandLine], CommandLine] = lambda c: c
    ) -> Iterator[tuple[Qmp, Qmp]]:
        """Run *command* under supervision; give its two monitors."""
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in SOCKETS]
            for listener, name in zip(sockets, SOCKETS, strict=True):
                listener.bind(str(self.folder / name))
                listener.listen()
            descriptors = [listener.fileno() for listener in sockets]
            control, query, guard, service, console = descriptors
            endpoints = Endpoints(control, query, guard, service, console, str(self.log))
            watched = change(supervised(command, endpoints))
            child = stack.enter_context(started(watched, self.folder, *descriptors))
            for listener in sockets:
                listener.close()
            yield (
                stack.enter_context(connected(self.folder / "control", child)),
                stack.enter_context(connected(self.folder / "query", child)),
            )


@pytest.mark.parametrize("words", SERIAL.values(), ids=SERIAL)
def test_supervision_is_invisible_to_the_guest(folder: Path, words: tuple[str, ...]) -> None:
    command, watched = line("-S", "-accel", "tcg", "-m", "64", *words), Watched(folder)
    with watched.running(command) as (control, query), asked(command, folder, folder) as alone:
        assert devices(control) == devices(alone)
        assert query("query-status")["running"] is False
        backends = " ".join(each["filename"] for each in query("query-chardev"))
        labels = {each["label"] for each in alone("query-chardev")}
    assert "stdio" not in backends
    assert (f"{watched.console},server=on" in backends) == has_console(command)
    assert command.has("serial") or ("serial0" in labels) == has_default_serial(command)


@pytest.mark.parametrize(
    "words",
    [
        "-nographic",
        "-nographic -serial mon:stdio",
        "-M graphics=off -display none -chardev stdio,id=c,mux=on -serial chardev:c",
    ],
)
def test_what_the_console_says_is_logged(folder: Path, words: str) -> None:
    """SeaBIOS greets on the serial port of a machine without graphics."""
    command, watched = line("-accel", "tcg", "-m", "64", *words.split()), Watched(folder)
    with watched.running(command), socket.socket(socket.AF_UNIX) as console:
        console.settimeout(PATIENCE_S)
        console.connect(str(watched.console))
        eventually(lambda: b"SeaBIOS" in watched.log.read_bytes())


def test_a_restored_qemu_waits_for_its_state_and_again_when_it_has_it(folder: Path) -> None:
    uri, command = f"unix:{folder}/state", line(*QUIET[1:])
    source, target = Watched(folder), Watched(folder)
    with source.running(command) as (old, _), target.running(command, for_restore) as (new, _):
        assert old("query-status")["status"] == "running"
        assert new("query-status")["status"] == "inmigrate"
        new("migrate-incoming", uri=uri)
        old("migrate", uri=uri)
        eventually(lambda: new("query-status")["status"] != "inmigrate")
        assert new("query-status")["running"] is False

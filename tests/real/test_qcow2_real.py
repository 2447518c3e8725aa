"""The qcow2 reader, identities and freezing, judged by QEMU's own programs."""

import errno
import fcntl
import json
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from calotype.errors import HostError, StoreError
from calotype.formats.qcow2 import Feature, Metadata
from calotype.model.identity import Identity, differences
from calotype.store.images import (
    allocated_bytes,
    backing_chain,
    digest,
    freeze,
    identify,
    probe_format,
    read_metadata,
    thaw,
)

pytestmark = pytest.mark.qemu

MIB = 1 << 20
COPIED = 0x80


def run(*words: object, **options: Any) -> str:
    command = [str(word) for word in words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, **options)
    return str(done.stdout)


def info(path: Path, *options: str) -> Any:
    return json.loads(run("qemu-img", "info", "-U", "--output", "json", *options, path))


def create(path: Path, size: str = "1G", **options: str) -> Path:
    words = ",".join(f"{key}={value}" for key, value in options.items())
    run("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", words] if words else []), path, size)
    return path


def write(path: Path, offset: int, length: int = 4096, pattern: int = 0xCA) -> None:
    run("qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {offset} {length}", path)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create(tmp_path / "disk.qcow2")


VARIANTS = [
    {"compat": "0.10"},
    {"compat": "0.10", "cluster_size": "512"},
    {"compat": "1.1"},
    {"compat": "1.1", "cluster_size": "4k", "refcount_bits": "64"},
    {"compat": "1.1", "cluster_size": "2M", "lazy_refcounts": "on"},
    {"compat": "1.1", "cluster_size": "16k", "extended_l2": "on", "compression_type": "zstd"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_headers_agree_with_qemu_img(tmp_path: Path, options: dict[str, str]) -> None:
    path = create(tmp_path / "disk", "300M", **options)
    header, told = read_metadata(path).header, info(path)
    data = told["format-specific"]["data"]
    assert header.virtual_size_bytes == told["virtual-size"]
    assert header.cluster_bytes == told["cluster-size"]
    assert {2: "0.10", 3: "1.1"}[header.version] == data["compat"]
    assert 1 << header.refcount_order == data["refcount-bits"]
    assert header.compression == data["compression-type"]
    assert (Feature.DIRTY in header.features) == told["dirty-flag"]
    assert (Feature.CORRUPT in header.features) == data.get("corrupt", False)
    assert (Feature.EXTENDED_L2 in header.features) == data.get("extended-l2", False)
    assert bool(header.compatible_features & 1) == data.get("lazy-refcounts", False)
    assert probe_format(path) == told["format"] == "qcow2"


def test_encryption_and_an_external_data_file_are_seen(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("silver nitrate")
    encrypted = tmp_path / "encrypted"
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    run(
        "qemu-img", "create", "-q", "-f", "qcow2", "--object", f"secret,id=s,file={secret}",
        "-o", options, encrypted, "10M",
    )  # fmt: skip
    assert read_metadata(encrypted).header.encryption == "luks"
    outside = create(tmp_path / "outside", "10M", data_file=str(tmp_path / "data.raw"))
    header = read_metadata(outside).header
    assert Feature.DATA_FILE in header.features
    assert header.data_file == info(outside)["format-specific"]["data"]["data-file"]


@pytest.mark.parametrize("size", [1, 511, 1000, 4096])
def test_a_raw_disk_has_whole_sectors(tmp_path: Path, size: int) -> None:
    path = tmp_path / "raw"
    path.write_bytes(bytes(size))
    assert identify(path, "raw").virtual_size_bytes == info(path, "-f", "raw")["virtual-size"]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_l2_tables_grow_with_what_is_allocated(tmp_path: Path, options: dict[str, str]) -> None:
    path = create(tmp_path / "disk", "300M", **options)
    assert read_metadata(path).l2_tables == 0
    reach = read_metadata(path).header.l2_reach_bytes
    places = [place for place in (0, 5 * reach, 17 * reach) if place < 300 * MIB]
    for count, place in enumerate(places, start=1):
        write(path, place)
        found = read_metadata(path)
        assert found.l2_tables == count
        assert found.allocated_limit_bytes == min(count * reach, 300 * MIB)
    write(path, 8192)
    assert read_metadata(path).l2_tables == len(places)


def test_backing_chains_agree_with_qemu_img(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    base = tmp_path / "bases" / "base of all.raw"
    base.write_bytes(bytes(MIB))
    middle, top = tmp_path / "bases" / "mitte ü", tmp_path / "top"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", middle)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", f"bases/{middle.name}", "-F", "qcow2", top)
    told = info(top, "--backing-chain")
    found = [(str(path), format_) for path, format_ in backing_chain(top, "qcow2")]
    assert found == [(link["filename"], link["format"]) for link in told]
    assert [len(found), found[2]] == [3, (str(base), "raw")]


TAGS = ["plain", "two words ", "vor dem Größerwerden — ✓", "-t", "2"]


def savevm(path: Path, tag: str) -> None:
    """Let a machine without a CPU save its state into the image."""
    run(
        "qemu-system-x86_64", "-M", "none", "-display", "none", "-monitor", "stdio",
        "-drive", f"if=none,format=qcow2,file={path}",
        input=f'savevm "{tag}"\nquit\n', timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS[:3], ids=str)
def test_snapshots_agree_with_qemu_img(tmp_path: Path, options: dict[str, str]) -> None:
    path = create(tmp_path / "disk", "64M", **options)
    for tag in TAGS:
        run("qemu-img", "snapshot", "-c", tag, path)
    savevm(path, "with machine state")
    found, told = read_metadata(path).snapshots, info(path)["snapshots"]
    assert [entry.name for entry in found] == [*TAGS, "with machine state"]
    assert [
        (entry.id, entry.name, entry.vm_state_bytes, entry.date_ns, entry.vm_clock_ns)
        for entry in found
    ] == [
        (
            entry["id"],
            entry["name"],
            entry["vm-state-size"],
            entry["date-sec"] * 10**9 + entry["date-nsec"],
            entry["vm-clock-sec"] * 10**9 + entry["vm-clock-nsec"],
        )
        for entry in told
    ]
    assert found[-1].vm_state_bytes > 0
    assert {entry.disk_size_bytes for entry in found} == {64 * MIB}


def test_a_tag_that_is_not_utf_8_is_kept(image: Path) -> None:
    subprocess.run([b"qemu-img", b"snapshot", b"-c", b"a\xffb", bytes(image)], check=True)
    assert os.fsencode(read_metadata(image).snapshots[0].name) == b"a\xffb"


def by_name(metadata: Metadata) -> dict[str, str]:
    return {entry.name: entry.digest for entry in metadata.snapshots}


def first_l1_entry(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), 8, offset)


def test_a_snapshot_keeps_its_digest_as_long_as_it_exists(image: Path) -> None:
    write(image, 0)
    run("qemu-img", "snapshot", "-c", "kept", image)
    kept = read_metadata(image).snapshots[0]
    was = first_l1_entry(image, kept.l1_offset)
    changes: list[Callable[[], object]] = [
        lambda: write(image, 0, pattern=1),
        lambda: run("qemu-img", "snapshot", "-c", "other", image),
        lambda: run("qemu-img", "snapshot", "-a", "kept", image),
        lambda: run("qemu-img", "snapshot", "-d", "other", image),
        lambda: savevm(image, "state"),
        lambda: run("qemu-img", "amend", "-f", "qcow2", "-o", "lazy_refcounts=on", image),
    ]
    for change in changes:
        change()
        assert by_name(read_metadata(image))["kept"] == kept.digest
    now = first_l1_entry(image, kept.l1_offset)
    assert (was[0] & COPIED, now[0] & COPIED) == (COPIED, 0)
    assert was[1:] == now[1:]


def test_a_snapshot_taken_again_under_its_name_is_another(image: Path) -> None:
    run("qemu-img", "snapshot", "-c", "name", image)
    one = read_metadata(image)
    run("qemu-img", "snapshot", "-d", "name", image)
    run("qemu-img", "snapshot", "-c", "name", image)
    two = read_metadata(image)
    assert one.snapshots[0].id == two.snapshots[0].id
    assert one.snapshots_digest != two.snapshots_digest


def test_an_entry_of_an_older_qemu_keeps_its_digest_when_a_newer_writes_it_anew(
    tmp_path: Path,
) -> None:
    path = create(tmp_path / "disk", "64M", compat="0.10")
    run("qemu-img", "snapshot", "-c", "old", path)
    offset = read_metadata(path).header.snapshots_offset
    with path.open("r+b") as file:
        entry = os.pread(file.fileno(), 40 + 24 + 4, offset)
        short = entry[:36] + struct.pack(">I", 0) + entry[64:68]
        os.pwrite(file.fileno(), short.ljust(len(entry), b"\0"), offset)
    old = read_metadata(path).snapshots[0]
    run("qemu-img", "snapshot", "-c", "new", path)
    assert info(path)["snapshots"][0]["name"] == "old"
    assert read_metadata(path).snapshots[0] == old


LIES = [
    (offset, value.to_bytes(width, "big"))
    for offset, width in (
        (0, 4), (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8),
        (56, 4), (60, 4), (64, 8), (72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1),
        (112, 4), (116, 4),
    )
    for value in (0, 1, 2, 3, 9, 0x200, 0x10000, (1 << 8 * width - 1) - 1)
    if value < 1 << 8 * width
]  # fmt: skip

KNOWN_DISAGREEMENTS = {(32, 2): False, (64, 0): True}
"""(Offset, value) -> whether we refuse what QEMU does not, or the reverse.

LUKS without a LUKS header: we read no keys. A snapshot with an impossible L1 table: QEMU looks at
it when it goes back to it, we look at once.
"""


def refusals(sound: Path, lie: tuple[int, bytes]) -> tuple[bool, bool]:
    """Whether QEMU, and whether we, refuse a copy of *sound* with some bytes changed."""
    offset, value = lie
    path = sound.with_name(f"{offset}-{value.hex()}")
    run("cp", "--sparse=always", sound, path)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), value, offset)
    words = ["qemu-img", "info", "-f", "qcow2", str(path)]
    told = subprocess.run(words, check=False, capture_output=True)
    try:
        read_metadata(path)
    except StoreError:
        return told.returncode != 0, True
    return told.returncode != 0, False


def test_we_refuse_the_headers_that_qemu_refuses_and_no_others(tmp_path: Path) -> None:
    sound = create(tmp_path / "disk", "64M")
    run("qemu-img", "snapshot", "-c", "one", sound)
    os.truncate(sound, 8 * MIB)  # QEMU reads zeros behind the end of a file, we refuse it
    with ThreadPoolExecutor() as pool:
        verdicts = dict(zip(LIES, pool.map(partial(refusals, sound), LIES), strict=True))
    disagreed = {
        (offset, int.from_bytes(value, "big")): by_us
        for (offset, value), (by_qemu, by_us) in verdicts.items()
        if by_qemu != by_us
    }
    assert disagreed == KNOWN_DISAGREEMENTS
    assert sum(by_us for _, by_us in verdicts.values()) > len(LIES) // 4


def changes(before: Identity, path: Path) -> list[str]:
    return [difference.change for difference in differences(before, identify(path, "qcow2"))]


def test_an_image_left_alone_is_the_same(image: Path) -> None:
    before = identify(image, "qcow2")
    info(image)
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 4096", image)
    assert changes(before, image) == []


def test_a_resize_is_seen(image: Path) -> None:
    before = identify(image, "qcow2")
    run("qemu-img", "resize", "-f", "qcow2", image, "2G")
    assert changes(before, image)[0] == "resized"


def test_a_copy_moved_into_its_place_is_seen(image: Path) -> None:
    before = identify(image, "qcow2")
    copy = image.with_name("copy")
    shutil.copy2(image, copy)
    copy.rename(image)
    assert changes(before, image) == ["replaced", "touched"]


def test_a_write_in_place_is_seen(image: Path) -> None:
    write(image, 0)
    before = identify(image, "qcow2")
    write(image, 0, pattern=1)
    assert changes(before, image) == ["written", "touched"]
    write(image, 900 * MIB)
    fields = {difference.field for difference in differences(before, identify(image, "qcow2"))}
    assert "l1_digest" in fields


def test_a_write_is_seen_though_its_time_was_set_back(image: Path) -> None:
    facts = image.stat()
    before = identify(image, "qcow2")
    write(image, 0)
    os.utime(image, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    found = {difference.field for difference in differences(before, identify(image, "qcow2"))}
    assert found >= {"ctime_ns", "l1_digest"}
    assert "mtime_ns" not in found


def test_a_touch_and_a_chmod_are_seen(image: Path) -> None:
    before = identify(image, "qcow2")
    time.sleep(0.02)  # kernels before 6.13 stamp files with the time of the last tick
    image.chmod(0o640)
    assert changes(before, image) == ["touched"]
    image.touch()
    assert changes(before, image) == ["written", "touched"]


def test_a_rebase_and_a_snapshot_are_seen(image: Path) -> None:
    base = create(image.with_name("base"))
    before = identify(image, "qcow2")
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", base, "-F", "qcow2", image)
    assert changes(before, image) == ["written", "header", "touched"]
    before = identify(image, "qcow2")
    run("qemu-img", "snapshot", "-c", "one", image)
    assert "snapshots" in changes(before, image)


def test_allocation_and_digest_agree_with_the_programs(image: Path) -> None:
    write(image, 0, MIB)
    assert allocated_bytes(image) == info(image)["actual-size"]
    again = image.with_name("again")
    run("cp", "--sparse=always", image, again)
    assert digest(image) == digest(again)


@pytest.fixture
def frozen(image: Path) -> Iterator[Path]:
    try:
        yield image
    finally:
        subprocess.run(["chattr", "-i", str(image)], check=False, capture_output=True)


def require_immutable_flag(directory: Path) -> None:
    """Skip where this user cannot set the flag on this file system, asking chattr."""
    probe = directory / "probe"
    probe.touch()
    can = subprocess.run(["chattr", "+i", str(probe)], check=False, capture_output=True)
    subprocess.run(["chattr", "-i", str(probe)], check=False, capture_output=True)
    if can.returncode:
        pytest.skip(f"no immutable flag here: {can.stderr.decode().strip()}")


def test_a_frozen_image_cannot_be_written_even_by_root(frozen: Path, tmp_path: Path) -> None:
    require_immutable_flag(tmp_path)
    frozen.chmod(0o640)
    done = freeze(frozen)
    assert (done.mode_before, done.immutable) == (0o640, True)
    assert run("lsattr", frozen).split()[0].count("i") == 1
    with pytest.raises(PermissionError) as caught:
        os.open(frozen, os.O_RDWR)
    assert caught.value.errno == errno.EPERM
    with pytest.raises(PermissionError):
        frozen.rename(tmp_path / "elsewhere")
    with pytest.raises(subprocess.CalledProcessError):
        write(frozen, 0)
    assert read_metadata(frozen).l2_tables == 0
    thaw(frozen, done)
    assert frozen.stat().st_mode & 0o777 == 0o640
    write(frozen, 0)


def test_freeze_and_thaw_are_idempotent(frozen: Path, tmp_path: Path) -> None:
    require_immutable_flag(tmp_path)
    first, second = freeze(frozen), freeze(frozen)
    assert (second.mode_before, second.immutable) == (0o444, False)
    thaw(frozen, second)
    with pytest.raises(PermissionError):
        os.open(frozen, os.O_RDWR)
    thaw(frozen, first)
    thaw(frozen, first)
    write(frozen, 0)


def test_what_another_made_immutable_stays_so(frozen: Path, tmp_path: Path) -> None:
    require_immutable_flag(tmp_path)
    mode = frozen.stat().st_mode
    run("chattr", "+i", frozen)
    done = freeze(frozen)
    thaw(frozen, done)
    assert run("lsattr", frozen).split()[0].count("i") == 1
    assert frozen.stat().st_mode == mode


def test_a_flag_that_cannot_be_cleared_is_not_passed_over(
    frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_immutable_flag(tmp_path)
    done = freeze(frozen)
    ioctl = fcntl.ioctl

    def refused(fd: int, request: int, argument: bytearray | bytes) -> object:
        if isinstance(argument, bytes):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return ioctl(fd, request, argument)

    monkeypatch.setattr(fcntl, "ioctl", refused)
    with pytest.raises(HostError) as caught:
        thaw(frozen, done)
    assert caught.value.data["errno"] == "EPERM"


def test_freezing_keeps_the_other_flags(frozen: Path, tmp_path: Path) -> None:
    require_immutable_flag(tmp_path)
    run("chattr", "+d", frozen)
    before = run("lsattr", frozen)
    thaw(frozen, freeze(frozen))
    assert run("lsattr", frozen) == before


@pytest.fixture
def loop_device(image: Path) -> Iterator[Path]:
    os.truncate(image, MIB)
    made = subprocess.run(
        ["losetup", "--find", "--show", str(image)], check=False, capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


def test_a_block_device_is_an_image_too(image: Path, loop_device: Path) -> None:
    found = identify(loop_device, "raw")
    assert found.device == loop_device.stat().st_rdev
    assert found.size_bytes == int(run("blockdev", "--getsize64", loop_device))
    assert read_metadata(loop_device).header == read_metadata(image).header
    with pytest.raises(HostError):
        freeze(loop_device)

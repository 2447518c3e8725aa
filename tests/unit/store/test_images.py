"""Images as files of this host: opened with care, followed downwards, frozen and thawed."""

import errno
import fcntl
import os
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from calotype.errors import CommandLineError, HostError, StoreError
from calotype.store import images
from calotype.store.images import (
    Frozen,
    allocated_bytes,
    backing_chain,
    before_freeze,
    digest,
    free_bytes,
    freeze,
    identify,
    may_be_immutable,
    probe_format,
    protection,
    read_metadata,
    require_disk,
    sync_data,
    thaw,
)


def qcow2(backing: bytes = b"", backing_format: bytes = b"") -> bytes:
    """The smallest sound image: version 2, 512-byte clusters, 32 KiB."""
    extension = b""
    if backing_format:
        kind = struct.pack(">II", 0xE2792ACA, len(backing_format))
        extension = (kind + backing_format).ljust(24, b"\0")
    place = (72 + len(extension) if backing else 0, len(backing))
    fixed = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, *place, 9, 32768, 0, 1, 1024, 512, 1, 0, 0
    )
    return (fixed + extension + backing).ljust(1536, b"\0")


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * 1000)
    path.chmod(0o640)
    yield path
    subprocess.run(["chattr", "-i", str(path)], check=False, capture_output=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


READERS: list[Callable[[Path], object]] = [
    lambda path: identify(path, "raw"),
    lambda path: identify(path, "qcow2"),
    lambda path: backing_chain(path, "raw"),
    read_metadata,
    probe_format,
    freeze,
    before_freeze,
    lambda path: thaw(path, Frozen(0o600, immutable=True)),
    allocated_bytes,
    sync_data,
    digest,
]


@pytest.mark.parametrize("read", READERS)
def test_what_is_missing_is_a_host_error(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(HostError) as caught:
        read(tmp_path / "absent")
    assert caught.value.data == {"path": str(tmp_path / "absent"), "errno": "ENOENT"}
    assert caught.value.remedy


@pytest.mark.parametrize("read", READERS)
def test_a_pipe_neither_hangs_nor_passes(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(HostError, match="not a file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize("read", READERS)
def test_a_directory_is_no_image(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(HostError, match="not a file"):
        read(tmp_path)


def test_a_permission_that_is_missing_is_a_host_error(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, _flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostError, match="Permission denied") as caught:
        identify(image, "raw")
    assert caught.value.data["errno"] == "EACCES"


def test_a_raw_image_is_its_file(image: Path) -> None:
    found, facts = identify(image, "raw"), image.stat()
    assert (found.device, found.inode, found.size_bytes) == (facts.st_dev, facts.st_ino, 1000)
    assert (found.mtime_ns, found.ctime_ns) == (facts.st_mtime_ns, facts.st_ctime_ns)
    assert (found.format, found.virtual_size_bytes) == ("raw", 1024)
    assert (found.header_digest, found.l1_digest, found.snapshots_digest) == ("", "", "")


def test_a_symbolic_link_is_followed(image: Path) -> None:
    link = image.with_name("link")
    link.symlink_to(image.name)
    assert identify(link, "raw") == identify(image, "raw")


def test_a_qcow2_image_is_also_its_tables(image: Path) -> None:
    image.write_bytes(qcow2())
    found, metadata = identify(image, "qcow2"), read_metadata(image)
    assert (found.format, found.size_bytes, found.virtual_size_bytes) == ("qcow2", 1536, 32768)
    assert found.header_digest == metadata.header.digest
    assert found.l1_digest == metadata.l1_digest
    assert found.snapshots_digest == metadata.snapshots_digest


def test_an_unsound_image_is_told_with_path_and_place(image: Path) -> None:
    with pytest.raises(StoreError) as caught:
        identify(image, "qcow2")
    assert caught.value.data["path"] == str(image)
    assert caught.value.data["offset"] == 0
    assert str(image) in caught.value.problem


def test_a_block_device_is_its_number(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = list(image.stat())
    facts[0] = stat.S_IFBLK | 0o660
    device = os.stat_result(facts, {"st_rdev": 0xFD01})
    monkeypatch.setattr(os, "fstat", lambda _: device)
    found = identify(image, "raw")
    assert (found.device, found.inode, found.mtime_ns, found.ctime_ns) == (0xFD01, 0, 0, 0)
    assert found.size_bytes == allocated_bytes(image) == 1000
    with pytest.raises(HostError, match="not a file"):
        freeze(image)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"", "raw"),
        (b"QFI\xfb\0\0\0", "raw"),
        (b"QFI\xfb\0\0\0\1", "raw"),
        (b"QFI\xfb\0\0\0\2", "qcow2"),
        (b"QFI\xfb\0\0\0\3", "qcow2"),
        (b"QFI\xfa\0\0\0\3", "raw"),
    ],
)
def test_a_format_is_probed_by_its_first_bytes(image: Path, start: bytes, expected: str) -> None:
    image.write_bytes(start)
    assert probe_format(image) == expected


def test_a_chain_is_followed_from_where_each_image_lies(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    top, middle = tmp_path / "top", tmp_path / "bases" / "middle"
    base, raw = tmp_path / "base", tmp_path / "raw"
    top.write_bytes(qcow2(b"bases/middle", b"qcow2"))
    middle.write_bytes(qcow2(b"../base"))
    base.write_bytes(qcow2(bytes(raw), b"raw"))
    raw.write_bytes(qcow2(b"never read: raw it is"))
    assert backing_chain(top, "qcow2") == [
        (top, "qcow2"),
        (middle, "qcow2"),
        (middle.parent / "../base", "qcow2"),
        (raw, "raw"),
    ]
    assert backing_chain(top, "raw") == [(top, "raw")]


@pytest.mark.parametrize("hop", [b"top", b"./top", b"link"])
def test_a_chain_that_is_a_loop_is_refused(tmp_path: Path, hop: bytes) -> None:
    (tmp_path / "top").write_bytes(qcow2(b"middle"))
    (tmp_path / "middle").write_bytes(qcow2(hop))
    (tmp_path / "link").symlink_to("top")
    with pytest.raises(StoreError, match="its own backing file"):
        backing_chain(tmp_path / "top", "qcow2")


def test_a_chain_has_a_longest_length(tmp_path: Path) -> None:
    for index in range(images.MAX_CHAIN_LENGTH):
        (tmp_path / str(index)).write_bytes(qcow2(b"%d" % (index + 1)))
    (tmp_path / "200").write_bytes(qcow2())
    assert len(backing_chain(tmp_path / "1", "qcow2")) == images.MAX_CHAIN_LENGTH
    with pytest.raises(StoreError, match="too many backing files"):
        backing_chain(tmp_path / "0", "qcow2")


@pytest.mark.parametrize("name", [b'json:{"driver":"qcow2"}', b"nbd://host/disk", b"file:base"])
def test_a_backing_file_behind_a_protocol_is_refused(tmp_path: Path, name: bytes) -> None:
    (tmp_path / "top").write_bytes(qcow2(name))
    with pytest.raises(StoreError) as caught:
        backing_chain(tmp_path / "top", "qcow2")
    assert caught.value.data["backing_file"] == name.decode()
    assert "rebase" in caught.value.remedy


def test_a_colon_behind_a_slash_is_no_protocol(tmp_path: Path) -> None:
    (tmp_path / "top").write_bytes(qcow2(b"./a:b"))
    (tmp_path / "a:b").write_bytes(b"")
    assert backing_chain(tmp_path / "top", "qcow2")[1] == (tmp_path / "a:b", "raw")


def test_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "top").write_bytes(qcow2(b"base", b"vmdk"))
    with pytest.raises(StoreError, match="format vmdk"):
        backing_chain(tmp_path / "top", "qcow2")


def test_a_missing_backing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "top").write_bytes(qcow2(b"base", b"raw"))
    with pytest.raises(HostError) as caught:
        backing_chain(tmp_path / "top", "qcow2")
    assert caught.value.data["path"] == str(tmp_path / "base")


def refuse_flags(monkeypatch: pytest.MonkeyPatch, number: int, *, only_set: bool = False) -> None:
    """A file system whose flags cannot be had (or set)."""
    ioctl = fcntl.ioctl

    def refused(fd: int, request: int, argument: bytearray) -> int:
        if only_set and request == images._FS_IOC_GETFLAGS:
            return int(ioctl(fd, request, argument))
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "ioctl", refused)


@pytest.mark.parametrize("number", [errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM])
@pytest.mark.parametrize("only_set", [True, False])
def test_where_there_is_no_flag_the_mode_must_do(
    image: Path, monkeypatch: pytest.MonkeyPatch, number: int, only_set: bool
) -> None:
    refuse_flags(monkeypatch, number, only_set=only_set)
    frozen = freeze(image)
    assert frozen == Frozen(0o640, immutable=False)
    assert mode(image) == 0o440
    assert freeze(image) == Frozen(0o440, immutable=False)
    thaw(image, frozen)
    assert mode(image) == 0o640


def test_any_other_failure_of_the_flag_is_told(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_flags(monkeypatch, errno.EIO)
    with pytest.raises(HostError) as caught:
        freeze(image)
    assert caught.value.data["errno"] == "EIO"


def test_any_other_failure_to_set_the_flag_is_told(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_freeze(image)
    refuse_flags(monkeypatch, errno.EROFS, only_set=True)
    with pytest.raises(HostError) as caught:
        freeze(image)
    assert caught.value.data["errno"] == "EROFS"


def test_a_freeze_can_be_undone_whatever_became_of_it(image: Path) -> None:
    journalled = before_freeze(image)
    assert journalled.mode_before == 0o640
    thaw(image, journalled)
    assert mode(image) == 0o640
    image.chmod(0o444)
    thaw(image, journalled)
    assert mode(image) == 0o640
    freeze(image)
    thaw(image, journalled)
    thaw(image, journalled)
    assert mode(image) == 0o640
    image.write_bytes(b"writable again")


def test_freezing_twice_is_freezing_once(image: Path) -> None:
    first = freeze(image)
    freeze(image)
    assert mode(image) == 0o440
    thaw(image, first)
    assert mode(image) == 0o640


def test_space_is_counted(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(1 << 30)
    assert allocated_bytes(sparse) == 0
    assert free_bytes(sparse) == free_bytes(tmp_path) > 0
    with pytest.raises(HostError):
        free_bytes(tmp_path / "absent")


def test_a_sync_takes_its_time(image: Path) -> None:
    assert 0 < sync_data(image) < 60_000


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 << 20])
def test_a_digest_is_of_all_bytes(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert digest(tmp_path / "file", 4096) == digest(tmp_path / "file") == blake3(data).hexdigest()


def test_no_descriptor_is_left_open(image: Path) -> None:
    image.write_bytes(qcow2())
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - as the kernel shows it
    for read in READERS:
        read(image)
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_folder_that_cannot_be_written_holds_no_overlay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vm"
    folder.mkdir()
    assert images.may_create_in(folder)
    assert not images.may_create_in(tmp_path / "nosuch")
    monkeypatch.setattr(images, "_flags", lambda _: 0x10)
    assert not images.may_create_in(folder)


# --- what can be a disk, and how it is protected --------------------------------------------------


def test_a_device_a_pipe_and_a_folder_are_no_disks(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for path, word in (
        (Path("/dev/null"), "a character device"),
        (tmp_path / "link", "a character device"),
        (tmp_path / "pipe", "a FIFO"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(CommandLineError, match=word) as caught:
            require_disk(path)
        assert caught.value.data == {"path": str(path)}
        assert caught.value.remedy


def test_a_file_can_be_a_disk_without_being_opened(image: Path) -> None:
    image.chmod(0)
    require_disk(image)


def test_a_disk_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError):
        require_disk(tmp_path / "absent")


@pytest.mark.parametrize(
    ("flags", "capabilities", "expected"),
    [(0, "200", True), (0, "1ff", False), (0, "0", False), (None, "3ff", False)],
)
def test_an_image_may_be_made_immutable_where_file_system_and_user_can(
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: int | None,
    capabilities: str,
    expected: bool,
) -> None:
    monkeypatch.setattr(images, "_flags", lambda _: flags)
    monkeypatch.setattr(Path, "read_text", lambda _: f"Name:\tx\nCapEff:\t{capabilities}\n")
    assert may_be_immutable(image) is expected


def test_that_an_image_may_be_made_immutable_is_no_empty_promise(image: Path) -> None:
    expected = may_be_immutable(image)
    frozen = freeze(image)
    try:
        assert frozen.immutable is expected
        assert protection(image) == ("immutable" if expected else "read-only")
    finally:
        thaw(image, frozen)
    assert protection(image) == "writable"


def test_the_protection_of_what_cannot_be_looked_at_is_told_too(tmp_path: Path) -> None:
    assert protection(tmp_path / "absent") == "missing"
    assert protection(tmp_path) == "unknown"

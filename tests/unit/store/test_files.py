"""Durable, private files: what is written is whole, what is made is private."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from calotype.errors import HostError
from calotype.store import files
from calotype.store.files import (
    create_private,
    host_errors,
    make_private_directory,
    sync_directory,
    write_atomically,
)


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask")
def test_a_file_is_written_with_its_mode_whatever_the_umask(tmp_path: Path) -> None:
    write_atomically(tmp_path / "private", b"one")
    write_atomically(tmp_path / "public", b"two", mode=0o644)
    assert (tmp_path / "private").read_bytes() == b"one"
    assert (mode(tmp_path / "private"), mode(tmp_path / "public")) == (0o600, 0o644)


def test_what_was_there_is_replaced_and_nothing_is_left_over(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_atomically(path, b"old")
    inode = path.stat().st_ino
    write_atomically(path, b"")
    assert path.read_bytes() == b""
    assert path.stat().st_ino != inode
    assert list(tmp_path.iterdir()) == [path]


def test_a_symbolic_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"untouched")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"untouched"
    assert not (tmp_path / "link").is_symlink()


def test_bytes_are_synced_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest"
    seen: list[tuple[bool, bool]] = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        seen.append((stat.S_ISDIR(os.fstat(fd).st_mode), path.exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    write_atomically(path, b"data")
    assert seen == [(False, False), (True, True)]


@pytest.mark.parametrize("step", ["fsync", "fchmod", "write"])
def test_a_failed_write_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "manifest"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(HostError) as caught:
        write_atomically(path, b"new")
    assert caught.value.data == {"path": str(path), "errno": "ENOSPC"}
    assert "free some space" in caught.value.remedy
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_a_write_goes_on_after_a_short_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 40
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, rest: write(fd, rest[:1000]))
    write_atomically(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data


def test_a_write_into_nothing_is_a_host_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        write_atomically(tmp_path / "absent" / "file", b"")


@pytest.mark.usefixtures("umask")
def test_a_directory_is_made_private_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    make_private_directory(path)
    assert (mode(path), mode(path.parent)) == (0o700, 0o700)


def test_a_directory_that_exists_becomes_private_its_parent_does_not(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "store"
    path.mkdir()
    path.chmod(0o755)
    make_private_directory(path)
    make_private_directory(path)
    assert (mode(path), mode(tmp_path)) == (0o700, 0o755)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_directory_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "store"
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    path.symlink_to("elsewhere") if kind == "link" else path.touch()
    with pytest.raises(HostError, match="store"):
        make_private_directory(path)
    assert mode(tmp_path / "elsewhere") != 0o700


@pytest.mark.usefixtures("umask")
def test_a_private_file_is_new_and_write_only(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    fd = create_private(path)
    try:
        assert os.write(fd, b"page") == 4
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.read(fd, 1)
    finally:
        os.close(fd)
    assert mode(path) == 0o600
    with pytest.raises(HostError) as caught:
        create_private(path)
    assert caught.value.data["errno"] == "EEXIST"


def test_a_private_file_is_not_made_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(HostError):
        create_private(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_only_a_directory_is_synced_as_one(tmp_path: Path) -> None:
    sync_directory(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(HostError):
        sync_directory(tmp_path / "file")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - as the kernel shows it
    write_atomically(tmp_path / "file", b"data")
    make_private_directory(tmp_path / "directory")
    make_private_directory(tmp_path / "directory")
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_only_failures_of_the_host_are_translated() -> None:
    with pytest.raises(ValueError, match="ours"), host_errors(Path("p")):
        raise ValueError("ours")
    with pytest.raises(HostError, match="p: odd") as caught, host_errors(Path("p")):
        raise OSError("odd")
    assert isinstance(caught.value.__cause__, OSError)


def test_what_a_crash_leaves_is_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(files.TEMPORARY_PREFIX)


@pytest.fixture(params=["links", "no links"])
def linking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has hard links, and one that has none."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("linking")
def test_a_whole_file_gets_its_name_and_nothing_is_replaced(tmp_path: Path) -> None:
    temporary, path = tmp_path / "temporary", tmp_path / "path"
    temporary.write_text("one")
    files.publish(temporary, path)
    temporary.write_text("two")
    for there in (path, tmp_path / "link"):
        if not there.exists():
            there.symlink_to(tmp_path / "nowhere")
        with pytest.raises(HostError, match="exists") as caught:
            files.publish(temporary, there)
        assert "another name" in caught.value.remedy
    assert (temporary.read_text(), os.readlink(there)) == ("two", str(tmp_path / "nowhere"))  # noqa: PTH115 - as it is


def test_what_is_not_free_is_refused(tmp_path: Path) -> None:
    files.require_free(tmp_path / "new")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "link", tmp_path, tmp_path / "nosuch" / "new"):
        with pytest.raises(HostError):
            files.require_free(path)

"""What a witness is built of: the right drivers in the right order, once, and clear refusals."""

import lzma
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from calotype.errors import HostError
from calotype.testing.witness.build import Witness, witness

RELEASE = "6.1.0-fake"


def module(depends: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel of the environment's choice, its modules in the place where Debian has them."""
    (tmp_path / "boot").mkdir()
    kernel = tmp_path / "boot" / f"vmlinuz-{RELEASE}"
    kernel.write_bytes(b"a kernel")
    modules = tmp_path / "usr" / "lib" / "modules" / RELEASE / "kernel"
    modules.mkdir(parents=True)
    (modules / "virtio.ko").write_bytes(module("virtio_ring"))
    (modules / "virtio_ring.ko.xz").write_bytes(lzma.compress(module("")))
    (modules / "virtio_pci.ko").write_bytes(module("virtio,virtio-ring"))
    (modules / "virtio-blk.ko").write_bytes(module("virtio"))
    (modules / "virtio_scsi.ko").write_bytes(module("scsi_mod,virtio"))
    (modules / "scsi_mod.ko").write_bytes(module(""))
    (modules / "unwanted.ko").write_bytes(module(""))
    monkeypatch.setenv("CALOTYPE_KERNEL", str(kernel))
    monkeypatch.delenv("CALOTYPE_MODULES", raising=False)
    return modules


def unpacked(initrd: Path, name: str) -> bytes:
    return subprocess.run(
        ["cpio", "--extract", "--to-stdout", "--quiet", name],
        input=initrd.read_bytes(),
        capture_output=True,
        check=True,
    ).stdout


def names(initrd: Path) -> Iterable[str]:
    listing = subprocess.run(
        ["cpio", "--list", "--quiet"], input=initrd.read_bytes(), capture_output=True, check=True
    )
    return listing.stdout.decode().splitlines()


@pytest.mark.usefixtures("modules")
def test_company_is_in_an_initramfs_of_its_own(tmp_path: Path) -> None:
    alone, in_company = (witness(tmp_path / "cache", agent=agent).initrd for agent in (False, True))
    company = set(names(in_company)) - set(names(alone))
    assert {"company", "usr/sbin/qemu-ga", "modules/agent", "lib/libc.so.6"} <= company
    assert any(name.startswith("lib64/ld-linux") for name in company)


@pytest.mark.usefixtures("modules")
def test_drivers_come_behind_what_they_need_and_only_once(tmp_path: Path) -> None:
    initrd = witness(tmp_path / "cache").initrd
    assert unpacked(initrd, "modules/virtio").split() == [
        b"virtio_ring",
        b"virtio",
        b"virtio_pci",
        b"virtio_blk",
    ]
    assert unpacked(initrd, "modules/scsi").split() == [b"scsi_mod", b"virtio_scsi"]
    assert unpacked(initrd, "modules/virtio_ring.ko") == module("")
    assert {"init", "witness", "bin/busybox", "dev", "proc", "sys"} <= set(names(initrd))
    assert "modules/unwanted.ko" not in names(initrd)


def test_it_is_built_once_and_again_when_something_changed(modules: Path, tmp_path: Path) -> None:
    first = witness(tmp_path / "cache")
    built_ns = first.initrd.stat().st_mtime_ns
    assert witness(tmp_path / "cache") == first
    assert first.initrd.stat().st_mtime_ns == built_ns

    (modules / "virtio-blk.ko").write_bytes(module("virtio,virtio_ring"))
    assert witness(tmp_path / "cache").initrd != first.initrd


@pytest.mark.usefixtures("modules")
def test_two_makers_at_once_both_succeed(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as makers:
        made = list(makers.map(lambda _: witness(cache), range(4)))
    assert len(set(made)) == 1
    assert [path.name for path in cache.iterdir()] == [made[0].initrd.parent.name]


@pytest.mark.usefixtures("modules")
def test_a_named_folder_of_modules_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    monkeypatch.setenv("CALOTYPE_MODULES", str(tmp_path / "own"))
    assert unpacked(witness(tmp_path / "cache").initrd, "modules/virtio") == b""


def test_the_kernel_is_told_about_disks_and_pool() -> None:
    words = Witness(Path("kernel"), Path("initrd")).append(["vda", "sda"], ram_mib=8, seed=3)
    assert words.split()[-3:] == ["witness.disks=vda,sda", "witness.ram=8", "witness.seed=3"]
    assert "console=ttyS0" in words.split()


def test_no_kernel_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CALOTYPE_KERNEL", raising=False)
    monkeypatch.setenv("CALOTYPE_DEPS", str(tmp_path))
    with pytest.raises(HostError, match="no kernel") as caught:
        witness(tmp_path / "cache")
    assert "scripts/setup" in caught.value.remedy


def test_a_named_kernel_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_KERNEL", str(tmp_path / "absent"))
    with pytest.raises(HostError, match="absent"):
        witness(tmp_path / "cache")


def test_a_module_packed_in_an_unknown_way_is_refused(modules: Path, tmp_path: Path) -> None:
    (modules / "virtio.ko").unlink()
    (modules / "virtio.ko.zst").write_bytes(b"")
    with pytest.raises(HostError, match=r"virtio\.ko\.zst"):
        witness(tmp_path / "cache")


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("tool", ["cc", "cpio"])
def test_a_tool_that_fails_is_named_and_leaves_nothing(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / tool).write_text("#!/bin/sh\necho it broke >&2\nexit 1\n")
    (tmp_path / "bin" / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    with pytest.raises(HostError, match=f"{tool} failed: it broke"):
        witness(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.usefixtures("modules")
def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="busybox is not installed"):
        witness(tmp_path / "cache")

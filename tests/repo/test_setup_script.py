"""`scripts/setup`: of help where it can do nothing, and free of anyone's own addresses."""

import shutil
import subprocess
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
SETUP = TREE / "scripts" / "setup"
ORDINARY = ("bash", "cat", "dirname", "env", "grep", "head", "python3", "readlink", "sed", "uname")


@pytest.fixture
def elsewhere(tmp_path: Path) -> dict[str, str]:
    """The environment of a bare machine that is no Debian."""
    (tmp_path / "os-release").write_text('ID=fedora\nVERSION_ID=42\nPRETTY_NAME="Fedora 42"\n')
    (tmp_path / "bin").mkdir()
    for name in ORDINARY:
        found = shutil.which(name)
        assert found
        (tmp_path / "bin" / name).symlink_to(found)
    return {
        "PATH": str(tmp_path / "bin"),
        "CALOTYPE_OS_RELEASE": str(tmp_path / "os-release"),
        "CALOTYPE_DEPS": str(tmp_path / "deps"),
    }


def set_up(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SETUP], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_elsewhere_it_says_what_is_missing_and_how_to_get_it(elsewhere: dict[str, str]) -> None:
    done = set_up(elsewhere)
    assert done.returncode != 0
    assert "this is Fedora 42" in done.stderr
    for tool in ("qemu-system-x86_64", "qemu-img", "busybox", "cpio", "cc"):
        assert f"  {tool}" in done.stderr or f"static {tool}" in done.stderr
    assert not Path(elsewhere["CALOTYPE_DEPS"]).exists()


def test_an_old_qemu_counts_as_missing(elsewhere: dict[str, str]) -> None:
    qemu = Path(elsewhere["PATH"]) / "qemu-system-x86_64"
    qemu.write_text("#!/bin/sh\necho QEMU emulator version 7.2.22\n")
    qemu.chmod(0o755)
    assert "version 10 or newer" in set_up(elsewhere).stderr


def test_the_script_holds_no_address_of_a_mirror() -> None:
    for path in (SETUP, *(TREE / "requirements").iterdir()):
        assert "://" not in path.read_text()

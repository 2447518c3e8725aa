"""What is offered at the tab key, asked for as a shell asks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builders import OTHER, SNAPSHOT, make_manifest, make_record
from calotype.cli.main import COMMANDS
from calotype.store.store import Store


def offered(line: str, root: Path) -> list[str]:
    """What a shell is answered for the line before the cursor."""
    words = line.split(" ")
    done = subprocess.run(
        [sys.executable, "-m", "calotype"],
        env={
            **os.environ,
            "CALOTYPE_STORE": str(root),
            "_CALOTYPE_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        },
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stderr == ""
    return [each.partition(",")[2] for each in done.stdout.split()]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    store = Store(tmp_path / "store")
    record = make_record()
    store.make_vm_folder(record.id)
    store.save(record)
    for manifest in (make_manifest(tag="before"), make_manifest(id=OTHER, tag="noon")):
        store.make_snapshot_folder(record.id, manifest.id)
        store.commit(manifest)
    return store.root


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("calotype ta", ["take", "tag"]),
        ("calotype take ", ["web"]),
        ("calotype list w", ["web"]),
        ("calotype take x", []),
        ("calotype restore web --tag ", ["before", "noon"]),
        ("calotype restore web --tag n", ["noon"]),
        ("calotype show web --id ", sorted([SNAPSHOT, OTHER])),
        ("calotype restore nosuch --tag ", []),
        ("calotype take --store /nosuch/store ", []),
        ("calotype completion ", ["bash", "zsh", "fish"]),
    ],
)
def test_what_there_is_is_offered(root: Path, line: str, answer: list[str]) -> None:
    found = offered(line, root)
    assert (sorted(found) if "--id" in line else found) == answer


def test_every_command_is_offered(root: Path) -> None:
    assert offered("calotype ", root) == list(COMMANDS)


def test_looking_makes_no_store(tmp_path: Path) -> None:
    assert offered("calotype take ", tmp_path / "none") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell: str) -> None:
    command = [sys.executable, "-m", "calotype", "completion", shell]
    script = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f"_CALOTYPE_COMPLETE={shell}_complete" in script

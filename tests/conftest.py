"""What all tests share: the witness is built once, and what a test froze is thawed again."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calotype.testing.machine import thaw_all
from calotype.testing.witness import Witness, witness
from calotype.testing.witness_vm import WitnessVm

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def built_witness() -> Witness:
    """The witness, built once for all sessions and workers."""
    return witness(Path(os.environ.get("CALOTYPE_DEPS", ROOT / ".deps")) / "witness")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder; immutable files in it are made mutable in the end."""
    yield tmp_path
    thaw_all(tmp_path)


@pytest.fixture
def boot(folder: Path, built_witness: Witness) -> Iterator[Callable[..., WitnessVm]]:
    """Make disks, and boot a witness from them under Calotype; ended in the end by its pid."""
    vms: list[WitnessVm] = []

    def booted(**settings: Any) -> WitnessVm:
        vm = WitnessVm(folder, built_witness, **settings)
        vms.append(vm)
        vm.make_disks()
        vm.run()
        vm.await_rounds(20)
        return vm

    yield booted
    for vm in vms:
        vm.clean_up()

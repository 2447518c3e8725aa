"""What all tests share: the witness is built once, and what a test froze is thawed again."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calotype.qemu import process
from calotype.testing.machine import Machine, thaw_all
from calotype.testing.whole import picture
from calotype.testing.witness import Witness, witness
from calotype.testing.witness_vm import WitnessVm
from crashing import DISKS, OPERATIONS, Done, Subject
from refusing import machine_with_snapshots

ROOT = Path(__file__).parent.parent
DEPS = Path(os.environ.get("CALOTYPE_DEPS", ROOT / ".deps"))


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A command that has told its result lets no signal through any more; who comes next does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture(scope="session")
def built_witness() -> Witness:
    """The witness, built once for all sessions and workers."""
    return witness(DEPS / "witness")


@pytest.fixture(scope="session")
def path_before() -> str:
    """Where programs are found, whatever a test has put in front."""
    return os.environ["PATH"]


@pytest.fixture
def qemu_7_2(monkeypatch: pytest.MonkeyPatch, path_before: str) -> None:
    """Have QEMU 7.2 and its tools found before the system's own.

    Where `scripts/setup` provides it, not to have it is a failure.
    """
    folder = Path(os.environ.get("CALOTYPE_QEMU_7_2", DEPS / "qemu-7.2" / "bin"))
    program = folder / "qemu-system-x86_64"
    if not program.exists():
        is_debian = "\nID=debian\n" in Path("/etc/os-release").read_text()
        missing = pytest.fail if is_debian else pytest.skip
        missing(f"there is no {program}: `make setup` fetches it on Debian, and says why it cannot")
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert " 7.2." in said, said
    monkeypatch.setenv("PATH", f"{folder}:{path_before}")


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


# --- machines that crash tests are played on ----------------------------------------------------


def _run(folder: Path) -> Subject:
    vm = Subject(folder, disks=DISKS)
    vm.make_disks()
    vm.run()
    return vm


@pytest.fixture
def subject(folder: Path) -> Iterator[Subject]:
    """A machine that runs; ended in the end by its pid, also if it hangs."""
    vm = _run(folder)
    yield vm
    for qemu in process.find("CALOTYPE_VM", vm.home.name):
        os.kill(qemu.pid, signal.SIGCONT)
        os.kill(qemu.pid, signal.SIGKILL)
    vm.clean_up()


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """What is there when an operation has succeeded, by its name; each is played once."""
    pictures: dict[str, dict[str, Any]] = {}

    def look(name: str) -> dict[str, Any]:
        if name not in pictures:
            vm = _run(tmp_path_factory.mktemp("done"))
            try:
                OPERATIONS[name].prepare(vm)
                vm.calotype(*OPERATIONS[name].words)
                pictures[name] = picture(vm)
            finally:
                vm.clean_up()
        return pictures[name]

    return look


# --- machines that nothing may change ------------------------------------------------------------


@pytest.fixture(scope="session")
def off(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine that is off; each test leaves it as it found it."""
    vm = machine_with_snapshots(tmp_path_factory.mktemp("off"))
    vm.stop()
    yield vm
    vm.clean_up()


@pytest.fixture(scope="session")
def on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine that runs; each test leaves it as it found it."""
    vm = machine_with_snapshots(tmp_path_factory.mktemp("on"))
    yield vm
    vm.clean_up()

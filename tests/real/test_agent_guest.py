"""The guest's agent as it is: Debian's, in a Linux that writes to an ext4 all the time.

What a snapshot is worth is read from the superblock in the image; what time it is in the guest,
from what the guest says itself.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calotype.testing.agent_vm import FILES, AgentVm
from calotype.testing.crash import main as crash
from calotype.testing.machine import CommandFailed, wait
from calotype.testing.witness import Witness, witness

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]

QUIESCE = ("--machine-state", "none", "--quiesce")
Boot = Callable[..., AgentVm]


@pytest.fixture(scope="session")
def in_company(built_witness: Witness) -> Witness:
    """The witness with an agent, built beside the one without."""
    return witness(built_witness.initrd.parents[1], agent=True)


@pytest.fixture
def boot(folder: Path, in_company: Witness) -> Iterator[Boot]:
    vms: list[AgentVm] = []

    def booted(**settings: Any) -> AgentVm:
        vm = AgentVm(folder, in_company, **settings)
        vms.append(vm)
        vm.make_disks()
        vm.run()
        vm.await_writing()
        return vm

    yield booted
    for vm in vms:
        vm.clean_up()


def frozen_image(vm: AgentVm, snapshot: str) -> Path:
    """The image that holds the guest's file system as it was at a snapshot."""
    (image,) = (
        part.image for part in vm.manifest(snapshot).storage if part.origin.path.endswith(FILES)
    )
    assert image
    return Path(image.path)


def test_a_quiesced_file_system_is_in_order_and_its_twin_is_not(boot: Boot) -> None:
    vm = boot()
    told, _ = vm.await_writing()
    quiesced = vm.take(*QUIESCE)
    vm.await_writing()
    twin = vm.take("--machine-state", "none")
    vm.await_writing()

    in_order = vm.file_system(frozen_image(vm, quiesced))
    assert not in_order.needs_recovery
    assert in_order.is_clean
    assert in_order.written >= told
    assert vm.file_system(frozen_image(vm, twin)).needs_recovery
    worth = [each["consistency"] for each in vm.calotype("list")["vms"][0]["snapshots"]]
    assert worth == ["filesystem", "crash"]

    vm.stop()
    restored = vm.calotype("restore", vm.name, "--id", quiesced)
    assert restored["clock_behind_s"] is None
    vm.await_writing()


def test_a_taker_that_dies_or_hangs_keeps_nothing_frozen(boot: Boot) -> None:
    vm = boot()
    for deed, state in (("kill-self", "Z"), ("stop-self", "T")):
        struck = struck_when_frozen(vm, deed)
        try:
            wait(lambda: state_of(struck.pid) == state, f"its {deed}")  # noqa: B023 - now
            vm.await_writing()  # nobody has run a command
        finally:
            struck.kill()
            struck.wait(60)
        vm.calotype("recover", vm.name)
        assert vm.calotype("list")["vms"][0]["snapshots"] == []
    assert vm.take(*QUIESCE)


def state_of(pid: int) -> str:
    """The state of a process, in the kernel's letter."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def struck_when_frozen(vm: AgentVm, deed: str) -> "subprocess.Popen[bytes]":
    """A take that something happens to as soon as the file systems are frozen."""
    words = ["take", vm.name, *QUIESCE, "--freeze-limit", "3000", "--store", str(vm.store)]
    place = 7  # a folder, two overlays made and opened, the record, the flush
    return subprocess.Popen(
        [sys.executable, "-m", crash.__module__, f"done:{place}", deed, *words],
        cwd=vm.folder,
        env={"CALOTYPE_STORE": str(vm.store), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_the_clock_is_behind_by_as_much_as_is_said_until_it_is_set(boot: Boot) -> None:
    vm = boot()
    snapshot = vm.take()
    vm.stop()
    time.sleep(2)

    behind = vm.calotype("restore", vm.name, "--id", snapshot)
    assert behind["clock_behind_s"] >= 2
    assert not behind["is_clock_set"]
    assert behind_s(vm) == pytest.approx(behind["clock_behind_s"], abs=2)

    vm.stop()
    right = vm.calotype("restore", vm.name, "--id", snapshot, "--sync-time")
    assert (right["is_clock_set"], right["warnings"]) == (True, [])
    assert right["clock_behind_s"] > behind["clock_behind_s"]
    assert behind_s(vm) == pytest.approx(0, abs=2)


def test_a_session_with_an_agent(boot: Boot) -> None:
    vm = boot()

    quiesce = " ".join(QUIESCE)

    def typed(line: str) -> str:
        done = subprocess.run(
            [Path(sys.executable).parent / "calotype", *line.split()],
            env={**os.environ, "CALOTYPE_STORE": str(vm.store)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout

    assert "FreezeFileSystems, PassInstant, ThawFileSystems" in typed(
        f"take {vm.name} {quiesce} --plan"
    )
    assert "the guest was not stopped" in typed(f"take {vm.name} {quiesce} --tag quiet")
    typed(f"take {vm.name} --tag whole")
    told = typed(f"list {vm.name}").splitlines()
    assert any("'quiet'" in line and "filesystem-consistent" in line for line in told)
    assert any("'whole'" in line and "machine-consistent" in line for line in told)
    back = typed(f"restore {vm.name} --tag whole --sync-time")
    assert "behind, and was set\n" in back
    assert "nobody ran for" in back
    assert behind_s(vm) == pytest.approx(0, abs=2)


def behind_s(vm: AgentVm) -> float:
    """By how much the guest's clock is behind, as the guest itself tells the time."""
    return time.time() - vm.await_writing()[1]


def test_a_guest_without_an_agent_is_not_quiesced_and_its_clock_not_set(boot: Boot) -> None:
    vm = boot(agent="off")
    with pytest.raises(CommandFailed, match="the guest agent does not answer") as raised:
        vm.take(*QUIESCE)
    assert raised.value.data["exit_code"] == 4
    snapshot = vm.take()
    vm.stop()
    restored = vm.calotype("restore", vm.name, "--id", snapshot, "--sync-time")
    assert not restored["is_clock_set"]
    assert "does not answer" in restored["warnings"][0]
    vm.await_writing()


def test_an_agent_that_dies_while_frozen_thaws_when_it_is_started_again(boot: Boot) -> None:
    vm = boot(agent="dies")
    struck = struck_when_frozen(vm, "stop-self")
    try:
        wait(lambda: state_of(struck.pid) == "T", "it to be stopped")
        vm.await_writing()  # the guard goes on asking until there is an agent again
        struck.send_signal(signal.SIGCONT)
        assert struck.wait(60) in (7, 8)
    finally:
        struck.kill()
        struck.wait(60)
    assert vm.calotype("list")["vms"][0]["snapshots"] == []
    assert vm.take(*QUIESCE)

"""One session of a user, through the installed command, with a terminal where a user has one."""

import json
import os
import pty
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from calotype.testing.machine import Machine, wait
from calotype.testing.witness_vm import WitnessVm

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

Boot = Callable[..., WitnessVm]
CALOTYPE = Path(sys.executable).parent / "calotype"


class Shell:
    """The installed command in a user's folder; each call is what was typed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "CALOTYPE_STORE": str(folder / "store"), "TERM": "xterm"}

    def __call__(self, line: str, expected: int = 0) -> str:
        done = subprocess.run(
            [CALOTYPE, *shlex.split(line)],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == expected, done.stderr
        return done.stdout if expected == 0 else done.stderr

    def at_terminal(self, line: str) -> "Terminal":
        return Terminal([str(CALOTYPE), *shlex.split(line)], self.folder, self.environment)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execve(command[0], command, environment)
        self.seen = b""

    def read_until(self, words: bytes, patience_s: float = 60.0) -> bytes:
        deadline = time.monotonic() + patience_s
        while words not in self.seen:
            assert time.monotonic() < deadline, self.seen[-2000:]
            if select.select([self.screen], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.screen, 1 << 16)
                except OSError:
                    break
        assert words in self.seen, self.seen[-2000:]
        return self.seen

    def type(self, keys: bytes) -> None:
        os.write(self.screen, keys)

    def ended(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        os.close(self.screen)
        return os.waitstatus_to_exitcode(status)


@pytest.fixture
def small(folder: Path) -> Iterator[Machine]:
    machine = Machine(folder)
    machine.make_disks()
    machine.run()
    yield machine
    machine.clean_up()


def test_a_session(boot: Boot) -> None:
    vm = boot(name="web 1", disks=("a,b.qcow2", "c d.raw"))
    shell = Shell(vm.folder)
    assert "running" in shell("ps")
    assert shell("ps -q") == "web 1\n"

    console = shell.at_terminal("console 'web 1'")
    console.read_until(b"connected; Ctrl-] ends it")
    console.read_until(b"TICK n=")
    assert "in use" in shell("console 'web 1'", expected=6)
    console.type(b"check\n")
    console.read_until(b"CHECKED n=")
    console.type(b"\x1d")
    assert console.ended() == 0

    assert "pause" in shell("take 'web 1' --plan")
    assert shell("list -q") == ""
    taking = shell.at_terminal("take 'web 1' --tag 'before lunch'")
    taking.read_until(b"pause ")
    assert taking.ended() == 0
    assert b"\x1b[" in taking.seen, "no bar was drawn on the terminal"
    identity = shell("list -q").strip()
    assert len(identity) == 16
    assert "'before lunch'" in shell("list 'web 1'")
    assert identity in shell(f"show 'web 1' --id {identity[:6]}")
    assert "TICK n=" in shell("logs 'web 1'")

    shell("stop 'web 1' --now")
    assert "off" in shell("ps")
    restored = shell("restore 'web 1' --tag 'before lunch'")
    undo = restored.strip().splitlines()[-1]
    assert undo.startswith("calotype stop 'web 1' --now --store ")
    mark = vm.console_size()
    assert vm.testimony(mark).is_consistent
    stopping, going_back = undo.split(" && ")
    shell(stopping.removeprefix("calotype "))
    assert "is off" in shell(going_back.removeprefix("calotype "))
    assert "kept" in shell("forget 'web 1'")
    assert shell("ps -q") == ""


def test_the_console_takes_what_is_piped_into_it(boot: Boot) -> None:
    vm = boot()
    piped = subprocess.Popen(
        [CALOTYPE, "console", vm.name],
        env={**os.environ, "CALOTYPE_STORE": str(vm.store)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert piped.stdin
    assert piped.stdout
    piped.stdin.write(b"check\n")
    piped.stdin.flush()
    said = b""
    while b"CHECKED" not in said:
        said += os.read(piped.stdout.fileno(), 4096)
    piped.communicate(timeout=30)
    assert piped.returncode == 0


def test_what_the_console_says_is_one_object_when_it_ends(boot: Boot) -> None:
    vm = boot()
    mark = vm.console_size()
    piped = subprocess.Popen(
        [CALOTYPE, "console", vm.name, "--json"],
        env={**os.environ, "CALOTYPE_STORE": str(vm.store)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert piped.stdin
    piped.stdin.write(b"check\n")
    piped.stdin.flush()
    log = vm.home / "console.log"
    wait(lambda: b"CHECKED" in log.read_bytes()[mark:], "the guest's answer")
    said, _ = piped.communicate(timeout=30)
    told = json.loads(said)
    assert (piped.returncode, told["vm"], told["schema"]) == (0, vm.name, 1)
    assert "CHECKED" in told["text"]


def test_logs_follow_until_the_vm_ends(boot: Boot) -> None:
    vm = boot()
    following = subprocess.Popen(
        [CALOTYPE, "logs", vm.name, "-f"],
        env={**os.environ, "CALOTYPE_STORE": str(vm.store)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    vm.await_rounds(20, vm.console_size())
    last = vm.ticks()[-1]
    vm.kill()
    said, _ = following.communicate(timeout=30)
    assert following.returncode == 0
    assert f"TICK n={last.n} ".encode() in said


def test_a_tag_is_never_an_id_and_an_id_never_a_tag(small: Machine) -> None:
    first = small.take("--tag", "2")
    prefix = first[:2]
    second = small.take("--tag", prefix)
    shell = Shell(small.folder)
    assert first in shell(f"show small --id {first}")
    assert second in shell(f"show small --tag {prefix}")
    assert "no snapshot with the tag" in shell(f"show small --tag {first}", expected=3)
    assert "is no id" in shell("show small --id latest", expected=2)
    assert "give exactly one" in shell(f"show small --id {first} --tag 2", expected=2)


def test_the_same_tag_twice_is_told_by_ids(small: Machine) -> None:
    ids = [small.take("--tag", "same") for _ in range(2)]
    said = Shell(small.folder)("restore small --tag same", expected=3)
    assert all(identity in said for identity in ids)


def test_a_vm_survives_the_end_of_the_command_and_of_its_terminal(folder: Path) -> None:
    machine = Machine(folder)
    machine.make_disks()
    shell = Shell(folder)
    try:
        running = shell.at_terminal(f"run small -- {shlex.join(machine.argv())}")
        running.read_until(b"small runs")
        assert running.ended() == 0
        assert "running" in shell("ps")
        pid = machine.pid()
        assert pid is not None
        assert os.getsid(pid) == pid
        assert os.getpgid(pid) == pid
    finally:
        machine.clean_up()


def test_a_guest_that_does_not_power_off_is_told_and_can_be_ended(folder: Path) -> None:
    machine = Machine(folder)
    machine.make_disks()
    machine.run()
    try:
        said = Shell(folder)("stop small --timeout 1", expected=6)
        assert "`calotype stop --now small` ends it at once" in said
        assert "running" in Shell(folder)("ps")
        machine.stop()
        assert "does not run" in Shell(folder)("stop small", expected=6)
        assert "runs" in Shell(folder)("start small")
        assert "runs" in Shell(folder)("start small", expected=6)
    finally:
        machine.clean_up()


def test_a_vm_that_was_forgotten_keeps_its_images_to_itself(small: Machine) -> None:
    small.take()
    shell = Shell(small.folder)
    assert "runs" in shell("forget small", expected=6)
    small.stop()
    kept = shell("forget small")
    assert "newest content in" in kept
    said = shell(f"run other -- {shlex.join(small.argv())}", expected=6)
    assert "it was of the forgotten VM 'small'; its newest content is in" in said


def test_a_command_line_that_cannot_start_leaves_nothing(folder: Path) -> None:
    machine = Machine(folder)
    machine.make_disks()
    shell = Shell(folder)
    before = sorted(folder.glob("*.qcow2"))
    said = shell(f"run small -- {shlex.join(machine.argv(more=('-device', 'nosuch')))}", expected=7)
    assert "'nosuch' is not a valid device model name" in said
    assert shell("ps -q") == ""
    assert "-snapshot" in shell(f"run small -- {shlex.join(machine.argv())} -snapshot", expected=2)
    assert "No such file" in shell(f"run small -- {machine.argv()[0]} -hda nosuch.raw", expected=9)
    assert "cannot start" in shell("run small -- no-such-qemu -hda zero.qcow2", expected=9)
    assert sorted(folder.glob("*.qcow2")) == before


def test_a_vm_is_defined_anew_on_the_newest_content_of_its_disks(small: Machine) -> None:
    small.take()
    small.stop()
    active = [disk["active"] for disk in small.calotype("show", small.name)["vm"]["disks"]]
    small.define(memory="96")
    again = small.calotype("show", small.name)["vm"]
    assert [disk["active"] for disk in again["disks"]] == active
    assert len(small.calotype("list")["vms"][0]["snapshots"]) == 1

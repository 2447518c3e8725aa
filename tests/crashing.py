"""What the crash tests share: a machine that is written to, the operations, and a cell.

Everything there is (nodes, internal snapshots, backing chains, files with modes and flags,
capabilities, run state, the record, the catalogue, processes) must equal what was before, or what
is after the operation has succeeded; and what is on the disks must be right.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from calotype.qemu import process
from calotype.store.store import Store
from calotype.testing.agent_vm import SOCKET, agent_port
from calotype.testing.machine import Machine, wait
from calotype.testing.whole import is_on, picture
from deleting import DOOMED, NOW, Contents, contents, merge_at_rest, merge_under_a_guest, unknown
from fake_agent import FakeAgent

DISKS = ("zero.qcow2", "one.qcow2", "two.qcow2")
Done = Callable[[str], dict[str, Any]]
OLD, NEW = 0x21, 0x42
"""What is written to the disks before the operation, and after the deed."""


class Subject(Machine):
    """A machine whose disks are written to from outside, as a guest would.

    Attributes:
        agent: The agent in its guest, if it has one: it is played, on the socket that QEMU made.
    """

    agent: FakeAgent | None = None

    def give_agent(self) -> FakeAgent:
        """Start it with a port for an agent, and an agent behind it."""
        self.calotype("run", self.name, "--", *self.argv(more=agent_port(SOCKET)))
        self.agent = FakeAgent(self.folder / SOCKET)
        return self.agent

    def clean_up(self) -> None:
        """End its agent too."""
        super().clean_up()
        if self.agent is not None:
            self.agent.end()

    def write(self, pattern: int, at_mib: int) -> None:
        """Write 64 KiB of *pattern* to each disk, as its guest would."""
        for place in range(len(self.disks)):
            self._io(f"virtio{place}", f"write -P {pattern} {at_mib}M 64k")
            self._io(f"virtio{place}", "flush")

    def reads(self, pattern: int, at_mib: int) -> bool:
        """Whether each disk holds what `write` wrote, in the file that is its newest image."""
        record = Store(self.store).record(self.home.name)
        command = f"read -P {pattern} {at_mib}M 64k"
        for disk in record.disks:
            tool = ("qemu-io", "-r", "-U", "-f", disk.active.format)
            done = subprocess.run(
                [*tool, "-c", command, disk.active.path],
                capture_output=True,
                text=True,
                check=False,
            )
            assert "read 65536/65536" in done.stdout, done
            if "verification failed" in done.stdout:
                return False
        return True

    def _io(self, device: str, command: str) -> None:
        self.qmp("human-monitor-command", command_line=f'qemu-io {device} "{command}"')

    def struck(
        self,
        moment: str,
        deed: str,
        words: Sequence[str],
        *,
        without: str = "",
        descriptors: Sequence[int] = (),
    ) -> "subprocess.Popen[bytes]":
        """Run a command, with something happening at a moment of it; it is not waited for."""
        out = ["--without", without] if without else []
        return subprocess.Popen(
            [sys.executable, "-m", "calotype.testing.crash", moment, deed, *out, *words],
            cwd=self.folder,
            env={**os.environ, "CALOTYPE_STORE": str(self.store)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=descriptors,
        )

    def killed_at(self, moment: str, words: Sequence[str], *, without: str = "") -> None:
        """Run a command and kill it at a moment, which it must have reached."""
        struck = self.struck(moment, "kill-self", words, without=without)
        _, said = struck.communicate(timeout=60)
        assert struck.returncode == -signal.SIGKILL, said


class Operation:
    """One row of the matrix: a command, what it is run on, and its steps."""

    def __init__(
        self, words: tuple[str, ...], prepare: Callable[[Subject], None], *steps: str
    ) -> None:
        self.words = words
        self.prepare = prepare
        self.steps = steps


def _write_old(vm: Subject) -> None:
    vm.write(OLD, 1)


def _write_old_with_agent(vm: Subject) -> None:
    vm.stop()
    vm.give_agent()
    vm.write(OLD, 1)


def _move_on(vm: Subject) -> None:
    """Three disks whose parts lie in every kind of place, and newer content in each; then off."""
    vm.write(OLD, 1)
    inside = ("--disk", "virtio1=internal", "--disk", "virtio2=internal")
    vm.take("--tag", "one", *inside)
    vm.take("--disk", "virtio0=skip", "--disk", "virtio1=skip")
    vm.write(NEW, 1)
    vm.stop()


def _off(vm: Subject) -> None:
    vm.write(OLD, 1)
    vm.stop()


def _branch_on(vm: Subject) -> None:
    vm.write(OLD, 1)
    merge_under_a_guest(vm)
    vm.write(OLD, 2)  # on top: what is written there later must not be hidden by it


def _branch_off(vm: Subject) -> None:
    vm.write(OLD, 1)
    merge_at_rest(vm)


RESTORE = (
    "CreateOverlay", "ApplyInside", "ExtractInside", "StartQemu", "CheckTopology", "LoadState",
)  # fmt: skip
OPERATIONS = {
    "take": Operation(
        ("take", "small", "--disk", "virtio1=internal"), _write_old,
        "MakeSnapshotFolder", "CreateOverlay", "CreateOverlay", "OpenOverlay", "OpenOverlay",
        "RecordAhead", "OpenState", "SetMigration", "FlushImages", "PassInstant", "AwaitSave",
        "PutBackMigration", "CloseState", "FreezeImages", "Commit",
    ),
    "take paused": Operation(
        ("take", "small", "--method", "paused", "--pause-limit", "20000"), _write_old,
        "MakeSnapshotFolder", *["CreateOverlay"] * 3, *["OpenOverlay"] * 3,
        "RecordAhead", "OpenState", "SetMigration", "FlushImages", "PassInstant", "AwaitSave",
        "PutBackMigration", "CloseState", "FreezeImages", "Commit",
    ),
    "take quiesced": Operation(
        ("take", "small", "--machine-state", "none", "--quiesce", "--disk", "virtio1=internal",
         "--disk", "virtio2=skip"),
        _write_old_with_agent,
        "MakeSnapshotFolder", "CreateOverlay", "OpenOverlay", "RecordAhead", "FlushImages",
        "FreezeFileSystems", "PassInstant", "ThawFileSystems", "FreezeImages", "Commit",
    ),
    "restore": Operation(
        ("restore", "small", "--tag", "one"), _move_on,
        *RESTORE, "MakeSnapshotFolder", "FreezeImages", "CommitLeftBehind", "RecordRestored",
        "LetRun",
    ),
    "restore discarding": Operation(
        ("restore", "small", "--tag", "one", "--discard-current"), _move_on,
        *RESTORE, "RecordRestored", "LetRun", "DiscardImages",
    ),
    "start": Operation(
        ("start", "small"), _off,
        "StartQemu", "RecordStarted", "LetRun",
    ),
    "delete on": Operation(
        ("delete", "small", "--tag", DOOMED), _branch_on,
        "DropSnapshot", "RemoveSnapshotFiles", "MergeDown", "Retarget", "RemoveImage",
        "MergeDown", "RecordMerged", "RemoveImage", "DeleteInside", "Retarget",
    ),
    "delete off": Operation(
        ("delete", "small", "--tag", DOOMED), _branch_off,
        "DropSnapshot", "RemoveSnapshotFiles", "RecordMerged", "MergeUp", "RemoveImage",
        "TakePath", "RecordMerged", "RemoveImage", "MergeDown", "RecordMerged", "RemoveImage",
        "Retarget",
    ),
}  # fmt: skip
DELETES = ("delete on", "delete off")
STANDING = ("paused", "finish-migrate", "postmigrate")
WINDOW = ("stop", "migrate", "query-migrate", "transaction", "cont")
SWITCH = (
    "stop:1",
    "query-jobs:1",
    "stop:2",
    "record:1",
    "job-complete:1",
    "query-jobs:2",
    "cont:1",
)
"""What happens while a guest goes over from an overlay to the image below."""


def moments(name: str, *points: str, of: Collection[str] | None = None) -> list[str]:
    """The moments between the steps of an operation, or around those *of* some kinds."""
    places = [
        place for place, step in enumerate(OPERATIONS[name].steps) if of is None or step in of
    ]
    return [f"{point}:{place}" for place in places for point in points]


TALKING = frozenset({
    "OpenOverlay", "OpenState", "SetMigration", "PassInstant", "AwaitSave", "PutBackMigration",
    "CloseState",
})  # fmt: skip
"""The steps of a take that talk to QEMU: others notice nothing of one that does not answer."""


def whole(
    vm: Subject, before: dict[str, Any], after: dict[str, Any], *, may_be_off: bool = False
) -> str:
    """Whether everything is as `before` or as `after`; `between` fails."""
    now = picture(vm)
    if may_be_off and now["run state"] == "off":
        silent = {"run state": "off", "processes": 0, "nodes": []}
        before, after = ({**each, **silent} for each in (before, after))
        before, after = ({key: each[key] for key in now} for each in (before, after))
    if now == after:
        return "after"
    assert now == before, "it is neither as it was before nor as it is after"
    return "before"


def write_on(vm: Subject) -> bool:
    """Let the guest write on, if there is one: what it writes now must not be lost either.

    A guest that is stopped writes nothing: the guard lets it run again. Until then QEMU may have
    given its images up, and would abort at a write (block/io.c: `BDRV_O_INACTIVE`).
    """
    if is_on(vm):
        wait(lambda: vm.qmp("query-status")["status"] not in STANDING, "the guard")
        vm.write(NEW, 2)
        assert vm.reads(NEW, 2), "the record does not name the newest content"
        return True
    return False


def assert_data(vm: Subject, name: str, state: str, *, wrote_on: bool) -> None:
    """What is on the disks is what has to be there."""
    restored = name.startswith("restore") and state == "after"
    moved_on = name.startswith("restore") and state == "before"
    assert vm.reads(NEW if moved_on else OLD, 1)
    if wrote_on and not restored and not moved_on:
        assert vm.reads(NEW, 2)


def held(vm: Subject, name: str) -> Contents:
    """What the snapshots hold, where an operation touches their images."""
    return contents(vm) if name in DELETES else {}


def assert_held(vm: Subject, name: str, before: Contents) -> None:
    """Each snapshot that is left holds what it held, and so does the rest of each disk."""
    after = held(vm, name)
    for who, contents_now in after.items():
        rest = slice(3 << 20, None) if who == NOW else slice(None)
        assert [disk[rest] for disk in contents_now] == [disk[rest] for disk in before[who]], who
    assert not after or unknown(vm) == []


def cell(vm: Subject, done: Done, name: str, moment: str, deed: str) -> str:
    """Play one cell; whether the operation happened."""
    operation = OPERATIONS[name]
    operation.prepare(vm)
    before, after, holding = picture(vm), done(name), held(vm, name)
    struck = vm.struck(moment, deed, operation.words)
    _, said = struck.communicate(timeout=60)
    if deed == "hang-qemu" and (qemu := process.find("CALOTYPE_VM", vm.home.name)):
        os.kill(qemu[0].pid, signal.SIGCONT)
    if deed == "kill-self":
        assert struck.returncode == -signal.SIGKILL, said
    else:
        assert struck.returncode in (0, 6, 7, 8, 9), said
    assert vm.agent is None or vm.agent.is_thawed(), "the guest's file systems stay frozen"
    wrote_on = write_on(vm) if "restore" not in name else False
    vm.calotype("recover", "small")
    state = whole(vm, before, after, may_be_off=deed == "kill-qemu")
    assert_data(vm, name, state, wrote_on=wrote_on)
    assert_held(vm, name, holding)
    assert state == "after" or (struck.returncode != 0 and name not in DELETES)
    return state


def await_running(vm: Subject, patience_s: float) -> float:
    """Wait until the guest runs, asking only QEMU; how long that took."""
    began = time.monotonic()
    while not vm.qmp("query-status")["running"]:
        assert time.monotonic() - began < patience_s, "the guest stands still"
        time.sleep(0.01)
    return time.monotonic() - began


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False

"""The service in front of a real QEMU: its own commands pass through, and ours are beside."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from calotype.qmp import commands
from calotype.testing.machine import Machine, wait
from serving import Qmp, bare_qemu, client_of, is_readable, running, serving
from witnessing import Boot, assert_consistent, assert_sound

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]


@pytest.fixture
def served(folder: Path) -> Iterator[Path]:
    """A QEMU without a machine, served; the socket."""
    with bare_qemu(folder) as monitor, serving(folder, "--upstream", str(monitor)) as path:
        yield path


EXTERNAL = {"type": "external"}
ROOT = Path(__file__).parent.parent.parent

# --- QEMU's own -----------------------------------------------------------------------------------


def test_a_client_is_greeted_as_by_qemu_and_told_whose_service_it_is(served: Path) -> None:
    with Qmp(served) as qmp:
        version = qmp.greeting["QMP"]["version"]
        assert "oob" in qmp.greeting["QMP"]["capabilities"]
        assert "via calotype" in version["package"]
        assert qmp.ask("query-version") == version


def test_the_socket_is_its_owners_alone_and_goes_with_the_service(folder: Path) -> None:
    with bare_qemu(folder) as monitor:
        with serving(folder, "--upstream", str(monitor)) as path:
            assert path.stat().st_mode & 0o777 == 0o600
        assert not path.exists()


def test_clients_have_ids_of_their_own(served: Path) -> None:
    with Qmp(served) as one, Qmp(served) as two:
        one.send("query-name")
        two.send("query-kvm")
        assert one.answer()["id"] == "query-name"
        assert two.answer()["id"] == "query-kvm"


def test_answers_come_in_the_order_of_the_commands(served: Path) -> None:
    with Qmp(served) as qmp:
        for index in range(100):
            qmp.socket.sendall(b'{"execute": "query-name", "id": %d}' % index)
        assert [qmp.answer()["id"] for _ in range(100)] == list(range(100))


def test_events_reach_every_client_that_has_negotiated(served: Path) -> None:
    with Qmp(served) as one, Qmp(served) as two, socket.socket(socket.AF_UNIX) as deaf:
        deaf.connect(str(served))
        assert is_readable(deaf, 10)
        deaf.recv(1 << 16)
        one.send("system_powerdown")
        one.answer()
        for qmp in (one, two):
            qmp.await_event("POWERDOWN")
        assert not is_readable(deaf, 0.2)


def test_a_descriptor_reaches_qemu_and_no_other_client(served: Path) -> None:
    with Qmp(served) as one, Qmp(served) as two, Path(os.devnull).open() as file:
        one.ask("getfd", file.fileno(), fdname="given")
        assert "No file descriptor" in two.refusal("getfd", fdname="none")
        refused = one.tell("getfd", file.fileno())  # refused before QEMU takes it
        assert "error" in refused
        assert "No file descriptor" in two.refusal("getfd", fdname="stale")
        two.ask("closefd", fdname="given")
        added = one.ask("add-fd", file.fileno(), fdset_id=3)
        assert added["fdset-id"] == 3


def test_what_we_add_is_in_the_lists_of_commands(served: Path) -> None:
    with Qmp(served) as qmp:
        named = {each["name"] for each in qmp.ask("query-commands")}
        assert commands.COMMANDS.keys() <= named
        schema = {each["name"] for each in qmp.ask("query-qmp-schema")}
        assert commands.COMMANDS.keys() <= schema


def test_without_a_vm_our_commands_say_how_to_have_one(served: Path) -> None:
    with Qmp(served) as qmp:
        assert "calotype serve NAME" in qmp.refusal("query-system-snapshots")


def test_qmp_client_of_qemu_qmp_speaks_to_it(served: Path) -> None:
    async def talk() -> Any:
        client = QMPClient("test")
        await client.connect(str(served))
        try:
            return await client.execute("query-status")
        finally:
            await client.disconnect()

    assert asyncio.run(talk())["status"] == "prelaunch"


def test_qmp_shell_speaks_to_it(served: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "qmp-shell", served],
        input="query-status\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert '"status": "prelaunch"' in done.stdout, done


def test_descriptors_that_come_at_once_reach_the_commands_that_they_came_with(
    served: Path, tmp_path: Path
) -> None:
    with Qmp(served) as qmp:
        for number in range(6):
            path = tmp_path / f"file{number}"
            path.touch()
            with path.open() as file:
                qmp.send("add-fd", file.fileno(), fdset_id=number, opaque=str(number))
        added = [qmp.answer()["return"] for _ in range(6)]
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(served.parent / "monitor.sock"))
            pid = int.from_bytes(probe.getsockopt(1, socket.SO_PEERCRED, 12)[:4], "little")
        links = [Path(f"/proc/{pid}/fd/{each['fd']}").readlink().name for each in added]
        assert links == [f"file{number}" for number in range(6)]


# --- clients that misbehave -----------------------------------------------------------------------


def test_one_that_sends_nonsense_hurts_nobody_else(served: Path) -> None:
    with Qmp(served) as qmp, socket.socket(socket.AF_UNIX) as hostile:
        hostile.connect(str(served))
        hostile.sendall(b"[" * 100_000)
        with contextlib.suppress(BlockingIOError):
            hostile.setblocking(False)
            for _ in range(1000):
                hostile.send(b"x" * 4096)
        assert qmp.ask("query-status")["status"] == "prelaunch"


def test_a_command_without_measure_is_refused_and_nobody_else_waits(served: Path) -> None:
    with Qmp(served) as qmp, Qmp(served) as hostile:
        huge = b'{"execute": "query-name", "arguments": {"a": "' + b"e" * (2 << 20) + b'"}}'
        hostile.socket.sendall(huge)
        assert "size limit exceeded" in hostile.answer()["error"]["desc"]
        assert qmp.ask("query-status")["status"] == "prelaunch"


def test_those_that_hang_up_at_once_leave_nothing(folder: Path) -> None:
    with bare_qemu(folder) as monitor, serving(folder, "--upstream", str(monitor)) as path:
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as hasty:
                hasty.connect(str(path))
        with Qmp(path) as qmp:
            qmp.ask("query-status")


def test_one_that_never_reads_is_cut_off(served: Path) -> None:
    """It asks for the longest answer that there is, again and again."""
    with Qmp(served) as qmp, socket.socket(socket.AF_UNIX) as deaf:
        deaf.connect(str(served))
        deaf.sendall(b'{"execute": "qmp_capabilities"}')
        deaf.settimeout(20)
        is_cut_off = False
        for _ in range(1000):
            try:
                deaf.sendall(b'{"execute": "query-qmp-schema"}')
            except ConnectionError:
                is_cut_off = True
                break
            assert qmp.ask("query-status")["status"] == "prelaunch"
        assert is_cut_off


def test_a_client_that_disappears_in_mid_word_is_forgotten(served: Path) -> None:
    with Qmp(served) as qmp:
        for _ in range(20):
            with Qmp(served) as other:
                other.socket.sendall(b'{"execute": "query-qmp-schema"} {"execute": "que')
        assert qmp.ask("query-status")["status"] == "prelaunch"


def test_a_client_that_has_said_all_is_answered_before_it_is_hung_up_on(served: Path) -> None:
    """As `printf ... | socat - UNIX:...` does."""
    with Qmp(served) as qmp:
        for index in range(20):
            qmp.socket.sendall(b'{"execute": "query-qmp-schema", "id": %d}' % index)
        qmp.socket.shutdown(socket.SHUT_WR)
        assert [qmp.answer()["id"] for _ in range(20)] == list(range(20))
        with pytest.raises(EOFError):
            qmp.answer()


# --- the end --------------------------------------------------------------------------------------


def test_clients_are_told_when_qemu_ends_and_the_service_ends_with_it(folder: Path) -> None:
    with bare_qemu(folder) as monitor, serving(folder, "--upstream", str(monitor)) as path:
        with Qmp(path) as qmp, Qmp(path) as other:
            qmp.send("quit")
            assert other.await_event("SHUTDOWN")["reason"] == "host-qmp-quit"
            with pytest.raises(EOFError):
                other.await_event("never")
        wait(lambda: not path.exists(), "the end of the service")


def test_a_qemu_that_is_killed_is_told_of_too(folder: Path) -> None:
    with bare_qemu(folder) as monitor, serving(folder, "--upstream", str(monitor)) as path:
        with Qmp(path) as qmp:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(monitor))
                pid = int.from_bytes(probe.getsockopt(1, socket.SO_PEERCRED, 12)[:4], "little")
            os.kill(pid, signal.SIGKILL)
            assert qmp.await_event("SHUTDOWN") == {"guest": False, "reason": "host-error"}
        wait(lambda: not path.exists(), "the end of the service")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--qmp", "q"], "which QEMU?"),
        (["vm", "--upstream", "m", "--qmp", "q"], "which QEMU?"),
        (["--upstream", "nowhere", "--qmp", "q"], "no QEMU answers on"),
        (["--upstream", "m", "--qmp", "taken"], "is there, and is no socket"),
        (["--upstream", "m", "--qmp", "tcp:0.0.0.0:4444"], "is not on loopback"),
        (["--upstream", "m", "--qmp", "tcp:here"], "is no address"),
        (["nobody", "--qmp", "q"], "there is no VM"),
        (["--upstream", "m", "--qmp", ""], "names no socket"),
        (["--upstream", "m", "--qmp", "n" * 108], "path too long"),
    ],
)
def test_what_cannot_be_served_is_refused(folder: Path, words: list[str], said: str) -> None:
    (folder / "taken").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-m", "calotype", "serve", *words, "--store", "store"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert said in done.stderr
    assert (folder / "taken").read_text() == "mine"
    assert not (folder / "q").exists()


def test_with_json_one_object_says_where_it_listens(folder: Path) -> None:
    with bare_qemu(folder) as monitor:
        command = [sys.executable, "-m", "calotype", "serve", "--upstream", str(monitor), "--json"]
        with subprocess.Popen(
            [*command, "--qmp", "q"], stdout=subprocess.PIPE, text=True, cwd=folder
        ) as service:
            assert service.stdout is not None
            told = json.loads(service.stdout.readline())
            service.terminate()
            assert service.wait(60) == 0, "it can be interrupted still"
    assert told == {"schema": 1, "listening": str(folder / "q")}


def test_it_listens_on_loopback_when_asked_to(folder: Path) -> None:
    with bare_qemu(folder) as monitor:
        command = [sys.executable, "-m", "calotype", "serve", "--upstream", str(monitor)]
        listening = [*command, "--qmp", "tcp:127.0.0.1:0"]
        with subprocess.Popen(listening, stdout=subprocess.PIPE, text=True) as service:
            assert service.stdout is not None
            port = int(service.stdout.readline().rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port), 10) as connection:
                assert b'{"QMP"' in connection.recv(1 << 16)
            service.terminate()


# --- ours -----------------------------------------------------------------------------------------


@pytest.fixture
def machine(folder: Path) -> Iterator[Machine]:
    """A small machine that runs."""
    with running(Machine(folder)) as vm:
        yield vm


@pytest.fixture
def qmp(machine: Machine) -> Iterator[Qmp]:
    """A client of its service."""
    with client_of(machine) as client:
        yield client


def test_a_job_saves_another_loads_and_a_third_deletes(machine: Machine, qmp: Qmp) -> None:
    external = {"type": "external"}
    before = machine.pid()
    saved = qmp.run_job("system-snapshot-save", tag="one", machine_state=external)
    assert "error" not in saved
    assert saved["current-progress"] == saved["total-progress"]
    told = qmp.await_event("SYSTEM_SNAPSHOT_SAVED")
    (snapshot,) = qmp.ask("query-system-snapshots")
    assert (snapshot["id"], snapshot["tag"]) == (told["id"], "one")
    assert told["pause-ms"] > 0

    assert "error" not in qmp.run_job("system-snapshot-load", tag="one")
    assert qmp.await_event("SYSTEM_SNAPSHOT_LOADED")["id"] == told["id"]
    assert machine.pid() != before, "another QEMU"
    assert qmp.ask("query-status")["status"] == "running"

    whole = [each["id"] for each in qmp.ask("query-system-snapshots")]
    assert "error" not in qmp.run_job("system-snapshot-delete", id=told["id"])
    assert qmp.await_event("SYSTEM_SNAPSHOT_DELETED")["id"] == told["id"]
    left = {each["id"] for each in qmp.ask("query-system-snapshots")}
    assert left == set(whole) - {told["id"]}


def test_a_tag_that_is_taken_is_refused(qmp: Qmp) -> None:
    none = {"type": "none"}
    told = qmp.run_job("system-snapshot-save", tag="2", machine_state=none)
    assert "error" not in told
    (snapshot,) = qmp.ask("query-system-snapshots")
    said = qmp.refusal("system-snapshot-save", job_id="j", tag="2", machine_state=none)
    assert f"the snapshot {snapshot['id']} has the tag '2'" in said


def test_a_transaction_without_our_actions_is_qemus(qmp: Qmp) -> None:
    node = next(each["node-name"] for each in qmp.ask("query-named-block-nodes"))
    bitmap = {"node": node, "name": "b"}
    qmp.ask("transaction", actions=[{"type": "block-dirty-bitmap-add", "data": bitmap}])
    qmp.ask("block-dirty-bitmap-remove", **bitmap)
    assert qmp.refusal("transaction", actions=1) == (
        "Invalid parameter type for 'actions', expected: array"
    )


def test_the_line_of_the_readme_is_typed_into_qmp_shell(machine: Machine) -> None:
    line = 'system-snapshot-save job-id=save tag=night machine-state={"type":"external"}'
    assert f"(QEMU) {line}\n" in (ROOT / "README.md").read_text()
    with serving(machine.folder, machine.name, store=machine.store) as path:
        done = subprocess.run(
            [Path(sys.executable).parent / "qmp-shell", path],
            input=f"{line}\n",
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        with Qmp(path) as qmp:
            qmp.await_job("save")
            assert [each["tag"] for each in qmp.ask("query-system-snapshots")] == ["night"]
    assert '"return": {}' in done.stdout


def test_a_plan_is_no_job_and_changes_nothing(machine: Machine, qmp: Qmp) -> None:
    before = machine.picture()
    plan = qmp.ask("system-snapshot-plan", machine_state={"type": "none"})
    assert plan["method"] == "storage-only"
    assert {disk["kind"] for disk in plan["disks"]} == {"external"}
    assert plan["blockers"] == []
    assert machine.picture() == before
    assert qmp.ask("query-jobs") == []


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("system-snapshot-save", {}, "Parameter 'machine-state' is missing"),
        ("system-snapshot-save", {"tag": 1}, "Invalid parameter type for 'tag', expected: string"),
        ("system-snapshot-load", {"tag": "no"}, "has no snapshot with the tag 'no'"),
        ("system-snapshot-load", {}, "Need exactly one of 'tag' and 'id'"),
        ("system-snapshot-load", {"id": "ab"}, "is no whole id"),
        ("system-snapshot-delete", {"tag": "x", "id": "y"}, "Need exactly one of"),
        *(
            ("system-snapshot-save", {"machine_state": EXTERNAL} | given, said)
            for given, said in (
                ({"machine_state": {"type": "internal", "node-name": "n"}}, "is not served yet"),
                ({"machine_state": {"type": "image", "filename": "f"}}, "is not served yet"),
                ({"on_conflict": "replace"}, "is not served yet"),
                ({"pause_limit_ms": 0}, "at least 1"),
                ({"tag": "a\nb"}, "control characters"),
                ({"storage": [{"node-name": "n", "kind": "skip"}] * 2}, "names 'n' twice"),
            )
        ),
    ],
)
def test_what_cannot_be_done_is_refused_and_is_no_job(
    machine: Machine, qmp: Qmp, command: str, arguments: dict[str, Any], said: str
) -> None:
    before = machine.picture()
    given = {"job_id": "job"} | arguments
    assert said in qmp.refusal(command, **given)
    assert qmp.ask("query-jobs") == []
    assert machine.picture() == before


def test_a_plan_is_told_what_a_save_would_be_told_of_its_words(qmp: Qmp) -> None:
    none = {"type": "none"}
    assert "control characters" in qmp.refusal(
        "system-snapshot-plan", tag="a\nb", machine_state=none
    )


def test_a_fault_of_ours_is_told_and_nobody_waits_for_ever(machine: Machine, qmp: Qmp) -> None:
    """A store that went away under the service is as good as a fault."""
    aside = machine.store.rename(machine.folder / "aside")
    try:
        assert qmp.refusal("query-system-snapshots")
        assert qmp.ask("query-status")["running"] is True
    finally:
        aside.rename(machine.store)


def test_what_is_in_the_way_is_the_commands_own_error(qmp: Qmp) -> None:
    said = qmp.refusal(
        "system-snapshot-save",
        job_id="job",
        machine_state={"type": "none"},
        storage=[{"node-name": "no such disk", "kind": "internal"}],
    )
    assert "there is no writable disk 'no such disk'" in said
    assert qmp.ask("query-jobs") == []


def test_a_job_has_a_name_that_no_other_has(qmp: Qmp) -> None:
    none = {"type": "none"}
    qmp.ask("system-snapshot-save", job_id="job", machine_state=none)
    assert qmp.refusal("system-snapshot-save", job_id="job", machine_state=none) == (
        "Job ID 'job' already in use"
    )
    qmp.await_event("JOB_STATUS_CHANGE", id="job", status="concluded")
    assert qmp.refusal("job-cancel", id="job") == (
        "Job 'job' in state 'concluded' cannot accept command verb 'cancel'"
    )
    qmp.ask("job-dismiss", id="job")
    assert qmp.ask("query-jobs") == []
    assert "not found" in qmp.refusal("job-dismiss", id="job").lower()


def test_a_name_of_a_job_is_not_given_twice_by_qemu_either(machine: Machine, qmp: Qmp) -> None:
    file = str(machine.folder / "made.raw")
    Path(file).touch()
    qmp.ask("blockdev-add", driver="file", node_name="made", filename=file)
    options = {"driver": "raw", "file": "made", "size": 1 << 20}
    create = {"driver": "file", "filename": file, "size": 1 << 20}
    qmp.ask("blockdev-create", job_id="theirs", options=create)
    none = {"type": "none"}
    said = qmp.refusal("system-snapshot-save", job_id="theirs", machine_state=none)
    assert said == "Job ID 'theirs' already in use"
    qmp.ask("blockdev-del", node_name="made")
    qmp.await_event("JOB_STATUS_CHANGE", id="theirs", status="concluded")
    qmp.ask("system-snapshot-save", job_id="ours", machine_state=none)
    said = qmp.refusal("blockdev-create", job_id="ours", options=options)
    assert said == "Job ID 'ours' already in use"


def test_our_commands_are_not_out_of_band(machine: Machine) -> None:
    with (
        serving(machine.folder, machine.name, store=machine.store) as path,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        connection.connect(str(path))
        lines = connection.makefile("rb")
        lines.readline()
        connection.sendall(
            b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}'
            b'{"exec-oob": "query-system-snapshots"} {"exec-oob": "migrate-pause", "id": 2}'
        )
        connection.shutdown(socket.SHUT_WR)
        answers = lines.read()
    assert b"The command query-system-snapshots does not support OOB" in answers
    assert b'"id": 2' in answers


def test_a_delete_cannot_be_cancelled_for_nothing_of_it_can_be_undone(qmp: Qmp) -> None:
    qmp.run_job("system-snapshot-save", tag="one", machine_state={"type": "none"})
    qmp.ask("system-snapshot-delete", job_id="going", tag="one")
    assert "cannot accept command verb 'cancel'" in qmp.refusal("job-cancel", id="going")
    assert qmp.await_event("SYSTEM_SNAPSHOT_DELETED")["tag"] == "one"


def test_the_last_that_is_told_of_a_guest_that_was_loaded_is_that_it_runs(qmp: Qmp) -> None:
    qmp.run_job("system-snapshot-save", tag="one", machine_state=EXTERNAL)
    qmp.events.clear()
    qmp.run_job("system-snapshot-load", tag="one")
    qmp.await_event("SYSTEM_SNAPSHOT_LOADED")
    while not any(event["event"] == "RESUME" for event in qmp.events):
        qmp.events.append(qmp.read())
    told = [each["event"] for each in qmp.events if each["event"] in ("STOP", "RESUME")]
    assert told[-1] == "RESUME"


def test_the_command_line_works_while_it_is_served(machine: Machine, qmp: Qmp) -> None:
    snapshot = machine.take("--tag", "by hand")
    assert [each["id"] for each in qmp.ask("query-system-snapshots", tag="by hand")] == [snapshot]
    machine.calotype("restore", machine.name, "--id", snapshot)
    assert qmp.ask("query-status")["status"] == "running"
    machine.calotype("delete", machine.name, "--id", snapshot)
    machine.stop()
    with pytest.raises(EOFError):
        qmp.await_event("never")


# --- with a guest that would notice ---------------------------------------------------------------


def test_a_witness_that_was_saved_and_loaded_is_consistent(boot: Boot) -> None:
    vm = boot()
    with client_of(vm) as qmp:
        external = {"type": "external"}
        qmp.ask("system-snapshot-save", job_id="save", tag="one", machine_state=external)
        progress = set()
        while (job := qmp.ask("query-jobs")[0])["status"] == "running":
            began = time.monotonic()
            progress.add(job["current-progress"])
            assert qmp.ask("query-block")
            assert time.monotonic() - began < 10, "others wait while a save runs"
        assert job["status"] == "concluded", job
        assert len(progress) > 2, "progress that moves"
        qmp.ask("job-dismiss", id="save")
        vm.await_rounds(20, vm.console_size())
        mark = vm.console_size()
        assert "error" not in qmp.run_job("system-snapshot-load", tag="one")
        assert_consistent(vm.testimony(mark))
        assert_sound(vm)


def test_a_save_that_is_cancelled_leaves_nothing(boot: Boot) -> None:
    vm = boot()
    with client_of(vm) as qmp:
        before = vm.picture()
        nodes = sorted(each["file"] for each in qmp.ask("query-named-block-nodes", flat=True))
        qmp.ask("system-snapshot-save", job_id="job", tag="one", machine_state={"type": "external"})
        qmp.ask("job-cancel", id="job")
        failed = qmp.await_event("SYSTEM_SNAPSHOT_FAILED", **{"job-id": "job"})
        assert failed["undone"] is True
        (job,) = qmp.ask("query-jobs")
        assert (job["status"], job["error"]) == ("concluded", "Operation canceled")
        assert (
            sorted(each["file"] for each in qmp.ask("query-named-block-nodes", flat=True)) == nodes
        )
        assert vm.picture() == before
        assert_sound(vm)


def test_a_service_that_is_ended_in_the_midst_of_a_load_leaves_the_vm_as_it_was(boot: Boot) -> None:
    vm = boot()
    vm.calotype("take", vm.name, "--tag", "one")
    pid, before = vm.pid(), vm.picture()
    with client_of(vm) as qmp:
        qmp.ask("system-snapshot-load", job_id="job", tag="one")
    assert vm.pid() == pid
    assert vm.picture() == before
    assert_sound(vm)

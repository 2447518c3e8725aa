"""The check-up of VMs that run: silence where all is well, and each trouble by name; no waiting."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_details import held_at

from calotype.qemu import host
from calotype.testing.machine import CommandFailed
from calotype.testing.whole import picture
from crashing import Subject

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

OF_THE_HOST = {"kvm", "write-tracking", "qemu-missing", "qemu-mute", "qemu-old", "store-in-memory"}


def findings(vm: Subject) -> list[dict[str, Any]]:
    """What `doctor` finds of store and VMs; the exit code says whether there are faults."""
    try:
        told = vm.calotype("doctor")
        code = 0
    except CommandFailed as error:
        told, code = error.data["told"], error.data["exit_code"]
    assert code == (0 if told["is_well"] else 11)
    assert told["is_well"] == all(each["severity"] != "fault" for each in told["findings"])
    return [each for each in told["findings"] if each["check"] not in OF_THE_HOST]


def checks(vm: Subject) -> list[str]:
    return [each["check"] for each in findings(vm)]


def written(folder: Path) -> dict[str, int]:
    """When each file of the store was changed last, but for what the guest says."""
    paths = (path for path in folder.rglob("*") if path.name != "console.log")
    return {str(path): path.lstat().st_ctime_ns for path in paths}


def test_a_vm_that_is_well_gives_no_finding_and_is_left_alone(subject: Subject) -> None:
    subject.take("--disk", "virtio1=internal")
    subject.take()
    before, files = picture(subject), written(subject.store)
    assert findings(subject) == []
    assert written(subject.store) == files
    assert picture(subject) == before
    subject.stop()
    assert findings(subject) == []
    subject.calotype("restore", "small", "--latest")
    assert findings(subject) == []


def test_what_is_in_the_way_of_a_snapshot_is_told_with_its_remedy(subject: Subject) -> None:
    subject.qmp("block-dirty-bitmap-add", node="virtio0", name="mine")
    (finding,) = findings(subject)
    assert (finding["check"], finding["about"]) == ("blocked", "vm 'small'")
    assert "dirty bitmap 'mine'" in finding["problem"]
    assert "block-dirty-bitmap-remove" in finding["remedy"]
    subject.qmp("block-dirty-bitmap-remove", node="virtio0", name="mine")
    assert findings(subject) == []


def test_a_qemu_that_hangs_is_told_and_not_waited_for(subject: Subject) -> None:
    pid = subject.pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        (finding,) = findings(subject)
        spent_s = time.monotonic() - began
    finally:
        os.kill(pid, signal.SIGCONT)
    assert finding["check"] == "vm-mute"
    assert "stop --now" in finding["remedy"]
    assert spent_s < 60, "it waited for an answer"


def test_a_frozen_image_that_something_else_writes_to(subject: Subject) -> None:
    image = subject.folder / "zero.qcow2"
    code = "import sys; file = open(sys.argv[1], 'r+b'); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, image],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout
        other.stdout.readline()
        assert checks(subject) == ["in-use"]
        subject.take("--machine-state", "none")
        (finding,) = findings(subject)
        other.communicate("\n")
    assert finding["check"] == "frozen-open"
    assert str(image) in finding["problem"]
    assert f"process {other.pid} (" in finding["problem"]
    assert findings(subject) == []


def test_what_was_cut_off_is_told_until_it_is_recovered(subject: Subject) -> None:
    subject.killed_at("done:12", ("take", "small"))
    (finding,) = findings(subject)
    assert finding["check"] == "cut-off"
    assert "calotype recover small" in finding["remedy"]
    subject.calotype("recover", "small")
    assert findings(subject) == []


def test_an_operation_that_is_under_way_is_no_fault(subject: Subject) -> None:
    struck, line = held_at(subject, "doing:11", "take", "small")
    assert findings(subject) == []
    assert subject.calotype("doctor")["vms"][0]["is_changing"]
    with line:
        line.sendall(b"!")
        _, said = struck.communicate(timeout=60)
    assert struck.returncode == 0, said
    assert findings(subject) == []


def test_a_store_that_is_full(subject: Subject) -> None:
    small = subject.folder / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(CommandFailed) as told:
            subject.calotype("doctor", "--store", str(small))
        found = {each["check"] for each in told.value.data["told"]["findings"]}
        assert {"store-full", "store-in-memory"} <= found
    finally:
        subprocess.run(["umount", small], check=True)


# --- QEMUs ---------------------------------------------------------------------------------------


def test_a_qemu_says_what_it_can_do() -> None:
    seen = asyncio.run(host.ask(host.program_of("qemu-system-x86_64", "/")))
    assert seen.version is not None
    assert seen.version >= (10, 0, 0)
    assert {"background-snapshot", "mapped-ram", "blockdev-set-active"} <= set(seen.abilities)


OLD = """#!{python}
import json, sys
for line in sys.stdin:
    asked = json.loads(line).get("id")
    told = {{"query-version": {{"qemu": {{"major": 5, "minor": 2, "micro": 0}}}},
            "query-migrate-capabilities": [{{"capability": "xbzrle"}}],
            "query-qmp-schema": [{{"meta-type": "command", "name": "quit"}}]}}.get(asked, {{}})
    print(json.dumps({{"return": told, "id": asked}}), flush=True)
"""


@pytest.mark.parametrize(
    ("script", "check"),
    [
        (OLD, "qemu-old"),
        ("#!/bin/sh\necho 'no such machine' >&2\nexit 1\n", "qemu-mute"),
        ("#!/nowhere\n", "qemu-mute"),
        ("#!/bin/sh\nexec sleep 600\n", "qemu-mute"),
    ],
)
def test_a_qemu_that_is_too_old_or_none(
    folder: Path, script: str, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = folder / "qemu-system-test"
    program.write_text(script.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(host, "PATIENCE_S", 1.0 if "sleep" in script else 30.0)
    seen = asyncio.run(host.ask(str(program)))
    if check == "qemu-old":
        assert (seen.version, seen.abilities) == ((5, 2, 0), ())
    else:
        assert seen.version is None
        assert seen.fault

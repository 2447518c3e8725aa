"""Each example of the QMP reference is played: what it sends is sent, what it shows comes back.

The VM is the one that the examples are about, `demo` with two disks. Figures, times and paths are
its own; everything else must be as the page has it: members, types, words of errors.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calotype.qmp.commands import COMMANDS, EVENTS
from calotype.qmp.examples import DISKS, FIRST_ID, FIRST_TAG, examples
from calotype.qmp.schema import Example
from calotype.testing.machine import Machine
from serving import Qmp, client_of, running

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]

PLAYED = [each for each in examples() if each.of in COMMANDS]
_OTHERS_OWN = {"id", "instant", "reason", "method-reason", "warnings"}
"""Members of answers whose words are of this VM and this moment."""


class Demo(Machine):
    """The VM of the examples."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, disks=tuple(f"{disk}.qcow2" for disk in DISKS), name="demo")

    def argv(self, **_: Any) -> list[str]:
        drives = [
            word
            for disk in DISKS
            for word in (
                *("-drive", f"file={disk}.qcow2,format=qcow2,if=none,id={disk}"),
                *("-device", f"virtio-blk-pci,drive={disk}"),
            )
        ]
        return super().argv(disks=(), more=drives)


@pytest.fixture
def demo(folder: Path) -> Iterator[Demo]:
    with running(Demo(folder)) as vm:
        yield vm


@pytest.mark.parametrize("example", PLAYED, ids=lambda each: each.of)
def test_what_the_page_shows_is_what_happens(demo: Demo, example: Example) -> None:
    first = demo.take("--tag", FIRST_TAG)
    with client_of(demo) as qmp:
        job = ""
        for way, message in example.lines:
            line = json.loads(json.dumps(message).replace(FIRST_ID, first))
            if way == "->":
                qmp.socket.sendall(json.dumps(line).encode())
                job = line.get("arguments", {}).get("job-id", "")
            elif "error" in line:
                assert qmp.answer() == line
                job = ""
            else:
                assert_alike(qmp.answer(), line)
        if job:
            done = qmp.await_event("JOB_STATUS_CHANGE", id=job, status="concluded")
            assert done
            (told,) = qmp.ask("query-jobs")
            assert "error" not in told
            assert_event(qmp, example.of, job)


def assert_event(qmp: Qmp, command: str, job: str) -> None:
    """The job's own event has come, with the members that its example has, or fewer."""
    word = {"save": "SAVED", "load": "LOADED", "delete": "DELETED"}[command.rpartition("-")[2]]
    data = qmp.await_event(f"SYSTEM_SNAPSHOT_{word}", **{"job-id": job})
    (shown,) = (
        message["data"]
        for each in examples()
        if each.of == f"SYSTEM_SNAPSHOT_{word}"
        for _, message in each.lines
    )
    assert f"SYSTEM_SNAPSHOT_{word}" in EVENTS
    assert data.keys() <= shown.keys() | {"pause-ms"}
    assert_alike({name: shown[name] for name in data if name in shown}, data, names=False)


def assert_alike(found: Any, shown: Any, *, names: bool = True) -> None:
    """Members and types are the same; so are words, but for those that are of a moment."""
    assert type(found) is type(shown) or {type(found), type(shown)} <= {int, float}, (found, shown)
    if isinstance(shown, dict):
        assert found.keys() == shown.keys(), (found, shown)
        for name, value in shown.items():
            if name not in _OTHERS_OWN:
                assert_alike(found[name], value, names=names)
    elif isinstance(shown, list):
        assert len(found) == len(shown), (found, shown)
        for one, other in zip(found, shown, strict=True):
            assert_alike(one, other, names=names)
    elif isinstance(shown, str) and names and not shown.startswith("/"):
        assert found == shown

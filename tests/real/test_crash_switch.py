"""A guest that goes over from an overlay to the image below runs again, and loses no write.

The pause of a merge, in a delete and in the undo of a take: whatever dies at whatever moment of it,
the guest runs again though nobody runs a command, the record names the image that it writes to from
then on, and `recover` ends what was cut off. While the guest writes on, QEMU's jobs are held: a
merge that nobody has completed would carry a write over to the wrong image, a moment later.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from calotype.errors import CalotypeError
from calotype.model.names import merge_job
from calotype.store.store import Store
from calotype.testing.machine import CommandFailed, wait
from calotype.testing.whole import picture
from crashing import (
    NEW,
    OLD,
    OPERATIONS,
    SWITCH,
    Done,
    Subject,
    assert_data,
    assert_held,
    await_running,
    held,
    is_stopped,
    whole,
)

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

LIMIT_S = 10.0
"""The guard's own limit, as the crash tests shorten it, and time for a busy host."""

STAYS = {"delete on": "after", "take": "before"}
"""What a merge with a switch belongs to -> how it ends: a delete is finished, a take is undone."""


def begin(vm: Subject, name: str) -> tuple[str, ...]:
    """Come as far as the command that is to be struck; its words."""
    operation = OPERATIONS[name]
    if name != "take":
        return operation.words
    vm.killed_at("done:9", operation.words)
    vm.write(OLD, 2)  # on top: what is written there later must not be hidden by it
    return ("recover", "small")


@contextlib.contextmanager
def held_jobs(vm: Subject) -> Iterator[None]:
    """While this lasts, no merge that is under way goes on."""
    jobs = [job["id"] for job in vm.qmp("query-jobs") if job["status"] in ("running", "ready")]
    for job in jobs:
        vm.qmp("job-pause", id=job)
    yield
    for job in jobs:
        vm.qmp("job-resume", id=job)


def writes_on(vm: Subject) -> bool:
    """Whether what the guest writes now is in the image that the record names."""
    with held_jobs(vm):
        vm.write(NEW, 2)
        return vm.reads(NEW, 2) and vm.reads(OLD, 1)


@pytest.mark.parametrize("deed", ["kill-self", "stop-self"])
@pytest.mark.parametrize("moment", SWITCH)
@pytest.mark.parametrize("name", STAYS)
def test_the_guest_runs_again_though_nobody_runs_a_command(
    subject: Subject, done: Done, name: str, moment: str, deed: str
) -> None:
    OPERATIONS[name].prepare(subject)
    before, holding = picture(subject), held(subject, name)
    struck = subject.struck(f"switch:{moment}", deed, begin(subject, name))
    wait(lambda: struck.poll() is not None or is_stopped(struck.pid), "the deed")
    assert struck.returncode in (None, -signal.SIGKILL), "the moment never came"
    await_running(subject, LIMIT_S)
    time.sleep(0.3)
    assert subject.qmp("query-status")["running"], "it was stopped again"
    assert writes_on(subject), "the record does not name the newest content"
    if deed == "stop-self":
        os.kill(struck.pid, signal.SIGCONT)
    _, said = struck.communicate(timeout=60)
    is_gone_over = moment not in ("stop:1", "query-jobs:1", "stop:2")
    comes_back = (0,) if is_gone_over else (0, 6, 7)
    assert struck.returncode in ((-signal.SIGKILL,) if deed == "kill-self" else comes_back), said
    assert subject.qmp("query-status")["running"], "it was stopped by who came back"
    subject.calotype("recover", "small")
    assert whole(subject, before, done(name)) == STAYS[name]
    assert_data(subject, name, STAYS[name], wrote_on=True)
    assert_held(subject, name, holding)


@pytest.mark.parametrize("deed", ["kill-qemu", "kill-guard"])
@pytest.mark.parametrize("moment", SWITCH)
@pytest.mark.parametrize("name", STAYS)
def test_what_the_guest_wrote_is_there_whatever_else_dies(
    subject: Subject, done: Done, name: str, moment: str, deed: str
) -> None:
    OPERATIONS[name].prepare(subject)
    before, holding = picture(subject), held(subject, name)
    words = begin(subject, name)
    subject.write(NEW, 2)
    struck = subject.struck(f"switch:{moment}", deed, words)
    _, said = struck.communicate(timeout=60)
    assert struck.returncode in ((0,) if deed == "kill-guard" else (0, 6, 7)), said
    assert subject.reads(NEW, 2), "the record does not name the newest content"
    assert subject.reads(OLD, 1)
    subject.calotype("recover", "small")
    is_killed = deed == "kill-qemu"
    assert whole(subject, before, done(name), may_be_off=is_killed) == STAYS[name]
    assert_data(subject, name, STAYS[name], wrote_on=True)
    assert_held(subject, name, holding)


def test_a_merge_that_fails_when_all_was_recorded_leaves_the_record_with_the_guest(
    subject: Subject, done: Done
) -> None:
    OPERATIONS["take"].prepare(subject)
    before = picture(subject)
    begin(subject, "take")
    subject.write(NEW, 2)
    store = Store(subject.store)
    record = store.record(subject.home.name)
    overlaid = [disk for disk in record.disks if disk.active != disk.origin]
    assert overlaid
    for disk in overlaid:  # as its owner has recorded it, who died before QEMU had failed
        snapshot = disk.active.path.split(".")[-2]
        target = {"driver": "file", "filename": "/nosuch/folder/image", "size": 512}
        subject.qmp("blockdev-create", job_id=merge_job(snapshot, disk.index), options=target)
    disks = tuple(replace(disk, active=disk.origin) for disk in record.disks)
    store.save(replace(record, disks=disks))
    assert not subject.reads(NEW, 2)
    with pytest.raises(CommandFailed, match="QEMU cannot merge"):
        subject.calotype("recover", "small")
    subject.write(NEW, 3)
    assert subject.reads(NEW, 3), "the record does not name the newest content"
    subject.calotype("recover", "small")
    assert whole(subject, before, done("take")) == "before"
    assert subject.reads(NEW, 2)
    assert subject.reads(NEW, 3)


@pytest.mark.parametrize("name", STAYS)
def test_who_comes_back_too_late_does_not_record_what_is_not_newest(
    subject: Subject, done: Done, name: str
) -> None:
    """It was stopped just before it would have changed the record, and QEMU dies right after."""
    OPERATIONS[name].prepare(subject)
    before = picture(subject)
    moments, deeds = "answer:stop:2+switch:record:1", "stop-self+kill-qemu"
    struck = subject.struck(moments, deeds, begin(subject, name))
    wait(lambda: is_stopped(struck.pid), "the deed")
    await_running(subject, LIMIT_S)
    with (
        contextlib.suppress(CalotypeError),
        held_jobs(subject),
    ):  # the job is given up, or QEMU dead
        subject.write(NEW, 2)
        os.kill(struck.pid, signal.SIGCONT)
        struck.communicate(timeout=60)
    assert subject.reads(NEW, 2), "the record does not name the newest content"
    subject.calotype("recover", "small")
    assert whole(subject, before, done(name), may_be_off=True) == STAYS[name]
    assert_data(subject, name, STAYS[name], wrote_on=True)


# --- the twins -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAYS)
def test_the_guest_stands_still_without_a_guard(subject: Subject, name: str) -> None:
    OPERATIONS[name].prepare(subject)
    subject.killed_at("switch:stop:2", begin(subject, name), without="guard")
    assert not subject.qmp("query-status")["running"]


@pytest.mark.parametrize(
    ("mechanism", "moment"), [("order", "query-status:1"), ("switch", "record:1")]
)
@pytest.mark.parametrize("name", STAYS)
def test_a_write_is_lost_without(subject: Subject, name: str, mechanism: str, moment: str) -> None:
    """The record is written last, or the guard lets the guest run before QEMU has gone over."""
    OPERATIONS[name].prepare(subject)
    subject.killed_at(f"switch:{moment}", begin(subject, name), without=mechanism)
    await_running(subject, LIMIT_S)
    assert not writes_on(subject)

"""The crash tests can fail: with its mechanism taken out, each is seen to."""

import subprocess

import pytest

from calotype.errors import CalotypeError
from calotype.testing.whole import picture
from crashing import OPERATIONS, Done, Subject, assert_held, held

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]

TAKE = {
    "MakeSnapshotFolder,sweep": "done:0",
    "CreateOverlay": "done:2",
    "OpenOverlay,sweep": "done:4",
    "RecordAhead": "done:5",
    "OpenState": "done:6",
    "SetMigration": "done:7",
    "PassInstant": "done:9",
    "MergeBack": "done:10",
    "DeleteMade": "done:10",
}
"""What undoes a kind of step -> the moment from which on it is needed.

Folders and nodes that were left are also swept; both have to be gone to be missed.
"""

RESTORE = {
    "CreateOverlay": "done:0",
    "ApplyInside": "done:1",
    "ExtractInside": "done:2",
    "StartQemu": "done:3",
    "FreezeImages": "done:7",
    "CommitLeftBehind": "done:8",
}

DELETE = {
    "RemoveSnapshotFiles,sweep": "delete on",
    "MergeDown": "delete on",
    "Retarget": "delete on",
    "RemoveImage": "delete on",
    "DeleteInside": "delete on",
    "MergeUp": "delete off",
    "TakePath": "delete off",
    "RecordMerged": "delete off",
}
"""What does a kind of step, which is never undone -> the operation that needs it."""


@pytest.mark.parametrize("mechanism", TAKE)
def test_a_take_is_not_undone_without(subject: Subject, mechanism: str) -> None:
    assert is_seen(subject, "take", TAKE[mechanism], mechanism)


@pytest.mark.parametrize("mechanism", RESTORE)
def test_a_restore_is_not_undone_without(subject: Subject, mechanism: str) -> None:
    assert is_seen(subject, "restore", RESTORE[mechanism], mechanism)


@pytest.mark.parametrize("mechanism", DELETE)
def test_a_delete_is_not_finished_without(subject: Subject, done: Done, mechanism: str) -> None:
    name = DELETE[mechanism]
    OPERATIONS[name].prepare(subject)
    holding, after = held(subject, name), done(name)
    subject.killed_at("done:0", OPERATIONS[name].words)
    recovering = subject.struck("never", "kill-self", ("recover", "small"), without=mechanism)
    recovering.communicate(timeout=60)

    def compare() -> None:
        assert picture(subject) == after
        assert_held(subject, name, holding)

    with pytest.raises((AssertionError, CalotypeError, subprocess.CalledProcessError)):
        compare()


def is_seen(vm: Subject, name: str, moment: str, mechanism: str) -> bool:
    """Whether it shows that an operation was not undone as it should have been."""
    operation = OPERATIONS[name]
    operation.prepare(vm)
    before = picture(vm)
    vm.killed_at(moment, operation.words)
    recovering = vm.struck("never", "kill-self", ("recover", "small"), without=mechanism)
    recovering.communicate(timeout=60)
    return picture(vm) != before


@pytest.mark.parametrize("moment", ["done:5", "done:6"])
def test_file_systems_stay_frozen_without_a_guard_and_without_their_undo(
    subject: Subject, moment: str
) -> None:
    OPERATIONS["take quiesced"].prepare(subject)
    assert subject.agent
    subject.killed_at(moment, OPERATIONS["take quiesced"].words, without="guard")
    assert subject.agent.frozen
    without = "FreezeFileSystems,ThawFileSystems"
    recovering = subject.struck("never", "kill-self", ("recover", "small"), without=without)
    recovering.communicate(timeout=60)
    assert subject.agent.frozen


def test_recover_thaws_what_no_guard_has_thawed(subject: Subject) -> None:
    OPERATIONS["take quiesced"].prepare(subject)
    assert subject.agent
    subject.killed_at("done:5", OPERATIONS["take quiesced"].words, without="guard")
    assert subject.agent.frozen
    subject.calotype("recover", "small")
    assert not subject.agent.frozen


def test_the_guest_stands_still_without_a_guard(subject: Subject) -> None:
    OPERATIONS["take"].prepare(subject)
    words = OPERATIONS["take"].words
    subject.killed_at("sent:migrate", words, without="guard")
    assert not subject.qmp("query-status")["running"]

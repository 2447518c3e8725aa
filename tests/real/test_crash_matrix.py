"""Whatever dies at whatever step: afterwards the operation happened, or it did not.

A cell is one operation, one moment of it and one deed, on a machine without an operating system: it
starts in a tenth of a second. The moments are those between the steps, so they come from the steps:
a new step changes the list and fails `test_the_steps_are_these` until its row is written. That the
cells can fail is shown by their twins, in `test_crash_twins.py`.
"""

import pytest

from crashing import OPERATIONS, WINDOW, Done, Subject, cell, moments, whole

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_steps_are_these(subject: Subject, name: str) -> None:
    OPERATIONS[name].prepare(subject)
    subject.calotype(*OPERATIONS[name].words)
    assert tuple(subject.calotype("history", "small")["history"][-1]["plan"]) == (
        OPERATIONS[name].steps
    )


@pytest.mark.parametrize(
    ("name", "moment"),
    [(name, moment) for name in OPERATIONS for moment in moments(name, "doing", "done")],
)
def test_calotype_is_killed(subject: Subject, done: Done, name: str, moment: str) -> None:
    state = cell(subject, done, name, moment, "kill-self")
    if state == "before" and "restore" not in name:
        subject.calotype(*OPERATIONS[name].words)
        assert whole(subject, done(name), done(name)) == "after", "it cannot be done again"


@pytest.mark.parametrize("command", WINDOW)
@pytest.mark.parametrize("name", ["take", "take paused"])
def test_calotype_is_killed_in_the_pause(
    subject: Subject, done: Done, name: str, command: str
) -> None:
    cell(subject, done, name, f"sent:{command}", "kill-self")


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        (name, moment)
        for name in ("take", "restore", "start", "delete on")
        for moment in ("doing:0", *moments(name, "done"))  # what we note is no matter to it
    ]
    + [("take", f"sent:{command}") for command in WINDOW],
)
def test_qemu_is_killed(subject: Subject, done: Done, name: str, moment: str) -> None:
    cell(subject, done, name, moment, "kill-qemu")


@pytest.mark.parametrize(
    ("name", "moment", "error"),
    [
        (name, moment, error)
        for name in OPERATIONS
        for place, moment in enumerate(moments(name, "done"))
        for error in (("EIO", "ENOSPC")[place % 2],)
    ],
)
def test_the_host_fails(subject: Subject, done: Done, name: str, moment: str, error: str) -> None:
    cell(subject, done, name, moment, error)

"""What was cut off is undone before its point of no return, and finished from there on."""

from itertools import product
from typing import get_args

import hypothesis.strategies as st
import pytest
from hypothesis import given

from builders import GIB, OTHER, SNAPSHOT, disk_path, make_record, make_topology
from calotype.model.vm import Image
from calotype.plan.recovery import (
    OperationKind,
    Sight,
    plan_recovery,
    point_of_no_return,
)
from calotype.plan.steps import (
    AnyStep,
    CheckTopology,
    Commit,
    CommitLeftBehind,
    CreateOverlay,
    Define,
    DiscardImages,
    EndOld,
    FreezeImages,
    HandOver,
    LetRun,
    LoadState,
    MakeSnapshotFolder,
    PassInstant,
    RecordRestored,
    RecordStarted,
    SetClock,
    StartQemu,
)

BEFORE = {0: Image(disk_path(0), "qcow2")}
AFTER = {0: Image(f"{disk_path(0)}.{OTHER}.qcow2", "qcow2")}
OVERLAY = CreateOverlay(AFTER[0].path, BEFORE[0], GIB)
START = StartQemu(AFTER, incoming=True, machine="")
RECORD = RecordRestored(AFTER, BEFORE, SNAPSHOT, None)
DISCARD = DiscardImages((disk_path(1),), ())
LEFT = CommitLeftBehind(OTHER, SNAPSHOT, AFTER, BEFORE, None, "off")

TAKE: tuple[AnyStep, ...] = (
    MakeSnapshotFolder(SNAPSHOT),
    PassInstant("live", True, 1, (), 2000.0, "graph"),
    FreezeImages({}),
    Commit(SNAPSHOT),
)
RESTORE: tuple[AnyStep, ...] = (
    OVERLAY,
    START,
    CheckTopology(make_topology()),
    LoadState(SNAPSHOT, "machine-state"),
    LEFT,
    RECORD,
    LetRun(),
    DISCARD,
)
WITH_CLOCK = (*RESTORE[:7], SetClock("/vm/agent.sock"), DISCARD)
TO_PAUSED = (*RESTORE[:6], DISCARD)
TO_OFF = (OVERLAY, LEFT, RECORD, DISCARD)
STARTING: tuple[AnyStep, ...] = (
    Define(make_record(), None),
    START,
    RecordStarted((), None),
    LetRun(),
)
STARTING_STOPPED = STARTING[:3]
DELETE: tuple[AnyStep, ...] = (DISCARD, FreezeImages({}))
OPERATIONS: dict[str, tuple[OperationKind, tuple[AnyStep, ...]]] = {
    "take": ("take", TAKE),
    "restore": ("restore", RESTORE),
    "restore with the clock": ("restore", WITH_CLOCK),
    "restore to paused": ("restore", TO_PAUSED),
    "restore to off": ("restore", TO_OFF),
    "start": ("start", STARTING),
    "start stopped": ("start", STARTING_STOPPED),
    "delete": ("delete", DELETE),
}


def sights(begun: int) -> list[Sight]:
    return [Sight(begun, *each) for each in product([False, True], repeat=4)]


def is_past(name: str, sight: Sight) -> bool:
    """The table of the docs, read once more."""
    begun = OPERATIONS[name][1][: sight.begun]
    if sight.is_undoing:
        return False
    if name == "take":
        return sight.is_committed
    if name == "delete":
        return bool(begun)
    if LetRun() in begun or DISCARD in begun:
        return True
    holds = sight.qemu_runs or name == "restore to off"
    return name.startswith("restore") and RECORD in begun and sight.is_recorded and holds


@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_is_seen_it_is_undone_before_the_point_of_no_return(name: str) -> None:
    kind, steps = OPERATIONS[name]
    seen = [sight for begun in range(len(steps) + 1) for sight in sights(begun)]
    assert {is_past(name, sight) for sight in seen} == {False} | (
        set() if name == "start stopped" else {True}
    )
    for sight in seen:
        plan = plan_recovery(kind, steps, sight)
        if is_past(name, sight):
            assert plan.undo == 0, sight
        else:
            assert (plan.undo, plan.finish) == (sight.begun, ()), sight


FINISHED = [
    # operation, steps begun, whether QEMU runs -> what is left to do
    ("take", 4, True, ()),
    ("take", 4, False, ()),
    ("restore", 6, True, (RECORD, LetRun(), DISCARD)),
    ("restore", 7, True, (LetRun(), DISCARD)),
    ("restore", 7, False, (DISCARD,)),
    ("restore", 8, True, (DISCARD,)),
    ("restore", 8, False, (DISCARD,)),
    ("restore to paused", 6, True, (RECORD, DISCARD)),
    ("restore to paused", 7, True, (DISCARD,)),
    ("restore to off", 3, False, (RECORD, DISCARD)),
    ("restore to off", 4, False, (DISCARD,)),
    ("start", 4, True, (LetRun(),)),
    ("start", 4, False, ()),
    ("delete", 1, False, DELETE),
    ("delete", 2, True, DELETE),
]


@pytest.mark.parametrize(("name", "begun", "qemu_runs", "finish"), FINISHED)
def test_from_there_on_the_step_that_was_begun_last_is_done_again_and_then_the_rest(
    name: str, begun: int, qemu_runs: bool, finish: tuple[AnyStep, ...]
) -> None:
    kind, steps = OPERATIONS[name]
    sight = Sight(begun, is_committed=True, is_recorded=True, qemu_runs=qemu_runs)
    plan = plan_recovery(kind, steps, sight)
    assert (plan.finish, plan.undo) == (finish, 0)


OVER = HandOver(AFTER, BEFORE, SNAPSHOT, None, (), (), was_running=True, let_run=True)
BESIDE: tuple[AnyStep, ...] = (OVERLAY, START, OVER, EndOld(()), LEFT)
WENT_OVER = [
    # steps begun, recorded, the new QEMU lives, the old one does -> whether it is finished
    (2, True, True, True, False),
    (3, False, True, True, False),
    (3, True, True, True, True),
    (3, True, False, True, False),  # the old one is all there is
    (3, True, False, False, True),  # neither is: the record decides
    (3, False, True, False, False),
    (4, True, True, True, True),
    (4, True, False, True, True),  # the new guest ran: there is no way back
    (5, False, False, False, True),
]


@pytest.mark.parametrize(("begun", "recorded", "new", "old", "over"), WENT_OVER)
def test_a_handover_is_past_return_once_it_is_recorded_and_not_all_that_is_left_is_the_old_one(
    begun: int, recorded: bool, new: bool, old: bool, over: bool
) -> None:
    sight = Sight(begun, is_committed=True, is_recorded=recorded, qemu_runs=new, old_runs=old)
    plan = plan_recovery("restore", BESIDE, sight)
    assert plan.undo == (0 if over else begun)
    assert plan.finish == (BESIDE[begun - 1 :] if over else ())


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_undo_that_was_begun_is_gone_on_with(name: str) -> None:
    kind, steps = OPERATIONS[name]
    sight = Sight(len(steps), True, True, qemu_runs=False, is_undoing=True)
    assert plan_recovery(kind, steps, sight).undo == len(steps)


NO_RETURN = [
    ("take", 4), ("restore", 7), ("restore to paused", 6), ("restore to off", 3),
    ("start", 4), ("start stopped", 3), ("delete", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "place"), NO_RETURN)
def test_a_step_that_fails_from_this_place_on_undoes_nothing(name: str, place: int) -> None:
    assert point_of_no_return(*OPERATIONS[name]) == place


def test_nothing_is_nothing() -> None:
    for kind in get_args(OperationKind):
        plan = plan_recovery(kind, (), Sight(0, False, False, qemu_runs=True))
        assert (plan.finish, plan.undo) == ((), 0)


POOL = (*TAKE, *RESTORE, *STARTING)


@given(
    kind=st.sampled_from(get_args(OperationKind)),
    steps=st.lists(st.sampled_from(POOL), max_size=10).map(tuple),
    data=st.data(),
)
def test_a_plan_never_both_finishes_and_undoes(
    kind: OperationKind, steps: tuple[AnyStep, ...], data: st.DataObject
) -> None:
    begun = data.draw(st.integers(0, len(steps)))
    sight = Sight(begun, *(data.draw(st.booleans()) for _ in range(4)))
    plan = plan_recovery(kind, steps, sight)
    assert not (plan.undo and plan.finish)
    assert plan.undo in (0, begun)
    assert not (sight.is_undoing and plan.finish)
    later = iter(steps)
    assert all(step in later for step in plan.finish), "in another order"
    if plan.finish and not sight.qemu_runs:
        assert LetRun() not in plan.finish

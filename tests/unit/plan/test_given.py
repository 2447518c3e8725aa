"""What each action of a transaction is to the snapshot: read purely, against facts."""

from typing import Any

import pytest

from builders import SNAPSHOT, make_disk, make_disk_record, make_facts, make_record
from calotype.model.vm import Bitmap, Facts, LooseNode, Stray
from calotype.plan.given import taken_back
from calotype.plan.steps import (
    CreateOverlay,
    OpenOverlay,
    PassInstant,
    RecordAhead,
    SnapshotInside,
    SwitchToOverlay,
    Verbatim,
    qmp_action,
)
from calotype.plan.take import plan_take
from calotype.plan.take_plan import TakePlan, TakeRequest, Transaction
from calotype.plan.window import Command, Window

Action = dict[str, Any]
EMPTY = LooseNode("mine", "qcow2", "/vm/mine.qcow2", "/vm/disk0.qcow2")
OVERLAY: Action = {"type": "blockdev-snapshot", "data": {"node": "disk0", "overlay": "mine"}}
SYNC: Action = {
    "type": "blockdev-snapshot-sync",
    "data": {"device": "disk1", "snapshot-file": "/vm/new.qcow2", "snapshot-node-name": "new"},
}
INSIDE: Action = {
    "type": "blockdev-snapshot-internal-sync",
    "data": {"device": "disk2", "name": "2"},
}
BITMAP: Action = {"type": "block-dirty-bitmap-add", "data": {"node": "#block0", "name": "b"}}


def facts(**changes: Any) -> Facts:
    given: dict[str, Any] = {
        "loose": (EMPTY,),
        "strays": (Stray("writable node 'mine'", node="mine"),),
    }
    return make_facts([make_disk(index) for index in range(3)], **{**given, **changes})


def planned(*actions: Action, **changes: Any) -> TakePlan:
    record = make_record([make_disk_record(index) for index in range(3)])
    request = TakeRequest(transaction=Transaction(actions, {"completion-mode": "grouped"}))
    return plan_take(facts(**changes), record, request, SNAPSHOT)


def instant(plan: TakePlan) -> PassInstant:
    (found,) = (step for step in plan.steps if isinstance(step, PassInstant))
    return found


def problems(plan: TakePlan) -> str:
    return "; ".join(blocker.problem for blocker in plan.blockers)


def test_the_actions_stay_in_their_order_and_as_they_were() -> None:
    plan = planned(BITMAP, INSIDE, OVERLAY)
    assert plan.blockers == ()
    assert [type(each) for each in instant(plan).actions] == [
        Verbatim,
        SnapshotInside,
        SwitchToOverlay,
    ]
    sent = [qmp_action(action) for action in instant(plan).actions]
    node = {"node": "#block0", "overlay": "mine"}
    assert sent == [BITMAP, INSIDE, {"type": "blockdev-snapshot", "data": node}]
    assert instant(plan).properties == {"completion-mode": "grouped"}


def test_the_properties_go_with_the_actions_and_none_where_there_are_none() -> None:
    for properties, sent in (({"completion-mode": "grouped"}, True), ({}, False)):
        window = Window(
            "storage-only",
            was_running=True,
            migrate={},
            actions=[BITMAP],
            limit_ms=1.0,
            properties=properties,
        )
        (command,) = window.begin()
        assert isinstance(command, Command)
        assert command.arguments["actions"] == [BITMAP]
        assert ("properties" in command.arguments) == sent


def test_an_overlay_that_qemu_would_make_in_the_pause_is_made_before() -> None:
    plan = planned(SYNC, strays=())
    assert plan.blockers == ()
    (made,) = (step for step in plan.steps if isinstance(step, CreateOverlay))
    (opened,) = (step for step in plan.steps if isinstance(step, OpenOverlay))
    assert (made.overlay, opened.node) == ("/vm/new.qcow2", "new")
    (action,) = instant(plan).actions
    assert qmp_action(action)["data"] == {"node": "#block1", "overlay": "new"}


def test_the_record_names_the_overlays_before_and_the_rest_stays() -> None:
    plan = planned(OVERLAY, SYNC)
    (ahead,) = (step for step in plan.steps if isinstance(step, RecordAhead))
    assert [ahead.active[index].path for index in range(3)] == [
        "/vm/mine.qcow2",
        "/vm/new.qcow2",
        "/vm/disk2.qcow2",
    ]
    assert [disk.kind for disk in plan.disks] == ["external", "external", "skip"]


@pytest.mark.parametrize(
    ("action", "changes", "said"),
    [
        ({**OVERLAY, "data": {"node": "no", "overlay": "mine"}}, {}, "node-name='no'"),
        ({**OVERLAY, "data": {"node": "disk0", "overlay": "no"}}, {}, "node-name='no'"),
        ({**OVERLAY, "data": {"node": "disk1", "overlay": "mine"}}, {}, "stands on /vm/disk1"),
        (OVERLAY, {"loose": (LooseNode("mine", "raw", "/vm/mine"),)}, "is no qcow2"),
        (
            OVERLAY,
            {"loose": (LooseNode("mine", "qcow2", "/vm/m", "/vm/disk0.qcow2", l2_tables=1),)},
            "holds data already",
        ),
        ({**SYNC, "data": {**SYNC["data"], "format": "raw"}}, {}, "format 'raw'"),
        ({**SYNC, "data": {**SYNC["data"], "mode": "existing"}}, {}, "mode 'existing'"),
        ({**SYNC, "data": {"device": "disk1", "snapshot-file": "new"}}, {}, "absolute path"),
        ({**INSIDE, "data": {"device": "disk2", "name": ""}}, {}, "Name is empty"),
        (BITMAP, {"bitmaps": (Bitmap("#block0", "b"),)}, "Bitmap already exists: b"),
    ],
)
def test_what_is_in_the_way(action: Action, changes: dict[str, Any], said: str) -> None:
    assert said in problems(planned(action, **changes))


def test_a_disk_is_snapshotted_by_one_action() -> None:
    also = {**SYNC, "data": {**SYNC["data"], "device": "disk2"}}
    assert "two actions" in problems(planned(INSIDE, also))


def test_a_name_inside_the_image_is_not_used_twice() -> None:
    disks = [make_disk(index, internal_names=frozenset({"2"})) for index in range(3)]
    record = make_record([make_disk_record(index) for index in range(3)])
    plan = plan_take(
        make_facts(disks), record, TakeRequest(transaction=Transaction((INSIDE,))), SNAPSHOT
    )
    assert "Snapshot with name '2' already exists" in problems(plan)


def test_a_node_that_no_action_names_is_in_the_way_still() -> None:
    assert "writable node 'mine'" in problems(planned(INSIDE))
    assert problems(planned(OVERLAY)) == ""


@pytest.mark.parametrize(
    ("action", "command"),
    [
        (BITMAP, ("block-dirty-bitmap-remove", {"node": "#block0", "name": "b"})),
        (
            {"type": "blockdev-backup", "data": {"job-id": "j"}},
            ("block-job-cancel", {"device": "j"}),
        ),
        ({"type": "blockdev-backup", "data": {"device": "d"}}, None),
        ({"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "b"}}, None),
        ({"type": "abort", "data": {}}, None),
    ],
)
def test_what_is_taken_back_when_the_save_fails_later(action: Action, command: Any) -> None:
    assert taken_back(action) == command

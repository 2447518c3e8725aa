"""An instant is undone as far as it happened: the guest first, then each disk by what is found."""

from typing import get_args

import hypothesis.strategies as st
import pytest
from hypothesis import given
from msgspec.structs import replace

from builders import SNAPSHOT, disk_path
from calotype.model import names
from calotype.model.vm import Image
from calotype.plan.abandon import OverlaySight, Qemu, plan_abandon
from calotype.plan.steps import (
    DeleteMade,
    EndPause,
    MergeBack,
    MergeBackOffline,
    PassInstant,
    SnapshotInside,
    Step,
    StorageAction,
    SwitchToOverlay,
    ThawFileSystems,
)


def switch(index: int) -> SwitchToOverlay:
    base = Image(disk_path(index), "qcow2")
    overlay = names.overlay_path(base.path, SNAPSHOT)
    return SwitchToOverlay(
        f"#block{index}", f"node{index}", overlay, base, 0o640 + index, f"job{index}"
    )


def inside(index: int) -> SnapshotInside:
    name = names.internal_name(SNAPSHOT)
    return SnapshotInside(f"#block{index}", name, Image(disk_path(index), "qcow2"))


def instant(*actions: StorageAction, was_running: bool = True) -> PassInstant:
    return PassInstant("live", was_running, 1, actions, 2000.0, "graph")


def merged(index: int) -> MergeBack:
    action = switch(index)
    return MergeBack(action.overlay, action.base, action.base_mode, action.merge_job)


def merged_offline(index: int) -> MergeBackOffline:
    action = switch(index)
    return MergeBackOffline(action.overlay, action.base, action.base_mode)


def deleted(index: int) -> DeleteMade:
    return DeleteMade(inside(index).image, inside(index).name)


NEWEST, IDLE = OverlaySight(is_newest=True), OverlaySight(is_newest=False)

RUN_STATES = [
    # who runs the VM, whether it ran before, whether the pause is known to be over -> what is done
    ("same", True, False, (EndPause(True),)),
    ("same", True, True, (EndPause(False),)),
    ("same", False, False, (EndPause(False),)),
    ("same", False, True, (EndPause(False),)),
    ("other", True, False, ()),
    ("other", False, True, ()),
    ("gone", True, False, ()),
    ("gone", False, True, ()),
]


@pytest.mark.parametrize(("qemu", "was_running", "settled", "plan"), RUN_STATES)
def test_the_guest_is_let_run_only_if_the_pause_was_ours_and_may_not_be_over(
    qemu: Qemu, was_running: bool, settled: bool, plan: tuple[Step, ...]
) -> None:
    passed = instant(was_running=was_running)
    assert plan_abandon(passed, qemu, {}, settled=settled) == plan


def test_what_an_old_qemu_has_left_protected_is_unprotected() -> None:
    old = replace(instant(), method="live-storage-first")
    assert plan_abandon(old, "same", {}, settled=True) == (EndPause(False, unprotect=True),)
    assert plan_abandon(old, "other", {}, settled=True) == ()


OVERLAYS = [
    # who runs the VM, what is found of the overlay -> what is done about it
    ("same", None, ()),
    ("same", IDLE, (merged(0),)),  # the merge may not be over
    ("same", NEWEST, (merged(0),)),
    ("other", None, ()),
    ("other", IDLE, (merged(0),)),
    ("other", NEWEST, (merged(0),)),
    ("gone", None, ()),
    ("gone", IDLE, ()),  # it was merged already
    ("gone", NEWEST, (merged_offline(0),)),
]


@pytest.mark.parametrize(("qemu", "sight", "plan"), OVERLAYS)
def test_an_overlay_is_merged_back_by_whoever_has_it(
    qemu: Qemu, sight: OverlaySight | None, plan: tuple[Step, ...]
) -> None:
    overlays = {} if sight is None else {switch(0).overlay: sight}
    done = plan_abandon(instant(switch(0)), qemu, overlays, settled=True)
    assert tuple(step for step in done if not isinstance(step, EndPause)) == plan


@pytest.mark.parametrize("qemu", get_args(Qemu))
def test_an_internal_snapshot_is_deleted_whoever_runs(qemu: Qemu) -> None:
    assert plan_abandon(instant(inside(0)), qemu, {}, settled=True)[-1] == deleted(0)


def test_the_guest_comes_first_and_then_the_disks_newest_first() -> None:
    overlays = {switch(0).overlay: NEWEST, switch(2).overlay: NEWEST}
    passed = instant(switch(0), inside(1), switch(2), inside(3))
    assert plan_abandon(passed, "same", overlays, settled=False) == (
        EndPause(True), deleted(3), merged(2), deleted(1), merged(0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("qemu", "plan"),
    [
        ("same", (EndPause(True), ThawFileSystems("/vm/agent.sock"), deleted(0))),
        ("other", (deleted(0),)),
        ("gone", (deleted(0),)),
    ],
)
def test_file_systems_are_thawed_before_the_disks_in_the_qemu_that_they_were_frozen_in(
    qemu: Qemu, plan: tuple[Step, ...]
) -> None:
    passed = replace(instant(inside(0)), agent="/vm/agent.sock")
    assert plan_abandon(passed, qemu, {}, settled=False) == plan


def test_each_overlay_is_judged_on_its_own() -> None:
    overlays = {switch(0).overlay: NEWEST, switch(1).overlay: IDLE}
    passed = instant(switch(0), switch(1), switch(2))
    assert plan_abandon(passed, "gone", overlays, settled=True) == (merged_offline(0),)
    assert plan_abandon(passed, "same", overlays, settled=True) == (
        EndPause(False), merged(1), merged(0),
    )  # fmt: skip


ACTIONS = st.lists(st.integers(0, 7), unique=True, max_size=6).flatmap(
    lambda places: st.tuples(*(st.sampled_from([switch(at), inside(at)]) for at in places))
)


@given(ACTIONS, st.sampled_from(get_args(Qemu)), st.booleans(), st.booleans(), st.data())
def test_no_overlay_is_merged_twice_and_none_is_passed_over_that_a_guest_writes_to(
    actions: tuple[StorageAction, ...],
    qemu: Qemu,
    was_running: bool,
    settled: bool,
    data: st.DataObject,
) -> None:
    sights = st.sampled_from([NEWEST, IDLE])
    paths = [action.overlay for action in actions if isinstance(action, SwitchToOverlay)]
    overlays = {path: data.draw(sights) for path in paths if data.draw(st.booleans())}
    passed = instant(*actions, was_running=was_running)
    plan = plan_abandon(passed, qemu, overlays, settled=settled)

    ends = [place for place, step in enumerate(plan) if isinstance(step, EndPause)]
    assert ends == ([0] if qemu == "same" else [])
    live = [step.overlay for step in plan if isinstance(step, MergeBack)]
    offline = [step.overlay for step in plan if isinstance(step, MergeBackOffline)]
    assert len(live + offline) == len({*live, *offline})
    newest = {path for path, sight in overlays.items() if sight.is_newest}
    assert set(live) == (set() if qemu == "gone" else set(overlays))
    assert set(offline) == (newest if qemu == "gone" else set())
    made = [step for step in plan if isinstance(step, DeleteMade)]
    assert len(made) == len(actions) - len(paths)

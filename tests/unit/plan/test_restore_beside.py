"""The plan of going over from a VM that runs: what is in the way, what is handed over, and when."""

import pytest

from builders import (
    OTHER,
    disk_path,
    make_disk_record,
    make_found,
    make_manifest,
    make_migration,
    make_part,
    make_record,
    make_running,
)
from calotype.model.acts import Tell
from calotype.model.snapshot import StorageKind
from calotype.model.vm import Image
from calotype.plan.restore import plan_restore
from calotype.plan.restore_plan import RestorePlan, RestoreRequest, Running
from calotype.plan.steps import (
    ApplyInside,
    CommitLeftBehind,
    DiscardImages,
    EndOld,
    ExtractInside,
    FreezeImages,
    HandOver,
    LetRun,
    RecordRestored,
    SaveLeftBehind,
    SetClock,
    StartQemu,
)

NEW = Image(f"{disk_path(0)}.{OTHER}.qcow2", "qcow2")
RUNNING = make_running()


def plan(
    running: Running | None = RUNNING,
    request: RestoreRequest | None = None,
    kind: StorageKind = "external",
    *,
    has_state: bool = True,
) -> RestorePlan:
    changes = {} if has_state else {"machine_state": None}
    parts, disks = [make_part(0, kind)], [make_disk_record(0)]
    if kind == "skip":  # and one that is not, or the two QEMUs could not be told apart
        parts, disks = [*parts, make_part(1)], [*disks, make_disk_record(1)]
    manifest = make_manifest(parts, **changes)
    record = make_record(disks, parent="p")
    asked = request or RestoreRequest()
    return plan_restore(manifest, record, make_found(manifest, record), asked, OTHER, running)


def names(made: RestorePlan) -> list[str]:
    return [type(step).__name__ for step in made.steps]


def handed(made: RestorePlan) -> HandOver:
    (step,) = (step for step in made.steps if isinstance(step, HandOver))
    return step


def test_everything_is_prepared_before_the_handover_and_the_rest_comes_after() -> None:
    made = plan()
    assert (made.blockers, made.mismatches, made.endpoints) == ((), (), RUNNING.endpoints)
    assert names(made) == [
        "CreateOverlay", "StartQemu", "CheckTopology", "LoadState", "MakeSnapshotFolder",
        "HandOver", "EndOld", "FreezeImages", "CommitLeftBehind",
    ]  # fmt: skip
    assert not {LetRun, RecordRestored} & {type(step) for step in made.steps}


def test_the_handover_names_all_that_it_and_its_undo_need() -> None:
    step = handed(plan())
    assert step.active == {0: NEW}
    assert step.active_before == {0: Image(disk_path(0), "qcow2")}
    assert step.parent_before == "p"
    assert (step.forth, step.back) == (RUNNING.forth, RUNNING.back)
    assert (step.was_running, step.let_run) == (True, True)


def test_the_second_qemu_is_started_beside_and_its_sockets_are_known() -> None:
    (start,) = (step for step in plan().steps if isinstance(step, StartQemu))
    assert start.beside
    assert start.sockets == ("/store/vm/control.sock.next",)
    (end,) = (step for step in plan().steps if isinstance(step, EndOld))
    assert end.names == ("/store/vm/control.sock.prev",)


@pytest.mark.parametrize("was_running", [True, False])
def test_the_run_state_left_behind_is_that_of_the_guest_that_was_stopped(
    was_running: bool,
) -> None:
    made = plan(make_running(was_running=was_running))
    assert handed(made).was_running == was_running
    (left,) = (step for step in made.steps if isinstance(step, CommitLeftBehind))
    assert left.run_state == ("running" if was_running else "paused")


def test_a_guest_that_is_to_be_paused_is_not_let_run() -> None:
    assert not handed(plan(request=RestoreRequest("paused"))).let_run


def test_the_machine_state_left_behind_is_saved_before_its_qemu_ends() -> None:
    made = plan(request=RestoreRequest(keep_current=True))
    kinds = [type(step) for step in made.steps]
    assert kinds.index(HandOver) < kinds.index(SaveLeftBehind) < kinds.index(EndOld)
    assert kinds.index(EndOld) < kinds.index(FreezeImages) < kinds.index(CommitLeftBehind)


def test_what_is_discarded_is_removed_when_no_qemu_has_it_open() -> None:
    kinds = [type(step) for step in plan(request=RestoreRequest(discard_current=True)).steps]
    assert kinds.index(EndOld) < kinds.index(DiscardImages)
    assert CommitLeftBehind not in kinds


def test_a_snapshot_inside_the_active_image_is_copied_out_while_a_vm_runs_on_it() -> None:
    kinds = {type(step) for step in plan(kind="internal").steps}
    assert ExtractInside in kinds
    assert ApplyInside not in kinds
    assert "copied out" in plan(kind="internal").notes[0]
    assert ApplyInside in {type(step) for step in plan(None, kind="internal").steps}


def test_an_image_that_both_would_be_on_is_given_up_by_the_old_one_last() -> None:
    step = handed(plan(kind="skip"))
    assert step.forth[-1] == Tell("old", "blockdev-set-active", {"active": False})
    assert step.back[0] == Tell("old", "blockdev-set-active", {"active": True})


def test_the_clock_is_set_last_when_the_old_one_is_gone() -> None:
    kinds = [type(step) for step in plan(request=RestoreRequest(sync_time=True)).steps]
    assert kinds[-1] is SetClock
    assert SetClock not in {type(step) for step in plan().steps}


def test_two_qemus_that_nothing_would_tell_apart_are_not_run_beside_each_other() -> None:
    manifest, record = make_manifest([]), make_record([])
    found = make_found(manifest, record)
    made = plan_restore(manifest, record, found, RestoreRequest(), OTHER, RUNNING)
    (blocker,) = made.blockers
    assert "no disk of it gets another image" in blocker.problem
    assert "--stop-first" in blocker.remedy
    assert plan_restore(manifest, record, found, RestoreRequest(), OTHER).blockers == ()


BLOCKED = [
    (make_running(unshared=(("-gdb tcp::1", "one alone"),)), {}, "-gdb tcp::1: one alone"),
    (make_running(adopted_at="/run/qmp.sock"), {}, "by hand and adopted at /run/qmp.sock"),
    (make_running(jobs=("backup",)), {}, "block job 'backup'"),
    (make_running(migration=make_migration(status="active")), {}, "a migration is under way"),
    (make_running(can_let_go=False), {"kind": "skip"}, "is skipped, so both would be on it"),
    (make_running(), {"kind": "skip", "has_state": False}, "is skipped"),
    (
        make_running(),
        {"request": RestoreRequest(keep_current=True, discard_current=True)},
        "both kept and discarded",
    ),
]


def test_a_qemu_that_was_adopted_is_left_by_stopping_it_first() -> None:
    (blocker,) = plan(make_running(adopted_at="/run/qmp.sock")).blockers
    assert "would take its user's sockets" in blocker.problem
    assert "--stop-first" in blocker.remedy
    assert not plan(None).blockers


@pytest.mark.parametrize(("running", "changes", "words"), BLOCKED)
def test_what_is_in_the_way_is_named_with_a_remedy(
    running: Running, changes: dict[str, object], words: str
) -> None:
    (blocker,) = plan(running, **changes).blockers  # type: ignore[arg-type]
    assert words in blocker.problem
    assert blocker.remedy

"""The plan of a delete: who goes, who stays and as whose child, what is in the way, the order."""

from typing import Any

import pytest
from msgspec.structs import replace

from builders import (
    GIB,
    disk_path,
    make_disk_record,
    make_identity,
    make_layer,
    make_manifest,
    make_part,
    make_record,
)
from calotype.model import names
from calotype.model.identity import Identity
from calotype.model.snapshot import Manifest
from calotype.model.vm import Image, VmRecord
from calotype.plan.delete import Catalogue, DeletePlan, DeleteRequest, plan_delete
from calotype.plan.layers import DiskLayers, Inside, Layer
from calotype.plan.steps import (
    DeleteInside,
    DropSnapshot,
    MergeDown,
    RecordMerged,
    RemoveImage,
    RemoveSnapshotFiles,
    Retarget,
)
from calotype.plan.take_plan import Blocker

IDS = tuple(f"{number:016x}" for number in (1, 2, 3))
IMAGES = (
    Image(disk_path(0), "qcow2"),
    *(Image(names.overlay_path(disk_path(0), snapshot), "qcow2") for snapshot in IDS),
)
"""The images of a chain of three snapshots: each is the disk of one, the last is the newest."""


def identity(place: int) -> Identity:
    return make_identity(100 + place)


def manifests() -> tuple[Manifest, ...]:
    """Three external snapshots, each the child of the one before."""
    made = []
    for place, snapshot in enumerate(IDS):
        chain = tuple(make_layer(IMAGES[below].path, 100 + below) for below in range(place, -1, -1))
        part = make_part(0, image=IMAGES[place], layers=chain)
        parent = IDS[place - 1] if place else None
        made.append(make_manifest([part], id=snapshot, parent=parent))
    return tuple(made)


def record() -> VmRecord:
    return make_record([make_disk_record(0, active=IMAGES[-1])], parent=IDS[-1])


def layers(**changes: Any) -> DiskLayers:
    backings = [None, *IMAGES]
    found = {
        image.path: Layer(image, backing, 10 * GIB, GIB)
        for image, backing in zip(IMAGES, backings, strict=False)
    }
    whole = DiskLayers(0, "disk0", IMAGES[0], IMAGES[-1], found, free_bytes=1000 * GIB)
    return replace(whole, **changes)


def catalogue(**changes: Any) -> Catalogue:
    whole = Catalogue(
        record=record(),
        manifests=manifests(),
        protected=frozenset(),
        disks=(layers(),),
        identities={image.path: identity(place) for place, image in enumerate(IMAGES)},
        state_bytes=dict.fromkeys(IDS, 1000),
    )
    return replace(whole, **changes)


def plan_of(*places: int, children: bool = False, **changes: Any) -> DeletePlan:
    request = DeleteRequest(frozenset(IDS[place] for place in places), children)
    return plan_delete(catalogue(**changes), request)


def test_the_middle_goes_and_the_rest_closes_up() -> None:
    plan = plan_of(1)
    assert plan.snapshots == (IDS[1],)
    assert plan.reparented == {IDS[2]: IDS[0]}
    changed = tuple(sorted(image.path for image in IMAGES[1:]))
    moved = {IMAGES[2].path: IMAGES[1]}
    assert plan.steps == (
        DropSnapshot(IDS[1]),
        RemoveSnapshotFiles(IDS[1]),
        MergeDown(
            disk=0,
            top=IMAGES[2],
            base=IMAGES[1],
            children=(IMAGES[3],),
            active=IMAGES[3].path,
            job=f"calotype-merge-{IDS[1]}-0",
            was_running=False,
        ),
        Retarget(IDS[2], moved, (IMAGES[2].path, IMAGES[1].path), IDS[0]),
        RemoveImage(IMAGES[2].path),
        Retarget(IDS[2], moved, changed, IDS[0]),
    )
    assert (plan.blockers, plan.mismatches) == ((), ())


def test_the_last_goes_and_the_newest_content_comes_down() -> None:
    plan = plan_of(2)
    assert DropSnapshot(IDS[2]) == plan.steps[0]
    assert RecordMerged({}, {}, IDS[1]) in plan.steps
    assert RecordMerged({0: IMAGES[2]}, {0: IMAGES[3]}, IDS[1]) in plan.steps
    assert plan.steps.index(RemoveImage(IMAGES[3].path)) == len(plan.steps) - 1


def test_all_go_and_the_user_has_the_path_back() -> None:
    plan = plan_of(0, children=True)
    assert plan.snapshots == IDS
    merged = [step.top for step in plan.steps if isinstance(step, MergeDown)]
    assert merged == list(IMAGES[1:])
    assert [stay.path for stay in plan.stays] == [IMAGES[0].path]
    assert not [step for step in plan.steps if isinstance(step, Retarget)]


def test_every_drop_comes_before_anything_else() -> None:
    steps = plan_of(0, 1, 2).steps
    assert [type(step) for step in steps[:6]] == [DropSnapshot] * 3 + [RemoveSnapshotFiles] * 3


def test_what_is_freed_is_told_at_least_and_at_most() -> None:
    plan = plan_of(1)
    assert plan.freed_bytes == 1000
    assert plan.freed_limit_bytes == 1000 + GIB
    assert plan.merges[0].bytes == GIB
    assert plan.seconds == pytest.approx(GIB / 300e6, abs=0.1)


def of_sizes(*sizes: int, **changes: Any) -> DiskLayers:
    """The disk, each image of its own size."""
    whole = layers()
    sized = zip(whole.layers.values(), sizes, strict=True)
    resized = {each.path: replace(each, allocated_bytes=size, **changes) for each, size in sized}
    return replace(whole, layers=resized)


def test_all_of_a_top_may_be_freed_its_tables_too() -> None:
    plan = plan_of(1, disks=(of_sizes(GIB, 10, GIB, GIB),))
    assert plan.freed_limit_bytes == 1000 + GIB


def test_a_merge_that_takes_more_than_it_frees_is_told() -> None:
    disk = layers()
    fork = Image(f"{IMAGES[0].path}.{'e' * 16}.qcow2", "qcow2")
    more = Layer(fork, IMAGES[1], 10 * GIB, GIB)
    held = {fork.path: ("e" * 16,)}
    branched = replace(disk, layers={**disk.layers, fork.path: more}, held=held)
    part = make_part(0, image=fork, layers=(make_layer(fork.path, 50),))
    manifest = make_manifest([part], id="e" * 16, parent=IDS[0])
    plan = plan_of(1, disks=(branched,), manifests=(*manifests(), manifest))
    assert plan.freed_bytes == 1000 - GIB


def test_what_waits_for_a_vm_that_runs_is_told_as_such() -> None:
    def is_more_when_off(*, is_open: bool) -> bool:
        copy = Image(f"{IMAGES[0].path}.{'c' * 16}.qcow2", "qcow2")
        alone = {
            image.path: Layer(image, None, 10 * GIB, GIB, is_open=is_open and image == copy)
            for image in (IMAGES[0], copy)
        }
        disk = DiskLayers(0, "disk0", IMAGES[0], copy, alone, free_bytes=1000 * GIB)
        return plan_of(disks=(disk,), manifests=()).is_more_when_off

    assert is_more_when_off(is_open=True)
    assert not is_more_when_off(is_open=False)


def test_no_snapshot_at_all_merges_what_can_be_merged() -> None:
    plan = plan_of(manifests=manifests()[:1])
    assert plan.snapshots == ()
    assert [merge.source for merge in plan.merges] == [image.path for image in IMAGES[2:]]


# --- what is in the way --------------------------------------------------------------------------


def problems(plan: DeletePlan) -> str:
    return " ".join(blocker.problem for blocker in plan.blockers)


def test_a_protected_snapshot_is_in_the_way_a_descendant_too() -> None:
    protected = frozenset({IDS[2]})
    assert plan_of(1, protected=protected).blockers == ()
    plan = plan_of(1, children=True, protected=protected)
    assert f"{IDS[2]} is protected" in problems(plan)
    assert plan.blockers[0].remedy == f"`calotype unprotect web --id {IDS[2]}` first"


def test_no_room_to_merge_is_in_the_way() -> None:
    assert "are free beside" in problems(plan_of(1, disks=(layers(free_bytes=GIB - 1),)))
    assert plan_of(1, disks=(layers(free_bytes=GIB),)).blockers == ()


def opened(**changes: Any) -> DiskLayers:
    """The disk as a VM that runs has it."""
    whole = layers()
    open_now = {path: replace(layer, is_open=True) for path, layer in whole.layers.items()}
    return replace(whole, layers=open_now, **changes)


def test_what_is_wrong_with_a_running_qemu_is_in_the_way_only_of_its_own_merges() -> None:
    faults = (Blocker("a job is under way", "wait"),)
    assert "a job is under way" in problems(plan_of(1, disks=(opened(),), faults=faults))
    assert plan_of(1, faults=faults).blockers == ()


def inside(place: int, **changes: Any) -> dict[str, Any]:
    """A fourth snapshot, inside one image of the chain."""
    entry = Inside("7", names.internal_name("d" * 16), "entry 0")
    part = make_part(0, "internal", "d" * 16, image=IMAGES[place], internal_id="7")
    fourth = make_manifest([part], id="d" * 16, parent=IDS[2])
    whole = opened() if changes.pop("is_open", False) else layers()
    holder = replace(whole.layers[IMAGES[place].path], inside=(replace(entry, **changes),))
    held = replace(whole, layers={**whole.layers, holder.path: holder})
    return {"manifests": (*manifests(), fourth), "disks": (held,)}


def plan_inside(place: int, **changes: Any) -> DeletePlan:
    return plan_delete(catalogue(**inside(place, **changes)), DeleteRequest(frozenset({"d" * 16})))


def test_a_snapshot_inside_is_deleted_from_an_image_that_stays() -> None:
    plan = plan_inside(0)
    name = names.internal_name("d" * 16)
    assert DeleteInside(IMAGES[0], "7", name, IMAGES[3].path) in plan.steps
    assert {step.snapshot for step in plan.steps if isinstance(step, Retarget)} == set(IDS)


def test_one_inside_what_a_running_vm_stands_on_is_in_the_way_but_not_at_its_top() -> None:
    assert "cannot change while it runs" in problems(plan_inside(0, is_open=True))
    assert plan_inside(3, is_open=True).blockers == ()
    assert plan_inside(0).blockers == ()


def test_one_inside_that_is_another_by_now_is_a_mismatch() -> None:
    (mismatch,) = plan_inside(0, digest="other").mismatches
    assert mismatch.kind == "snapshots"
    assert IMAGES[0].path in mismatch.text


@pytest.mark.parametrize(
    ("field", "kind"), [("inode", "replaced"), ("size_bytes", "written"), ("l1_digest", "written")]
)
def test_an_image_that_is_not_what_was_recorded_is_named(field: str, kind: str) -> None:
    now = replace(identity(1), **{field: "other" if field.endswith("digest") else 5})
    identities = {**catalogue().identities, IMAGES[1].path: now}
    (mismatch,) = plan_of(1, identities=identities).mismatches
    assert mismatch.kind == kind
    assert IMAGES[1].path in mismatch.text
    assert plan_of(2, identities=identities).mismatches == ()


@pytest.mark.parametrize("field", ["ctime_ns", "device"])
def test_an_image_that_was_touched_or_is_on_a_new_device_number_is_the_same(field: str) -> None:
    identities = {IMAGES[1].path: replace(identity(1), **{field: 5})}
    assert plan_of(1, identities=identities).mismatches == ()

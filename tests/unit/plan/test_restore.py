"""The plan of a restore: every difference is named, and nothing that is needed is thrown away."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings
from msgspec.structs import replace

from builders import (
    DEFINITION,
    GIB,
    OTHER,
    SNAPSHOT,
    disk_path,
    make_agent,
    make_disk_record,
    make_found,
    make_identity,
    make_layer,
    make_manifest,
    make_part,
    make_record,
    make_state,
)
from calotype.engine import finding
from calotype.model import names
from calotype.model.identity import Change as ImageChange
from calotype.model.identity import Identity
from calotype.model.snapshot import Manifest
from calotype.model.vm import Image, VmRecord
from calotype.plan.restore import plan_restore
from calotype.plan.restore_plan import Found, Mismatch, RestorePlan, RestoreRequest
from calotype.plan.steps import (
    ApplyInside,
    CheckTopology,
    CommitLeftBehind,
    CreateOverlay,
    DiscardImages,
    ExtractInside,
    FreezeImages,
    LetRun,
    LoadState,
    MakeSnapshotFolder,
    RecordRestored,
    SetClock,
    StartQemu,
    Step,
)
from calotype.store.store import Store

LEFT = "00000000000000c1"
"""The id of what a restore leaves behind."""


def overlay(index: int, snapshot: str) -> Image:
    return Image(names.overlay_path(disk_path(index), snapshot), "qcow2")


def on_overlays(*indexes: int, snapshot: str = SNAPSHOT, **changes: Any) -> VmRecord:
    """A VM that runs on the overlays of its last snapshot."""
    disks = [make_disk_record(index, active=overlay(index, snapshot)) for index in indexes]
    return make_record(disks, **{"parent": snapshot, **changes})


def two_disks() -> Manifest:
    return make_manifest([make_part(0), make_part(1)])


def plan_of(
    manifest: Manifest,
    record: VmRecord,
    request: RestoreRequest | None = None,
    found: Found | None = None,
) -> RestorePlan:
    found = found or make_found(manifest, record)
    return plan_restore(manifest, record, found, request or RestoreRequest(), LEFT)


# --- differences ---------------------------------------------------------------------------------

Differ = Callable[[Found], Found]


def seen(index: int, **changes: Any) -> Differ:
    """The image of a disk is seen as something else than was recorded."""
    path = disk_path(index)

    def differ(found: Found) -> Found:
        now = replace(found.identities[path], **changes)
        return replace(found, identities={**found.identities, path: now})

    return differ


def gone(index: int) -> Differ:
    def differ(found: Found) -> Found:
        kept = {path: seen for path, seen in found.identities.items() if path != disk_path(index)}
        return replace(found, identities=kept)

    return differ


def state_seen(**changes: Any) -> Differ:
    return lambda found: replace(found, state=replace(make_state().identity, **changes))


def defined(*definition: tuple[str, str]) -> Differ:
    return lambda found: replace(found, definition=definition)


EXCHANGED: Differ = lambda found: replace(  # noqa: E731 - a row of the table below
    found,
    identities={
        disk_path(0): found.identities[disk_path(1)],
        disk_path(1): found.identities[disk_path(0)],
    },
)

IMAGE_DIFFERENCES: dict[str, tuple[Differ, ImageChange]] = {
    "device and inode": (seen(1, device=8, inode=555), "replaced"),
    "inode": (seen(1, inode=555), "replaced"),
    "format": (seen(1, format="raw"), "replaced"),
    "virtual size": (seen(1, virtual_size_bytes=GIB), "resized"),
    "size": (seen(1, size_bytes=1), "written"),
    "mtime": (seen(1, mtime_ns=5), "written"),
    "L1 table": (seen(1, l1_digest="other"), "written"),
    "header": (seen(1, header_digest="other"), "header"),
    "snapshot table": (seen(1, snapshots_digest="other"), "snapshots"),
    "ctime": (seen(1, ctime_ns=5), "touched"),
}

DIFFERENCES: dict[str, tuple[Differ, list[tuple[str, str, str]]]] = {
    **{
        name: (differ, [(change, "disk1", disk_path(1))])
        for name, (differ, change) in IMAGE_DIFFERENCES.items()
    },
    "image missing": (gone(1), [("missing", "disk1", f"{disk_path(1)} is missing")]),
    "images exchanged": (
        EXCHANGED,
        [
            ("swapped", "disk0", f"{disk_path(0)} is the image of disk 'disk1'"),
            ("swapped", "disk1", f"{disk_path(1)} is the image of disk 'disk0'"),
        ],
    ),
    "state missing": (
        lambda found: replace(found, state=None),
        [("missing", "machine state", "'machine-state' is missing")],
    ),
    "state written": (state_seen(size_bytes=1), [("written", "machine state", "1 bytes")]),
    "state replaced": (state_seen(inode=1), [("replaced", "machine state", "another file")]),
    "memory": (
        defined(DEFINITION[0], ("machine.memory.size", "2"), DEFINITION[2]),
        [("definition", "machine.memory.size", f"is '2' now, the snapshot has '{GIB}'")],
    ),
    "machine": (
        defined(("machine.type", "pc"), *DEFINITION[1:]),
        [("definition", "machine.type", "-machine.type is 'pc' now, the snapshot has 'q35'")],
    ),
    "a device more": (
        defined(*DEFINITION, ("device", "driver=usb-tablet")),
        [("definition", "device", "id=d0' and 'driver=usb-tablet' now, the snapshot has 'driver")],
    ),
    "a device fewer": (
        defined(*DEFINITION[:2]),
        [("definition", "device", "is absent now, the snapshot has 'driver=virtio-blk-pci,id=d0'")],
    ),
    "another device": (
        defined(*DEFINITION[:2], ("device", "driver=nvme,id=d0")),
        [("definition", "device", "is 'driver=nvme,id=d0' now")],
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_named_with_its_subject(name: str) -> None:
    differ, expected = DIFFERENCES[name]
    manifest, record = two_disks(), on_overlays(0, 1)
    plan = plan_of(manifest, record, found=differ(make_found(manifest, record)))
    assert [(each.kind, each.subject) for each in plan.mismatches] == [
        (kind, subject) for kind, subject, _ in expected
    ]
    for mismatch, (_, _, words) in zip(plan.mismatches, expected, strict=True):
        assert words in mismatch.text


def test_every_way_in_which_an_image_can_differ_is_in_the_table() -> None:
    assert {change for _, change in IMAGE_DIFFERENCES.values()} == set(get_args(ImageChange))
    kinds = {kind for _, rows in DIFFERENCES.values() for kind, _, _ in rows} | {"extra"}
    assert kinds == set(get_args(Mismatch.__annotations__["kind"]))


def test_of_several_differences_of_one_image_the_gravest_is_named() -> None:
    manifest, record = two_disks(), on_overlays(0, 1)
    differ = seen(0, inode=555, size_bytes=1, ctime_ns=9)
    plan = plan_of(manifest, record, found=differ(make_found(manifest, record)))
    assert [mismatch.kind for mismatch in plan.mismatches] == ["replaced"]


@pytest.mark.parametrize("differ", [seen(1, device=8), state_seen(device=8)])
def test_a_new_device_number_alone_is_no_difference(differ: Differ) -> None:
    manifest, record = two_disks(), on_overlays(0, 1)
    assert plan_of(manifest, record, found=differ(make_found(manifest, record))).mismatches == ()


@pytest.mark.parametrize(
    ("differ", "remaining"),
    [
        (seen(0, ctime_ns=9), []),
        (state_seen(ctime_ns=9), []),
        (seen(0, ctime_ns=9, size_bytes=1), ["written"]),
        (seen(0, ctime_ns=9, inode=555), ["replaced"]),
        (gone(0), ["missing"]),
        (EXCHANGED, ["swapped", "swapped"]),
    ],
)
def test_only_a_touch_can_be_accepted(differ: Differ, remaining: list[str]) -> None:
    manifest, record = two_disks(), on_overlays(0, 1)
    found = differ(make_found(manifest, record))
    plan = plan_of(manifest, record, RestoreRequest(accept_touched=True), found)
    assert [mismatch.kind for mismatch in plan.mismatches] == remaining
    assert plan_of(manifest, record, found=found).mismatches


@pytest.mark.parametrize("kind", ["external", "internal", "skip"])
@pytest.mark.parametrize("moved_on", [False, True])
def test_what_has_not_changed_differs_in_nothing(kind: Any, moved_on: bool) -> None:
    manifest = make_manifest([make_part(0, kind), make_part(1)])
    record = on_overlays(0, 1) if moved_on else make_record([make_disk_record(i) for i in range(2)])
    assert plan_of(manifest, record).mismatches == ()


def test_all_differences_are_named_at_once() -> None:
    manifest = make_manifest([make_part(0), make_part(1), make_part(2, "internal"), make_part(3)])
    record = on_overlays(0, 1, 2, 4)
    found = make_found(manifest, record, internal={}, state=None)
    for differ in (
        defined(("machine.type", "pc"), DEFINITION[2]),
        gone(0),
        seen(1, virtual_size_bytes=1),
    ):
        found = differ(found)
    mismatches = plan_of(manifest, record, found=found).mismatches
    assert sorted((mismatch.kind, mismatch.subject) for mismatch in mismatches) == [
        ("definition", "machine.memory.size"),
        ("definition", "machine.type"),
        ("extra", "disk4"),
        ("missing", "disk0"),
        ("missing", "disk2"),
        ("missing", "disk3"),
        ("missing", "machine state"),
        ("resized", "disk1"),
    ]


def test_a_disk_that_the_vm_no_longer_has_is_missing() -> None:
    (mismatch,) = plan_of(two_disks(), on_overlays(0)).mismatches
    assert (mismatch.kind, mismatch.subject) == ("missing", "disk1")
    assert f"({disk_path(1)}) is missing from the VM" in mismatch.text


def test_a_disk_that_the_vm_did_not_have_then_is_extra() -> None:
    (mismatch,) = plan_of(make_manifest(), on_overlays(0, 1)).mismatches
    assert (mismatch.kind, mismatch.subject) == ("extra", "disk1")
    assert "was not there when the snapshot was taken" in mismatch.text


def test_an_additional_disk_does_not_creep_in_by_an_equal_name() -> None:
    disk = make_disk_record(0, origin=Image("/vm/another.qcow2", "qcow2"))
    plan = plan_of(make_manifest(), make_record([disk]))
    assert [mismatch.kind for mismatch in plan.mismatches] == ["missing", "extra"]
    assert {mismatch.subject for mismatch in plan.mismatches} == {"disk0"}


def test_disks_in_another_order_are_swapped() -> None:
    first, second = make_disk_record(0), make_disk_record(1)
    record = make_record([
        replace(first, origin=second.origin, active=second.active),
        replace(second, origin=first.origin, active=first.active),
    ])  # fmt: skip
    (mismatch,) = plan_of(two_disks(), record).mismatches
    assert (mismatch.kind, mismatch.subject) == ("swapped", "disks")


@pytest.mark.parametrize(
    ("digest", "kind", "words"),
    [
        (None, "missing", f"no longer holds 'calotype-{SNAPSHOT}'"),
        ("another entry", "snapshots", "the snapshot inside /vm/disk0.qcow2 has changed"),
    ],
)
def test_an_internal_snapshot_is_known_by_its_digest(
    digest: str | None, kind: str, words: str
) -> None:
    manifest, record = make_manifest([make_part(0, "internal")]), make_record()
    internal = {(disk_path(0), f"calotype-{SNAPSHOT}"): digest} if digest else {}
    found = make_found(manifest, record, internal=internal)
    (mismatch,) = plan_of(manifest, record, found=found).mismatches
    assert (mismatch.kind, mismatch.subject) == (kind, "disk0")
    assert words in mismatch.text


def test_an_image_in_the_middle_of_a_chain_is_compared_too() -> None:
    layers = tuple(make_layer(f"/vm/{name}.qcow2", at) for at, name in enumerate(["top", "base"]))
    manifest = make_manifest([make_part(0, layers=layers)])
    record = on_overlays(0)
    found = make_found(manifest, record)
    written = {**found.identities, "/vm/base.qcow2": replace(layers[1].identity, mtime_ns=7)}
    (mismatch,) = plan_of(manifest, record, found=replace(found, identities=written)).mismatches
    assert (mismatch.kind, mismatch.subject) == ("written", "disk0")
    assert "/vm/base.qcow2" in mismatch.text


def test_two_disks_may_stand_on_one_base() -> None:
    base = make_layer("/vm/base.qcow2", 50)
    parts = [
        make_part(index, layers=(make_layer(disk_path(index), 100 + index), base))
        for index in range(2)
    ]
    assert plan_of(make_manifest(parts), on_overlays(0, 1)).mismatches == ()


def test_a_skipped_disk_may_have_changed() -> None:
    manifest = make_manifest([make_part(0), make_part(1, "skip")])
    record = on_overlays(0, 1)
    found = gone(1)(make_found(manifest, record))
    assert plan_of(manifest, record, found=found).mismatches == ()


def test_a_snapshot_without_a_machine_state_needs_none() -> None:
    manifest = make_manifest(machine_state=None)
    assert plan_of(manifest, on_overlays(0)).mismatches == ()


def test_a_newest_image_that_is_gone_is_named() -> None:
    manifest, record = make_manifest(), on_overlays(0)
    plan = plan_of(manifest, record, found=make_found(manifest, record, modes={}))
    assert overlay(0, SNAPSHOT).path in " ".join(mismatch.text for mismatch in plan.mismatches)


def test_a_newest_image_that_is_gone_and_not_wanted_is_in_nobodys_way() -> None:
    manifest, record = make_manifest(), on_overlays(0)
    found = make_found(manifest, record, modes={})
    plan = plan_of(manifest, record, RestoreRequest(discard_current=True), found)
    assert plan.mismatches == ()


def test_disks_that_have_moved_on_the_command_line_are_told_apart() -> None:
    """A read-only image named first moves each disk on by one place."""
    manifest = two_disks()
    record = make_record([
        make_disk_record(place, origin=Image(path, "qcow2"), active=Image(path, "qcow2"))
        for place, path in ((1, disk_path(0)), (2, disk_path(1)))
    ])  # fmt: skip
    plan = plan_of(manifest, record)
    created = [step for step in plan.steps if isinstance(step, CreateOverlay)]
    is_each_on_its_own = [step.overlay.startswith(step.backing.path) for step in created]
    assert plan.mismatches or is_each_on_its_own == [True, True]


# --- steps ---------------------------------------------------------------------------------------


def kinds_of(plan: RestorePlan) -> list[type[Step]]:
    return [type(step) for step in plan.steps]


def only(plan: RestorePlan, kind: type[Any]) -> Any:
    (step,) = (step for step in plan.steps if isinstance(step, kind))
    return step


def test_an_external_disk_gets_a_new_overlay_over_the_frozen_image() -> None:
    plan = plan_of(make_manifest(), on_overlays(0))
    assert only(plan, CreateOverlay) == CreateOverlay(
        overlay(0, LEFT).path, Image(disk_path(0), "qcow2"), 10 * GIB
    )
    assert plan.active == {0: overlay(0, LEFT)}


def test_an_internal_disk_that_is_still_on_its_holder_goes_back_in_place() -> None:
    plan = plan_of(make_manifest([make_part(0, "internal")]), make_record())
    step = only(plan, ApplyInside)
    assert step == ApplyInside(
        Image(disk_path(0), "qcow2"), f"calotype-{SNAPSHOT}", f"calotype-{LEFT}"
    )
    assert plan.active == {0: Image(disk_path(0), "qcow2")}


def test_an_internal_disk_whose_holder_is_frozen_is_extracted() -> None:
    plan = plan_of(make_manifest([make_part(0, "internal")]), on_overlays(0, snapshot=OTHER))
    step = only(plan, ExtractInside)
    assert step == ExtractInside(
        Image(disk_path(0), "qcow2"), f"calotype-{SNAPSHOT}", overlay(0, LEFT).path
    )
    assert plan.active == {0: overlay(0, LEFT)}


def test_a_skipped_disk_stays_on_its_newest_content() -> None:
    manifest = make_manifest([make_part(0), make_part(1, "skip")])
    plan = plan_of(manifest, on_overlays(0, 1, snapshot=OTHER))
    assert plan.active == {0: overlay(0, LEFT), 1: overlay(1, OTHER)}
    assert only(plan, CreateOverlay).overlay == overlay(0, LEFT).path
    assert list(only(plan, FreezeImages).modes_before) == [overlay(0, OTHER).path]


def mixed(request: RestoreRequest | None = None, **changes: Any) -> RestorePlan:
    """One external disk, one to be extracted, one to go back in place and one skipped."""
    parts = [make_part(0), make_part(1, "internal"), make_part(2, "internal"), make_part(3, "skip")]
    disks = [make_disk_record(i, active=overlay(i, OTHER)) for i in range(2)]
    disks += [make_disk_record(i) for i in (2, 3)]
    return plan_of(make_manifest(parts, **changes), make_record(disks, parent=OTHER), request)


def test_the_steps_come_in_the_one_sound_order() -> None:
    assert kinds_of(mixed()) == [
        CreateOverlay,
        ExtractInside,
        ApplyInside,
        StartQemu,
        CheckTopology,
        LoadState,
        MakeSnapshotFolder,
        FreezeImages,
        CommitLeftBehind,
        RecordRestored,
        LetRun,
    ]
    assert kinds_of(mixed(RestoreRequest(discard_current=True))) == [
        CreateOverlay,
        ExtractInside,
        ApplyInside,
        StartQemu,
        CheckTopology,
        LoadState,
        RecordRestored,
        LetRun,
        DiscardImages,
    ]


@pytest.mark.parametrize(
    ("recorded", "asked", "run_state", "starts", "lets_run"),
    [
        ("running", "saved", "running", True, True),
        ("running", "paused", "paused", True, False),
        ("paused", "saved", "paused", True, False),
        ("paused", "running", "running", True, True),
        ("off", "saved", "off", False, False),
        ("off", "running", "running", True, True),
        ("off", "paused", "paused", True, False),
    ],
)
def test_the_run_state_is_the_saved_one_unless_asked_otherwise(
    recorded: Any, asked: Any, run_state: str, starts: bool, lets_run: bool
) -> None:
    state = None if recorded == "off" else make_state()
    plan = mixed(RestoreRequest(asked), run_state=recorded, machine_state=state)
    kinds = kinds_of(plan)
    assert plan.run_state == run_state
    assert (StartQemu in kinds, CheckTopology in kinds) == (starts, starts)
    assert (LoadState in kinds) == (starts and recorded != "off")
    assert (LetRun in kinds) == lets_run


def test_qemu_starts_on_the_new_images_and_the_recorded_machine() -> None:
    plan = mixed()
    assert only(plan, StartQemu) == StartQemu(plan.active, incoming=True, machine="pc-q35-10.0")
    assert only(plan, LoadState) == LoadState(SNAPSHOT, "machine-state")
    assert only(plan, CheckTopology).expected == make_manifest().topology


def test_without_a_machine_state_qemu_boots() -> None:
    plan = mixed(machine_state=None)
    assert not only(plan, StartQemu).incoming
    assert LoadState not in kinds_of(plan)


def test_without_a_topology_the_machine_is_the_command_lines_own() -> None:
    plan = mixed(topology=None)
    assert only(plan, StartQemu).machine == ""
    assert CheckTopology not in kinds_of(plan)


def test_the_record_descends_from_the_snapshot_and_knows_the_way_back() -> None:
    plan = mixed()
    step = only(plan, RecordRestored)
    assert (step.parent, step.parent_before) == (SNAPSHOT, OTHER)
    assert step.active == plan.active
    assert step.active_before[0] == overlay(0, OTHER)
    assert step.active_before.keys() == plan.active.keys() == {0, 1, 2, 3}


def test_what_is_left_behind_is_kept_as_a_snapshot() -> None:
    plan = mixed()
    assert (plan.left_behind, plan.keeps_left_behind) == (LEFT, True)
    assert only(plan, MakeSnapshotFolder).snapshot == only(plan, CommitLeftBehind).snapshot == LEFT
    assert only(plan, FreezeImages).modes_before == {
        overlay(0, OTHER).path: 0o640, overlay(1, OTHER).path: 0o640,
    }  # fmt: skip


def test_what_is_not_wanted_is_neither_frozen_nor_kept() -> None:
    plan = mixed(RestoreRequest(discard_current=True))
    assert not plan.keeps_left_behind
    assert not {MakeSnapshotFolder, FreezeImages, CommitLeftBehind} & set(kinds_of(plan))
    assert only(plan, DiscardImages) == DiscardImages(
        (overlay(0, OTHER).path, overlay(1, OTHER).path),
        ((Image(disk_path(2), "qcow2"), f"calotype-{LEFT}"),),
    )


def test_every_name_derives_from_the_ids() -> None:
    manifest, record = two_disks(), on_overlays(0, 1, snapshot=OTHER)
    one, other = (
        msgspec.json.encode(
            plan_restore(manifest, record, make_found(manifest, record), RestoreRequest(), left)
        )
        for left in (LEFT, "00000000000000c2")
    )
    assert one.replace(LEFT.encode(), b"00000000000000c2") == other


# --- what is discarded ---------------------------------------------------------------------------

DISCARD = RestoreRequest(discard_current=True)


@pytest.mark.parametrize(
    ("active", "is_discarded"),
    [
        (overlay(0, OTHER).path, True),
        (disk_path(0), False),
        ("/vm/disk0.qcow2.backup.qcow2", False),
        ("/vm/disk0.qcow2.abc.qcow2", False),
        ("/vm/disk0.qcow2.00000000000000B2.qcow2", False),
        (overlay(1, OTHER).path, False),
        ("/vm/disk0.00000000000000b2.qcow2", False),
        ("/vm/disk0.qcow2.00000000000000b2", False),
    ],
)
def test_only_an_overlay_of_ours_for_that_very_disk_is_discarded(
    active: str, is_discarded: bool
) -> None:
    manifest = make_manifest([make_part(0)])
    record = make_record([make_disk_record(0, active=Image(active, "qcow2"))])
    found = make_found(manifest, record, kept_paths=frozenset())
    assert only(plan_of(manifest, record, DISCARD, found), DiscardImages).paths == (
        (active,) if is_discarded else ()
    )


def test_what_a_snapshot_stands_on_is_not_discarded() -> None:
    manifest, record = make_manifest(), on_overlays(0, snapshot=OTHER)
    found = make_found(manifest, record, kept_paths=frozenset({overlay(0, OTHER).path}))
    assert only(plan_of(manifest, record, DISCARD, found), DiscardImages).paths == ()


def test_the_image_that_holds_an_internal_snapshot_is_not_discarded(tmp_path: Path) -> None:
    """An overlay of the first snapshot holds the second one; going back to the first keeps it."""
    origin = tmp_path / "disk0.raw"
    newest = Path(names.overlay_path(str(origin), SNAPSHOT))
    for path in (origin, newest):
        path.write_bytes(bytes(1024))
    below, holder = Image(str(origin), "raw"), Image(str(newest), "raw")
    layers = (make_layer(str(origin), format="raw"),)
    record = make_record([make_disk_record(0, origin=below, active=holder)], parent=OTHER)
    first = make_manifest([make_part(0, origin=below, image=below, layers=layers)])
    second = make_manifest(
        [make_part(0, "internal", OTHER, origin=below, image=holder, layers=layers)],
        id=OTHER,
        parent=SNAPSHOT,
    )
    store = Store(tmp_path / "store")
    store.make_vm_folder(record.id)
    store.save(record)
    for manifest in (first, second):
        store.make_snapshot_folder(record.id, manifest.id)
        store.commit(manifest)
    found = finding.find(store, record, first, first.definition)
    assert only(plan_of(first, record, DISCARD, found), DiscardImages).paths == ()


def active_paths(index: int) -> list[str]:
    """What a disk may be on: images of ours for it, for its neighbour, and the user's own."""
    own = [disk_path(index), f"{disk_path(index)}.old.qcow2", "/dev/vg/one"]
    ours = [overlay(index, SNAPSHOT), overlay(index, OTHER), overlay(index + 1, OTHER)]
    return own + [image.path for image in ours]


@st.composite
def any_restore(draw: st.DrawFn) -> tuple[Manifest, VmRecord, Found, RestoreRequest]:
    """A snapshot and a VM that may or may not fit it, and an active image of any kind."""
    indexes = range(draw(st.integers(0, 3)))
    some = st.sampled_from
    parts = [
        make_part(index, draw(some(["external", "internal", "skip"])))
        for index in indexes
        if draw(some([True, True, True, False]))
    ]
    disks = [
        make_disk_record(index, active=Image(draw(some(paths)), draw(some(["raw", "qcow2"]))))
        for index in indexes
        for paths in [active_paths(index)]
    ]
    manifest = make_manifest(
        parts,
        run_state=draw(some(["running", "paused", "off"])),
        machine_state=draw(some([None, make_state()])),
        topology=draw(some([None, make_manifest().topology])),
    )
    record = make_record(disks)
    inodes, times = some([100, 101, 7]), some([1, 1000])
    seen_now: dict[str, Identity] = {
        disk_path(index): make_identity(draw(inodes), mtime_ns=draw(times))
        for index in indexes
        if draw(st.booleans())
    }
    found = make_found(
        manifest,
        record,
        identities=seen_now,
        state=draw(some([None, make_state().identity])),
        definition=draw(some([(), DEFINITION, DEFINITION[:1], (*DEFINITION, DEFINITION[0])])),
        kept_paths=draw(st.frozensets(some([disk.active.path for disk in disks] or [""]))),
    )
    request = RestoreRequest(draw(some(["saved", "running", "paused"])), draw(st.booleans()))
    return manifest, record, found, request


@given(any_restore())
@settings(max_examples=100, deadline=None)
def test_whatever_is_there_nothing_is_lost_and_planning_never_raises(
    case: tuple[Manifest, VmRecord, Found, RestoreRequest],
) -> None:
    manifest, record, found, request = case
    plan = plan_restore(manifest, record, found, request, LEFT)
    assert plan == plan_restore(manifest, record, found, request, LEFT)
    kinds = kinds_of(plan)
    assert kinds.count(RecordRestored) == 1
    for first, then in (
        (StartQemu, LoadState),
        (CheckTopology, LoadState),
        (LoadState, CommitLeftBehind),
        (FreezeImages, CommitLeftBehind),
        (CommitLeftBehind, RecordRestored),
        (RecordRestored, LetRun),
        (RecordRestored, DiscardImages),
        (LetRun, DiscardImages),
    ):
        assert first not in kinds or then not in kinds or kinds.index(first) < kinds.index(then)
    origins = {disk.active.path: disk.origin.path for disk in record.disks}
    for step in plan.steps:
        if isinstance(step, DiscardImages):
            assert step is plan.steps[-1]
            for path in step.paths:
                assert names.is_overlay_of(path, origins[path])
                assert path not in origins.values()
                assert path not in found.kept_paths
                assert path not in {image.path for image in plan.active.values()}
            assert all(name == f"calotype-{LEFT}" for _, name in step.inside)
        if isinstance(step, CreateOverlay | ExtractInside):
            made = step.overlay if isinstance(step, CreateOverlay) else step.copy
            assert made not in origins
            assert LEFT in made


# --- the guest's clock ---------------------------------------------------------------------------


CLOCKS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "all is well": ({}, {}, {}, ""),
    "no machine state": ({"machine_state": None}, {}, {}, "has no machine state"),
    "to be paused": ({}, {"run_state": "paused"}, {}, "the guest is to be paused"),
    "was paused": ({"run_state": "paused"}, {}, {}, "the guest is to be paused"),
    "no port": ({}, {}, {"problem": "no port", "remedy": "give it one"}, "no port"),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_a_clock_is_set_by_an_agent_in_a_guest_that_runs(name: str) -> None:
    changes, asked, agent, problem = CLOCKS[name]
    manifest, record = make_manifest(**changes), make_record()
    found = make_found(manifest, record, agent=make_agent(**agent))
    request = RestoreRequest(sync_time=True, **asked)
    plan = plan_restore(manifest, record, found, request, OTHER)
    assert all(problem in each.problem and each.remedy for each in plan.blockers)
    assert bool(plan.blockers) == bool(problem)
    if not problem:
        place = plan.steps.index(LetRun())
        assert plan.steps[place + 1] == SetClock("/vm/agent.sock")


def test_a_clock_is_left_alone_unless_that_is_asked_for() -> None:
    manifest, record = make_manifest(), make_record()
    found = make_found(manifest, record)
    plan = plan_restore(manifest, record, found, RestoreRequest(), OTHER)
    assert plan.blockers == ()
    assert not [step for step in plan.steps if isinstance(step, SetClock)]

"""Manifests: composed of what was planned and found, kept as bytes that are equal if they are."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from builders import (
    DEFINITION,
    GIB,
    OTHER,
    SNAPSHOT,
    VM_ID,
    disk_path,
    make_disk,
    make_disk_record,
    make_facts,
    make_layer,
    make_manifest,
    make_migration,
    make_outcome,
    make_part,
    make_record,
    make_state,
    make_topology,
)
from calotype.model import names
from calotype.model.snapshot import Manifest, StorageKind, StoragePart, Timings
from calotype.model.vm import Facts, Image, ReadOnlyDisk, VmRecord
from calotype.plan.compose import Outcome, compose_left_behind, compose_taken
from calotype.plan.steps import CommitLeftBehind
from calotype.plan.take import plan_take
from calotype.plan.take_plan import TakeRequest
from calotype.store.store import Store

LEFT = "00000000000000c1"
BASE = make_layer("/vm/base.qcow2", 50)


def taken(
    facts: Facts | None = None,
    outcome: Outcome | None = None,
    request: TakeRequest | None = None,
    record: VmRecord | None = None,
) -> Manifest:
    facts = facts or make_facts()
    record = record or make_record([make_disk_record(disk.index) for disk in facts.disks])
    plan = plan_take(facts, record, request or TakeRequest(), SNAPSHOT)
    return compose_taken(
        plan, facts, record, DEFINITION, "a tag", "some text", outcome or make_outcome()
    )


def three_kinds() -> Manifest:
    """An external, an internal and a skipped disk; the first two stand on a common base."""
    kinds: dict[str, StorageKind] = {"disk1": "internal", "disk2": "skip"}
    chains = {index: (make_layer(disk_path(index), 100 + index), BASE) for index in range(3)}
    return taken(
        make_facts([make_disk(index) for index in range(3)]),
        make_outcome(chains=chains, internal={1: ("7", "digest of the entry")}),
        TakeRequest(disks=kinds),
    )


# --- taken ---------------------------------------------------------------------------------------


def test_a_manifest_says_whose_it_is_and_what_it_was_taken_of() -> None:
    record = make_record(parent=OTHER)
    manifest = taken(record=record)
    assert (manifest.id, manifest.parent) == (SNAPSHOT, OTHER)
    assert (manifest.tag, manifest.description) == ("a tag", "some text")
    assert (manifest.vm_id, manifest.vm_name) == (VM_ID, "web")
    assert (manifest.argv, manifest.cwd) == (record.argv, record.cwd)
    assert (manifest.definition, manifest.topology) == (DEFINITION, make_topology())
    assert (manifest.qemu_version, manifest.instant) == ((10, 0, 0), make_outcome().instant)


@pytest.mark.parametrize(
    ("stop_us", "resume_us", "pause_ms"),
    [
        (1_000_000, 1_012_500, 12.5),
        (1_700_000_000_000_000, 1_700_000_000_000_001, 0.001),
        (None, None, None),
        (1_000_000, None, None),
        (None, 1_000_000, None),
        (0, 0, 0.0),
    ],
)
def test_the_pause_is_stop_to_resume_by_qemus_own_stamps(
    stop_us: int | None, resume_us: int | None, pause_ms: float | None
) -> None:
    outcome = make_outcome(stop_us=stop_us, resume_us=resume_us, total_ms=77.0)
    manifest = taken(outcome=outcome)
    assert manifest.timings == Timings(pause_ms, 77.0, outcome.phases_ms)


@pytest.mark.parametrize(
    ("run_state", "recorded"),
    [
        ("running", "running"),
        ("paused", "paused"),
        ("prelaunch", "paused"),
        ("postmigrate", "paused"),
    ],
)
def test_the_run_state_is_the_one_before_the_instant(run_state: str, recorded: str) -> None:
    assert taken(make_facts(run_state=run_state)).run_state == recorded


@pytest.mark.parametrize(
    ("request_", "capabilities", "method"),
    [
        (TakeRequest(), {"mapped-ram": False, "background-snapshot": False}, "live"),
        (TakeRequest(), {"background-snapshot": False}, "live"),
        (TakeRequest(method="paused"), {"mapped-ram": False}, "paused"),
        (TakeRequest("none"), {}, "storage-only"),
    ],
)
def test_the_method_is_recorded_without_the_ways_of_one_qemu(
    request_: TakeRequest, capabilities: dict[str, bool], method: str
) -> None:
    facts = make_facts(migration=make_migration(capabilities=capabilities))
    assert taken(facts, request=request_).method == method


def test_the_machine_state_counts_as_bytes_written() -> None:
    assert taken().bytes_written == make_state().identity.size_bytes
    assert taken(outcome=make_outcome(machine_state=None)).bytes_written == 0


def test_each_disk_is_a_part_with_all_that_a_restore_compares() -> None:
    external, internal, skipped = three_kinds().storage
    assert external == StoragePart(
        index=0,
        disk="disk0",
        qdev="/machine/peripheral/d0/virtio-backend",
        kind="external",
        reason="default: an overlay is quick at any size",
        origin=Image(disk_path(0), "qcow2"),
        layers=(make_layer(disk_path(0), 100), BASE),
        virtual_size_bytes=10 * GIB,
        image=Image(disk_path(0), "qcow2"),
    )
    assert internal.kind == "internal"
    assert internal.layers == (BASE,), "the holder itself is written on"
    assert internal.image == Image(disk_path(1), "qcow2")
    assert internal.internal_id == "7"
    assert internal.internal_name == f"calotype-{SNAPSHOT}"
    assert internal.internal_digest == "digest of the entry"
    assert (skipped.kind, skipped.image, skipped.layers) == ("skip", None, ())
    assert skipped.reason.startswith("asked for")


def test_a_part_holds_the_frozen_image_and_the_users_own_name_for_the_disk() -> None:
    active = Image(names.overlay_path(disk_path(0), OTHER), "qcow2")
    chain = (make_layer(active.path, 300), make_layer(disk_path(0), 100))
    (part,) = taken(make_facts([make_disk(image=active)]), make_outcome(chains={0: chain})).storage
    assert part.image == active
    assert part.origin == Image(disk_path(0), "qcow2")
    assert part.layers == chain


def test_read_only_storage_is_not_a_part() -> None:
    manifest = taken(make_facts(read_only=(ReadOnlyDisk("cd", "/vm/cd.iso"),)))
    assert [part.disk for part in manifest.storage] == ["disk0"]


# --- left behind ---------------------------------------------------------------------------------


def left(
    restored: Manifest, record: VmRecord, active: dict[int, Image], **changes: Any
) -> Manifest:
    before = {disk.index: disk.active for disk in record.disks}
    step = CommitLeftBehind(LEFT, restored.id, active, before, record.parent, "running")
    defaults: dict[str, Any] = {"machine_state": None}
    outcome = make_outcome(
        stop_us=None, resume_us=None,
        chains={
            disk.index: (make_layer(disk.active.path, 300 + disk.index), BASE)
            for disk in record.disks
        },
        **(defaults | changes),
    )  # fmt: skip
    return compose_left_behind(step, restored, record, DEFINITION, outcome)


def fresh(index: int) -> Image:
    return Image(names.overlay_path(disk_path(index), LEFT), "qcow2")


def test_what_is_left_behind_has_no_machine_state_and_was_off() -> None:
    record = make_record(parent=OTHER)
    manifest = left(make_manifest(), record, {0: fresh(0)})
    assert (manifest.id, manifest.parent) == (LEFT, OTHER)
    assert (manifest.method, manifest.run_state) == ("left-behind", "off")
    assert (manifest.machine_state, manifest.timings.pause_ms) == (None, None)
    assert manifest.tag == ""
    assert SNAPSHOT in manifest.description


def test_what_is_left_behind_with_a_machine_state_ran() -> None:
    state = make_manifest().machine_state
    assert state is not None
    manifest = left(make_manifest(), make_record(), {0: fresh(0)}, machine_state=state)
    assert (manifest.machine_state, manifest.run_state) == (state, "running")


def test_the_image_that_was_left_is_an_external_part() -> None:
    active = Image(names.overlay_path(disk_path(0), OTHER), "qcow2")
    record = make_record([make_disk_record(0, active=active)])
    (part,) = left(make_manifest(), record, {0: fresh(0)}).storage
    assert (part.kind, part.image) == ("external", active)
    assert [layer.path for layer in part.layers] == [active.path, BASE.path]
    assert (part.internal_name, part.internal_digest) == ("", "")


def test_content_that_was_left_in_place_is_an_internal_part() -> None:
    record = make_record()
    restored = make_manifest([make_part(0, "internal")])
    active = {0: record.disks[0].active}
    (part,) = left(restored, record, active, internal={0: ("9", "its entry")}).storage
    assert (part.kind, part.image) == ("internal", Image(disk_path(0), "qcow2"))
    assert part.layers == (BASE,)
    assert (part.internal_id, part.internal_digest) == ("9", "its entry")
    assert part.internal_name == f"calotype-{LEFT}"


def test_a_disk_that_the_restore_skipped_is_skipped_in_what_it_left() -> None:
    record = make_record([make_disk_record(0), make_disk_record(1)])
    restored = make_manifest([make_part(0), make_part(1, "skip")])
    manifest = left(restored, record, {0: fresh(0), 1: record.disks[1].active})
    assert [part.kind for part in manifest.storage] == ["external", "skip"]


# --- as bytes ------------------------------------------------------------------------------------


def every_manifest() -> list[Manifest]:
    return [
        three_kinds(),
        left(make_manifest(), make_record(), {0: fresh(0)}),
        make_manifest(topology=None, machine_state=None, tag="Grüße ☃", description='"\\\n\0'),
    ]


@pytest.mark.parametrize("manifest", every_manifest(), ids=["taken", "left behind", "sparse"])
def test_a_manifest_comes_back_from_its_file_as_it_was(tmp_path: Path, manifest: Manifest) -> None:
    assert kept(tmp_path, manifest)
    assert Store(tmp_path).manifest(manifest.vm_id, manifest.id) == manifest


def kept(root: Path, manifest: Manifest) -> bytes:
    """The bytes of a manifest as the store keeps it."""
    store = Store(root)
    store.make_vm_folder(manifest.vm_id)
    store.save(make_record())
    store.make_snapshot_folder(manifest.vm_id, manifest.id)
    store.commit(manifest)
    return (store.snapshot_folder(manifest.vm_id, manifest.id) / "manifest.json").read_bytes()


def test_equal_manifests_are_equal_bytes(tmp_path: Path) -> None:
    phases = {"PassInstant": 20.0, "AwaitSave": 1400.0, "Commit": 3.0}
    orders = (phases, dict(reversed(phases.items())))
    one, other = (make_manifest(timings=Timings(12.5, 1500.0, order)) for order in orders)
    assert list(one.timings.phases_ms) != list(other.timings.phases_ms)
    assert kept(tmp_path / "one", one) == kept(tmp_path / "other", other)


def test_other_manifests_are_other_bytes(tmp_path: Path) -> None:
    one, other = make_manifest(), make_manifest(tag="x")
    assert kept(tmp_path / "one", one) != kept(tmp_path / "other", other)


def test_the_members_of_a_manifest_are_in_order_at_every_depth(tmp_path: Path) -> None:
    def check(members: list[tuple[str, Any]]) -> dict[str, Any]:
        assert [name for name, _ in members] == sorted(name for name, _ in members)
        return dict(members)

    json.loads(kept(tmp_path, three_kinds()), object_pairs_hook=check)


def test_a_manifest_says_of_which_format_it_is() -> None:
    assert msgspec.to_builtins(make_manifest())["format"] == 1

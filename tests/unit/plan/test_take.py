"""The plan of a take: what each disk gets, what is in the way, what it costs, and the steps."""

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings
from msgspec.structs import replace

from builders import (
    GIB,
    OTHER,
    SNAPSHOT,
    make_agent,
    make_disk,
    make_disk_record,
    make_facts,
    make_host,
    make_migration,
    make_record,
    make_topology,
)
from calotype.model import names
from calotype.model.snapshot import StorageKind
from calotype.model.vm import (
    Bitmap,
    DiskFacts,
    Export,
    Facts,
    Image,
    ReadOnlyDisk,
    Stray,
    VmRecord,
)
from calotype.plan import blockers, take
from calotype.plan.steps import (
    AwaitSave,
    CloseState,
    Commit,
    CreateOverlay,
    FlushImages,
    FreezeFileSystems,
    FreezeImages,
    MakeSnapshotFolder,
    OpenOverlay,
    OpenState,
    PassInstant,
    PutBackMigration,
    RecordAhead,
    SetMigration,
    SnapshotInside,
    Step,
    SwitchToOverlay,
    ThawFileSystems,
    qmp_action,
)
from calotype.plan.take import plan_take
from calotype.plan.take_plan import Blocker, TakePlan, TakeRequest

MIB = 1 << 20
OLD = {"background-snapshot": False, "events": False}
"""The capabilities of a QEMU that resumes the guest by itself: it has no mapped-ram."""


class Case(NamedTuple):
    """A VM of four disks and a request that nothing is in the way of."""

    facts: Facts
    record: VmRecord
    request: TakeRequest

    def plan(self) -> TakePlan:
        return plan_take(self.facts, self.record, self.request, SNAPSHOT)


Change = Callable[[Case], Case]


def sound_case() -> Case:
    facts = make_facts([make_disk(index) for index in range(4)])
    record = make_record([make_disk_record(index) for index in range(4)])
    return Case(facts, record, TakeRequest())


def seen(**changes: Any) -> Change:
    """Other facts."""
    return lambda case: case._replace(facts=replace(case.facts, **changes))


def of_migration(**changes: Any) -> Change:
    return lambda case: seen(migration=replace(case.facts.migration, **changes))(case)


def of_host(**changes: Any) -> Change:
    return lambda case: seen(host=replace(case.facts.host, **changes))(case)


def of_topology(**changes: Any) -> Change:
    return lambda case: seen(topology=replace(case.facts.topology, **changes))(case)


def of_disk(index: int, **changes: Any) -> Change:
    def change(case: Case) -> Case:
        disks = tuple(
            replace(disk, **changes) if disk.index == index else disk for disk in case.facts.disks
        )
        return seen(disks=disks)(case)

    return change


def asked(disks: Mapping[str, StorageKind] | None = None, **changes: Any) -> Change:
    """Another request; disks are added to those that were asked for."""

    def change(case: Case) -> Case:
        kinds = {**case.request.disks, **(disks or {})}
        return case._replace(request=replace(case.request, disks=kinds, **changes))

    return change


def quiesced(**changes: Any) -> Change:
    """Disks alone, quiesced, with an agent that is otherwise sound."""
    return both(asked(machine_state="none", quiesce=True), seen(agent=make_agent(**changes)))


def both(*changes: Change) -> Change:
    def change(case: Case) -> Case:
        for each in changes:
            case = each(case)
        return case

    return change


def plan_of(facts: Facts, request: TakeRequest | None = None) -> TakePlan:
    record = make_record([make_disk_record(disk.index) for disk in facts.disks])
    return plan_take(facts, record, request or TakeRequest(), SNAPSHOT)


# --- disks ---------------------------------------------------------------------------------------


def test_each_disk_gets_an_external_overlay_by_default() -> None:
    plan = plan_of(make_facts([make_disk(0), make_disk(1)]))
    assert [disk.kind for disk in plan.disks] == ["external", "external"]
    assert [disk.overlay for disk in plan.disks] == [
        f"/vm/disk{index}.qcow2.{SNAPSHOT}.qcow2" for index in range(2)
    ]
    assert all("default" in disk.reason for disk in plan.disks)


@pytest.mark.parametrize("kind", get_args(StorageKind))
@pytest.mark.parametrize("label", ["disk1", "/machine/peripheral/d1/virtio-backend", "#block1"])
def test_a_disk_is_asked_for_by_name_device_or_node(label: str, kind: StorageKind) -> None:
    facts = make_facts([make_disk(0), make_disk(1), make_disk(2)])
    plan = plan_of(facts, TakeRequest(disks={label: kind}))
    assert [disk.kind for disk in plan.disks] == ["external", kind, "external"]
    assert plan.disks[1].reason.startswith("asked for")
    assert plan.blockers == ()


def test_an_overlay_is_named_after_the_origin_and_not_after_the_active_image() -> None:
    active = Image("/vm/disk0.qcow2.ffffffffffffffff.qcow2", "qcow2")
    plan = plan_of(make_facts([make_disk(image=active)]))
    assert plan.disks[0].overlay == f"/vm/disk0.qcow2.{SNAPSHOT}.qcow2"
    assert plan.disks[0].image == active


def test_read_only_storage_is_skipped_with_the_reason_and_without_a_warning() -> None:
    plan = plan_of(make_facts(read_only=(ReadOnlyDisk("cd", "/vm/cd.iso"),)))
    skipped = plan.disks[-1]
    assert (skipped.disk, skipped.kind, skipped.index) == ("cd", "skip", -1)
    assert "read-only" in skipped.reason
    assert (plan.blockers, plan.warnings) == ((), ())


# --- blockers ------------------------------------------------------------------------------------


def written_by_others(case: Case) -> Case:
    """A device whose backend is another process, there since the start."""
    topology = replace(case.facts.topology, devices=("fs=vhost-user-gpu-pci",))
    return case._replace(
        facts=replace(case.facts, topology=topology), record=replace(case.record, topology=topology)
    )


INDEPENDENT: dict[str, tuple[Change, str, str]] = {
    "label unknown": (
        asked({"nodisk": "skip"}),
        "there is no writable disk 'nodisk'",
        "the disks are: disk0, disk1, disk2, disk3",
    ),
    "named twice": (
        asked({"disk0": "external", "#block0": "internal"}),
        "#block0 and disk0 are the same disk",
        "name it once",
    ),
    "run state": (
        seen(run_state="internal-error"),
        "run state 'internal-error'",
        "let it run first",
    ),
    "plugged in": (
        of_topology(devices=("d0=virtio-blk-pci", "u=usb-tablet")),
        "the device 'u=usb-tablet' was plugged in since",
        "undo that, or start the VM with the device",
    ),
    "encrypted migration": (
        of_migration(parameters={"max-bandwidth": 1, "tls-creds": "tls0"}),
        "the migration parameter 'tls-creds' is 'tls0'",
        "set it back to ''",
    ),
    "memory resized": (of_topology(memory_bytes=2 * GIB), "memory was resized", "set it back"),
    "stray": (
        seen(strays=(Stray("writable node 'x' on 'y'"),)),
        "writable node 'x'",
        "take it out",
    ),
    "export": (
        seen(exports=(Export("e0", "nbd", "#block0"),)),
        "the export 'e0' of node '#block0' (nbd): its clients",
        "block-export-del",
    ),
    "network": (
        seen(networks=("n0=vhost-user", "n1=user", "n2=unheard-of")),
        "the network n0=vhost-user: RAM is written by another process",
        "use another -netdev, or accept a long pause with --method paused",
    ),
    "another CD": (
        of_topology(media=("ide2-cd0=/vm/cd.iso",)),
        "the medium '/vm/cd.iso' was put into 'ide2-cd0' since",
        "start the VM with the medium",
    ),
    "block job": (seen(block_jobs=("mirror0",)), "the block job 'mirror0'", "wait for it"),
    "bitmap": (
        seen(bitmaps=(Bitmap("#block0", "backup"),)),
        "node '#block0' has the dirty bitmap 'backup'",
        "block-dirty-bitmap-remove",
    ),
    "no place for an overlay": (
        of_disk(0, may_hold_overlay=False),
        "no overlay can be created in /vm",
        "chattr -i",
    ),
    "raw holds nothing inside": (
        both(asked({"disk1": "internal"}), of_disk(1, image=Image("/vm/d.raw", "raw"))),
        "disk 'disk1' is raw, which holds no internal snapshots",
        "--disk disk1=external",
    ),
    "block device": (
        of_disk(2, is_regular_file=False, image=Image("/dev/vg/two", "raw")),
        "disk 'disk2' is a device, /dev/vg/two",
        "put a qcow2 image over it first, or skip it",
    ),
    "no room beside the image": (
        of_disk(3, free_bytes=3 * MIB + 5),
        "only 3 MiB are free beside /vm/disk3.qcow2",
        "free some space",
    ),
    "unmigratable": (
        of_migration(blocked_reasons=("the nvme device",)),
        "QEMU cannot save this machine: the nvme device",
        "remove that device",
    ),
    "migration under way": (of_migration(status="active"), "a migration is under way", "cancel it"),
    "no room in the store": (
        of_host(store_free_bytes=5 * MIB),
        "takes about 1024 MiB, 5 MiB are free in the store",
        "--store",
    ),
    "too old": (
        of_migration(capabilities={"mapped-ram": False}),
        "no background snapshots",
        "QEMU 6 or newer, or accept a long pause with --method paused",
    ),
    "no write tracking": (
        of_host(write_tracking=False),
        "may not protect its own memory (userfaultfd)",
        "vm.unprivileged_userfaultfd=1, or accept a long pause",
    ),
    "memory backend": (
        seen(memory_backends=("memory backend 'm' cannot be protected",)),
        "memory backend 'm'",
        "use anonymous memory, memfd or a file on tmpfs, or accept",
    ),
}
"""Each may stand beside each other one."""


def unplugged(case: Case) -> Case:
    """A disk more in the definition than QEMU shows."""
    return case._replace(
        record=replace(case.record, disks=(*case.record.disks, make_disk_record(9)))
    )


ALONE: dict[str, tuple[Change, str, str]] = {
    "a disk that QEMU does not show": (
        unplugged,
        "QEMU does not show the disk 'disk9'",
        "plug it in again",
    ),
    "taken out": (
        of_topology(devices=()),
        "the device 'd0=virtio-blk-pci' was taken out since",
        "undo that",
    ),
    "RAM that others write": (
        written_by_others,
        "the device fs=vhost-user-gpu-pci: the RAM behind it is written by another process",
        "take the device out, or accept a long pause with --method paused",
    ),
    "every disk skipped": (
        asked(dict.fromkeys(["disk0", "disk1", "disk2", "disk3"], "skip")),
        "every disk is skipped",
        "name at least one disk external or internal",
    ),
    "the pause would be too long": (
        asked(method="paused", pause_limit_ms=100.0),
        "stand still for about 2088 ms, the limit is 100 ms",
        "--pause-limit 4176",
    ),
    "old and paused, live": (
        both(of_migration(capabilities=OLD), seen(run_state="paused")),
        "would let the paused guest run",
        "let it run first",
    ),
    "old, forgetful, and not ours to mend": (
        both(of_migration(capabilities=OLD), of_host(may_unprotect=False)),
        "this QEMU's guest would stand still for ever",
        "QEMU 8.1 or newer, or accept a long pause with --method paused",
    ),
    "quiesced though nothing needs it": (
        asked(quiesce=True),
        "--quiesce is for disks alone",
        "leave it out, or add --machine-state none",
    ),
    "never let run": (seen(run_state="prelaunch"), "run state 'prelaunch'", "let it run first"),
    "saved by another": (seen(run_state="postmigrate"), "'postmigrate'", "let it run first"),
}


QUIESCED: dict[str, tuple[Change, str, str]] = {
    "quiesced though it stands still": (
        both(quiesced(), seen(run_state="paused")),
        "a guest that stands still cannot freeze its file systems",
        "let it run, or leave --quiesce out",
    ),
    "no agent": (
        quiesced(problem="the VM has no port for a guest agent", remedy="give it one"),
        "the VM has no port for a guest agent",
        "give it one; or leave --quiesce out",
    ),
    "an agent that may not": (
        quiesced(commands=("guest-fsfreeze-status", "guest-fsfreeze-thaw")),
        "the guest agent, version 10.0.0, does not carry out guest-fsfreeze-freeze",
        "let its configuration in the guest allow it",
    ),
    "frozen already": (quiesced(is_frozen=True), "frozen already, by somebody else", "fsfreeze"),
}
"""Disks alone, with what is in the way of freezing the guest's file systems."""
BLOCKED = {**INDEPENDENT, **ALONE, **QUIESCED}


def test_nothing_is_in_the_way_of_a_sound_vm() -> None:
    assert sound_case().plan().blockers == ()


@pytest.mark.parametrize(
    "change",
    [
        of_host(may_unprotect=False),
        both(
            of_migration(capabilities=OLD | {"switchover-ack": False}), of_host(may_unprotect=False)
        ),
        both(
            of_migration(capabilities=OLD),
            of_host(may_unprotect=False),
            asked(method="paused", pause_limit_ms=1e6),
        ),
    ],
    ids=["10", "8.1", "7.2, paused"],
)
def test_a_qemu_that_ends_its_own_saves_well_need_not_be_ours_to_mend(change: Change) -> None:
    assert change(sound_case()).plan().blockers == ()


@pytest.mark.parametrize("name", BLOCKED)
def test_what_is_in_the_way_is_named_with_what_to_do(name: str) -> None:
    change, problem, remedy = BLOCKED[name]
    (blocker,) = change(sound_case()).plan().blockers
    assert problem in blocker.problem
    assert remedy in blocker.remedy


@given(st.sets(st.sampled_from(sorted(INDEPENDENT))))
@settings(max_examples=40, deadline=None)
def test_nothing_that_is_in_the_way_hides_another(chosen: set[str]) -> None:
    rows = [INDEPENDENT[name] for name in sorted(chosen)]
    blockers = both(*(change for change, _, _ in rows))(sound_case()).plan().blockers
    assert len(blockers) == len(chosen)
    for _, problem, remedy in rows:
        assert any(problem in each.problem and remedy in each.remedy for each in blockers)


def test_a_plan_with_blockers_is_a_whole_plan() -> None:
    blocked = INDEPENDENT["block job"][0](sound_case()).plan()
    assert blocked.blockers
    assert blocked.steps == sound_case().plan().steps


def test_every_blocker_of_the_source_is_in_the_table() -> None:
    changes = [change for change, _, _ in BLOCKED.values()]
    reached = [blocker for change in changes for blocker in change(sound_case()).plan().blockers]
    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(blockers)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Blocker"
    ]
    assert calls
    for call in calls:
        assert any(matches(call, blocker) for blocker in reached), ast.unparse(call)


def matches(call: ast.Call, blocker: Blocker) -> bool:
    patterns = [pattern_of(word) for word in call.args]
    return all(map(re.fullmatch, patterns, (blocker.problem, blocker.remedy)))


def pattern_of(word: ast.expr) -> str:
    """What a constant or an f-string may become."""
    parts = word.values if isinstance(word, ast.JoinedStr) else [word]
    return "".join(
        re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*" for part in parts
    )


@pytest.mark.parametrize("state", ["running", "paused"])
def test_a_snapshot_can_be_taken_of_a_vm_that_runs_or_stands_still(state: str) -> None:
    assert plan_of(make_facts(run_state=state)).blockers == ()


@pytest.mark.parametrize("state", ["prelaunch", "postmigrate"])
def test_disks_alone_can_be_taken_in_any_run_state(state: str) -> None:
    request = TakeRequest(machine_state="none")
    assert plan_of(make_facts(run_state=state), request).blockers == ()


def test_disks_that_could_not_be_put_back_are_not_taken() -> None:
    """Who was migrated away writes to no image, unless QEMU makes them active again."""
    request = TakeRequest(machine_state="none")
    facts = make_facts(run_state="postmigrate", migration=make_migration(can_activate=False))
    (blocker,) = plan_of(facts, request).blockers
    assert blocker.problem == "the VM is in run state 'postmigrate'"
    running = make_facts(migration=make_migration(can_activate=False))
    assert plan_of(running, request).blockers == ()


def test_a_vm_that_stands_still_is_saved_live_though_a_pause_was_allowed() -> None:
    request = TakeRequest(method="paused")
    assert plan_of(make_facts(run_state="paused"), request).method == "live"


@pytest.mark.parametrize("status", ["active", "setup", "device", "cancelling"])
def test_a_migration_under_way_is_in_the_way(status: str) -> None:
    plan = plan_of(make_facts(migration=make_migration(status=status)))
    assert [blocker.problem for blocker in plan.blockers] == ["a migration is under way"]


@pytest.mark.parametrize("status", ["none", "completed", "failed", "cancelled"])
def test_a_migration_that_has_ended_is_not_in_the_way(status: str) -> None:
    assert plan_of(make_facts(migration=make_migration(status=status))).blockers == ()


def test_a_vm_that_was_never_looked_at_is_not_compared() -> None:
    facts = make_facts(topology=make_topology(memory_bytes=3 * GIB, devices=()))
    plan = plan_take(facts, make_record(topology=None), TakeRequest(), SNAPSHOT)
    assert plan.blockers == ()


@pytest.mark.parametrize(
    "change",
    [
        of_migration(blocked_reasons=("the nvme device",)),
        of_migration(status="active"),
        of_host(store_free_bytes=0, write_tracking=False),
        of_migration(capabilities={}),
        seen(memory_backends=("a file",)),
    ],
)
def test_what_only_hinders_the_machine_state_does_not_hinder_disks_alone(change: Change) -> None:
    plan = both(change, asked(machine_state="none"))(sound_case()).plan()
    assert plan.blockers == ()


@pytest.mark.parametrize(
    "change",
    [
        of_host(write_tracking=False),
        of_migration(capabilities={"mapped-ram": False}),
        seen(memory_backends=("a file",)),
    ],
)
def test_what_only_hinders_a_live_save_does_not_hinder_a_paused_one(change: Change) -> None:
    paused = asked(method="paused", pause_limit_ms=60_000.0)
    assert both(change, paused)(sound_case()).plan().blockers == ()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("skip", {"is_regular_file": False, "free_bytes": 0}),
        ("internal", {"is_regular_file": False, "free_bytes": 0}),
        ("skip", {"image": Image("/vm/d.raw", "raw")}),
        ("external", {"image": Image("/vm/d.raw", "raw")}),
        ("external", {"free_bytes": 64 * MIB}),
    ],
)
def test_a_disk_is_only_hindered_by_what_its_own_kind_needs(
    kind: StorageKind, changes: dict[str, Any]
) -> None:
    case = both(of_disk(1, **changes), asked({"disk1": kind}))(sound_case())
    assert case.plan().blockers == ()


def test_a_disk_of_the_definition_that_qemu_does_not_show_is_in_the_way() -> None:
    record = make_record([make_disk_record(0), make_disk_record(1)])
    plan = plan_take(make_facts([make_disk(0)]), record, TakeRequest(), SNAPSHOT)
    assert any("disk1" in blocker.problem for blocker in plan.blockers)


# --- warnings ------------------------------------------------------------------------------------


def test_a_sound_vm_is_warned_of_nothing() -> None:
    assert sound_case().plan().warnings == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            both(asked({"disk1": "internal"}), of_disk(1, l2_tables=400)),
            "disk 'disk1': copying its tables takes about 1969 ms",
        ),
        (asked({"disk2": "skip"}), "disk 'disk2' is skipped"),
        (asked(machine_state="none"), "what a power failure would leave"),
    ],
)
def test_what_a_user_may_regret_is_warned_of(change: Change, words: str) -> None:
    plan = change(sound_case()).plan()
    assert [words in warning for warning in plan.warnings] == [True]
    assert plan.blockers == ()


def test_disks_alone_of_a_vm_that_stands_still_are_no_power_failure() -> None:
    case = both(asked(machine_state="none"), seen(run_state="paused"))(sound_case())
    assert case.plan().warnings == ()


@pytest.mark.parametrize(("kind", "count"), [("external", 1), ("internal", 0), ("skip", 0)])
def test_an_image_that_root_could_still_write_to_is_warned_of(
    kind: StorageKind, count: int
) -> None:
    facts = make_facts([make_disk(may_be_immutable=False), make_disk(1)])
    record = make_record([make_disk_record(), make_disk_record(1)])
    plan = plan_take(facts, record, TakeRequest(disks={"disk0": kind}), SNAPSHOT)
    warned = [warning for warning in plan.warnings if "immutable" in warning]
    assert len(warned) == count
    assert all(facts.disks[0].image.path in warning for warning in warned)
    assert plan.blockers == ()


def test_a_quick_internal_snapshot_is_not_warned_of() -> None:
    assert asked({"disk1": "internal"})(sound_case()).plan().warnings == ()


# --- method --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine_state", "asked_for", "capabilities", "method"),
    [
        ("external", "auto", None, "live"),
        ("external", "live", None, "live"),
        ("external", "paused", None, "paused"),
        ("external", "auto", OLD, "live-storage-first"),
        ("external", "live", OLD, "live-storage-first"),
        ("external", "paused", OLD, "paused"),
        ("external", "auto", {}, "live-storage-first"),
        ("none", "auto", None, "storage-only"),
        ("none", "live", None, "storage-only"),
        ("none", "paused", OLD, "storage-only"),
    ],
)
def test_the_method_is_chosen(
    machine_state: Any, asked_for: Any, capabilities: dict[str, bool] | None, method: str
) -> None:
    given_ = make_migration() if capabilities is None else make_migration(capabilities=capabilities)
    request = TakeRequest(machine_state, asked_for, 60_000.0)
    plan = plan_of(make_facts(migration=given_), request)
    assert (plan.method, plan.machine_state) == (method, machine_state)
    assert plan.method_reason
    assert [step.method for step in plan.steps if isinstance(step, PassInstant)] == [method]


@pytest.mark.parametrize("name", [*INDEPENDENT, *ALONE])
def test_auto_never_lets_the_guest_stand_still_whatever_is_in_the_way(name: str) -> None:
    change, _, _ = {**INDEPENDENT, **ALONE}[name]
    plan = both(change, asked(method="auto"))(sound_case()).plan()
    assert plan.method in ("live", "live-storage-first")


# --- estimate ------------------------------------------------------------------------------------

Method = Literal["auto", "paused"]


@pytest.mark.parametrize(
    ("method", "host", "pause_ms", "bytes_"),
    [
        ("auto", {}, 10 + 9 + 5, GIB),
        ("auto", {"huge_bytes": 0}, 10 + 125 + 5, GIB),
        ("auto", {"huge_bytes": GIB // 2}, 10 + 4.5 + 62.5 + 5, GIB),
        ("auto", {"resident_bytes": 500 * MIB, "huge_bytes": 0}, 10 + 61.0 + 5, 500 * MIB),
        ("paused", {"resident_bytes": 500 * MIB}, 20 + 1000 + 5, 500 * MIB),
        ("auto", {"resident_bytes": 9 * GIB}, 10 + 9 + 7.8 + 5, GIB + 64 * MIB),
    ],
)
def test_pause_and_bytes_follow_what_was_measured(
    method: Method, host: dict[str, int], pause_ms: float, bytes_: int
) -> None:
    plan = plan_of(make_facts(host=make_host(**host)), TakeRequest(method=method))
    assert plan.estimate.pause_ms == pytest.approx(pause_ms, abs=0.1)
    assert (plan.estimate.bytes, plan.estimate.store_free_bytes) == (bytes_, 100 * GIB)


def test_each_disk_adds_its_share_of_the_pause() -> None:
    facts = make_facts([make_disk(0), make_disk(1, l2_tables=100), make_disk(2)])
    plan = plan_of(facts, TakeRequest(disks={"disk1": "internal", "disk2": "skip"}))
    assert [disk.pause_ms for disk in plan.disks] == [5.0, pytest.approx(494.5, abs=0.1), 0.0]
    shares = sum(disk.pause_ms for disk in plan.disks)
    assert plan.estimate.pause_ms == pytest.approx(19 + shares, abs=0.1)


@pytest.mark.parametrize(
    "change", [asked(machine_state="none"), seen(run_state="paused"), seen(run_state="prelaunch")]
)
def test_a_guest_that_is_not_stopped_has_no_pause(change: Change) -> None:
    assert change(sound_case()).plan().estimate.pause_ms == 0.0


def test_disks_alone_cost_no_bytes_in_the_store() -> None:
    assert asked(machine_state="none")(sound_case()).plan().estimate.bytes == 0


# --- steps ---------------------------------------------------------------------------------------


def mixed_plan(snapshot: str = SNAPSHOT, **request: Any) -> TakePlan:
    """An external, an internal, a skipped and another external disk."""
    facts = make_facts([make_disk(index) for index in range(4)])
    record = make_record([make_disk_record(index) for index in range(4)])
    kinds: dict[str, StorageKind] = {"disk1": "internal", "disk2": "skip"}
    return plan_take(facts, record, TakeRequest(**{"disks": kinds, **request}), snapshot)


def kinds_of(plan: TakePlan) -> list[type[Step]]:
    return [type(step) for step in plan.steps]


def only(plan: TakePlan, kind: type[Any]) -> Any:
    (step,) = (step for step in plan.steps if isinstance(step, kind))
    return step


def test_the_steps_come_in_the_one_sound_order() -> None:
    assert kinds_of(mixed_plan()) == [
        MakeSnapshotFolder,
        CreateOverlay,
        CreateOverlay,
        OpenOverlay,
        OpenOverlay,
        RecordAhead,
        OpenState,
        SetMigration,
        FlushImages,
        PassInstant,
        AwaitSave,
        PutBackMigration,
        CloseState,
        FreezeImages,
        Commit,
    ]


def test_disks_alone_need_no_step_for_a_machine_state() -> None:
    kinds = set(kinds_of(mixed_plan(machine_state="none")))
    assert not kinds & {OpenState, SetMigration, AwaitSave, CloseState}
    assert {RecordAhead, PassInstant, FreezeImages, Commit} <= kinds


ORDER: list[tuple[type[Step], type[Step], str]] = [
    (MakeSnapshotFolder, OpenState, "the state's file goes into the folder"),
    (CreateOverlay, OpenOverlay, "what is opened is there"),
    (OpenOverlay, PassInstant, "nothing is opened while the guest stands still"),
    (RecordAhead, OpenState, "undoing removes the state first, which makes room for the record"),
    (OpenState, PassInstant, "no file is created while the guest stands still"),
    (RecordAhead, PassInstant, "a crash after the switch finds the overlays recorded"),
    (RecordAhead, FlushImages, "flushing is the last thing before the pause"),
    (FlushImages, PassInstant, "or `stop` would flush in the pause"),
    (PassInstant, AwaitSave, "the save begins in the instant"),
    (SetMigration, PassInstant, "the save is made with our settings"),
    (AwaitSave, PutBackMigration, "settings are not changed under a save"),
    (AwaitSave, CloseState, "a digest is of the whole file"),
    (AwaitSave, FreezeImages, "what can still be undone is not immutable yet"),
    (FreezeImages, Commit, "a ctime is recorded after the freeze moved it"),
    (CloseState, Commit, "what the manifest names is durable"),
]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_whatever_is_planned_the_order_is_sound(data: st.DataObject) -> None:
    facts, record = data.draw(anything())
    request = data.draw(any_request(facts))
    kinds = kinds_of(plan_take(facts, record, request, SNAPSHOT))
    for first, second, why in ORDER:
        if first in kinds and second in kinds:
            last = len(kinds) - 1 - kinds[::-1].index(first)
            assert last < kinds.index(second), why
    assert kinds[0] is MakeSnapshotFolder
    assert kinds[-1] is Commit
    assert kinds[kinds.index(PassInstant) - 1] is FlushImages
    assert kinds.count(SetMigration) == kinds.count(PutBackMigration) <= 1


def test_only_external_disks_get_overlays() -> None:
    plan = mixed_plan()
    overlays = [names.overlay_path(f"/vm/disk{index}.qcow2", SNAPSHOT) for index in (0, 3)]
    created = [step for step in plan.steps if isinstance(step, CreateOverlay)]
    opened = [step for step in plan.steps if isinstance(step, OpenOverlay)]
    assert [step.overlay for step in created] == overlays
    assert [step.backing for step in created] == [
        Image("/vm/disk0.qcow2", "qcow2"),
        Image("/vm/disk3.qcow2", "qcow2"),
    ]
    assert [step.size_bytes for step in created] == [10 * GIB, 10 * GIB]
    assert [step.overlay for step in opened] == overlays
    assert list(only(plan, FreezeImages).modes_before) == ["/vm/disk0.qcow2", "/vm/disk3.qcow2"]
    assert [disk.overlay for disk in plan.disks] == [overlays[0], "", "", overlays[1]]


def test_the_instant_switches_external_disks_and_snapshots_inside_internal_ones() -> None:
    actions = only(mixed_plan(), PassInstant).actions
    assert [type(action) for action in actions] == [
        SwitchToOverlay, SnapshotInside, SwitchToOverlay,
    ]  # fmt: skip
    assert [qmp_action(action) for action in actions] == [
        {
            "type": "blockdev-snapshot",
            "data": {"node": "#block0", "overlay": f"calotype-{SNAPSHOT}-0"},
        },
        {
            "type": "blockdev-snapshot-internal-sync",
            "data": {"device": "#block1", "name": f"calotype-{SNAPSHOT}"},
        },
        {
            "type": "blockdev-snapshot",
            "data": {"node": "#block3", "overlay": f"calotype-{SNAPSHOT}-3"},
        },
    ]


def test_what_is_switched_to_is_what_was_opened() -> None:
    plan = mixed_plan()
    opened = [(step.node, step.overlay) for step in plan.steps if isinstance(step, OpenOverlay)]
    switched = [
        (action.overlay_node, action.overlay)
        for action in only(plan, PassInstant).actions
        if isinstance(action, SwitchToOverlay)
    ]
    assert opened == switched


def test_an_overlay_is_opened_with_the_cache_and_zeroes_of_its_disk() -> None:
    disk = make_disk(cache_direct=True, cache_no_flush=True, detect_zeroes="unmap")
    step = only(plan_of(make_facts([disk])), OpenOverlay)
    assert (step.cache_direct, step.cache_no_flush, step.detect_zeroes) == (True, True, "unmap")


def test_the_record_names_old_and_new_images_and_parents() -> None:
    facts = make_facts([make_disk(0), make_disk(1)])
    record = make_record([make_disk_record(0), make_disk_record(1)], parent=OTHER)
    plan = plan_take(facts, record, TakeRequest(disks={"disk1": "internal"}), SNAPSHOT)
    step = only(plan, RecordAhead)
    assert step.active_before == {disk.index: disk.active for disk in record.disks}
    assert step.active == {
        0: Image(f"/vm/disk0.qcow2.{SNAPSHOT}.qcow2", "qcow2"),
        1: Image("/vm/disk1.qcow2", "qcow2"),
    }
    assert (step.parent, step.parent_before) == (SNAPSHOT, OTHER)


def test_a_freeze_names_the_modes_to_put_back() -> None:
    plan = plan_of(make_facts([make_disk(0, mode=0o600), make_disk(1, mode=0o664)]))
    assert only(plan, FreezeImages).modes_before == {
        "/vm/disk0.qcow2": 0o600, "/vm/disk1.qcow2": 0o664,
    }  # fmt: skip


def test_only_files_are_flushed() -> None:
    facts = make_facts([make_disk(0), make_disk(1, is_regular_file=False)])
    assert only(plan_of(facts), FlushImages).paths == ("/vm/disk0.qcow2",)


def test_every_name_derives_from_the_id() -> None:
    first, second = (f"{SNAPSHOT[:-1]}{digit}" for digit in "cd")
    one, other = (msgspec.json.encode(mixed_plan(snapshot)) for snapshot in (first, second))
    assert one != other
    assert one.replace(first.encode(), second.encode()) == other


@pytest.mark.parametrize("name", ["overlay", "node", "merge_job"])
def test_no_two_disks_share_a_name(name: str) -> None:
    actions = only(mixed_plan(), PassInstant).actions
    given_ = [getattr(each, name) for each in actions if isinstance(each, SwitchToOverlay)]
    assert len(set(given_)) == 2


def test_the_fd_set_is_one_and_far_from_those_of_qemu() -> None:
    numbers = set()
    for snapshot in ("0000000000000000", "ffffff0000000000"):
        plan = mixed_plan(snapshot)
        (number,) = {only(plan, kind).fdset for kind in (OpenState, PassInstant, CloseState)}
        numbers.add(number)
    assert len(numbers) == 2
    assert min(numbers) >= 1 << 20
    assert max(numbers) < 1 << 31


def test_a_qemu_without_mapped_ram_takes_the_file_by_name() -> None:
    plan = plan_of(make_facts(migration=make_migration(capabilities=OLD)))
    assert {only(plan, kind).fdset for kind in (OpenState, PassInstant, CloseState)} == {0}


@pytest.mark.parametrize(
    ("change", "was_running", "limit_ms"),
    [
        (asked(pause_limit_ms=70.0), True, 70.0),
        (both(asked(pause_limit_ms=70.0), seen(run_state="paused")), False, 70.0),
    ],
)
def test_the_instant_knows_the_run_state_the_limit_and_the_graph(
    change: Change, was_running: bool, limit_ms: float
) -> None:
    step = only(change(sound_case()).plan(), PassInstant)
    assert (step.was_running, step.limit_ms) == (was_running, limit_ms)
    assert step.graph_digest == "graph"


def settings_of(plan: TakePlan) -> tuple[SetMigration, PutBackMigration]:
    return only(plan, SetMigration), only(plan, PutBackMigration)


def test_capabilities_that_another_has_set_are_turned_off_and_put_back() -> None:
    capabilities = make_migration().capabilities | {"multifd": True, "postcopy-ram": True}
    plan = plan_of(make_facts(migration=make_migration(capabilities=capabilities)))
    first, last = settings_of(plan)
    assert first.capabilities == {
        "multifd": False, "postcopy-ram": False, "background-snapshot": True,
    }  # fmt: skip
    assert last.capabilities == {
        "multifd": True, "postcopy-ram": True, "background-snapshot": False,
    }  # fmt: skip


def test_a_paused_save_turns_background_snapshots_off() -> None:
    capabilities = make_migration().capabilities | {"background-snapshot": True}
    facts = make_facts(migration=make_migration(capabilities=capabilities))
    first, last = settings_of(plan_of(facts, TakeRequest(method="paused")))
    assert first.capabilities == {"background-snapshot": False}
    assert last.capabilities == {"background-snapshot": True}


def test_capabilities_that_this_qemu_does_not_have_are_left_alone() -> None:
    facts = make_facts(migration=make_migration(capabilities=OLD | {"events": True}))
    first, _ = settings_of(plan_of(facts))
    assert first.capabilities == {"background-snapshot": True}


def test_the_bandwidth_is_raised_and_put_back() -> None:
    first, last = settings_of(mixed_plan())
    assert first.parameters["max-bandwidth"] == 1 << 40
    assert last.parameters == first.parameters_before == {"max-bandwidth": 134217728}


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_set_for_the_save_is_set_back_after_it(data: st.DataObject) -> None:
    facts, record = data.draw(anything())
    before = facts.migration
    first, last = settings_of(plan_take(facts, record, TakeRequest(), SNAPSHOT))
    capabilities = before.capabilities | first.capabilities
    assert all(
        not state
        for name, state in capabilities.items()
        if name in take._NEVER_WITH_BACKGROUND_SNAPSHOT
    )
    assert capabilities | last.capabilities == before.capabilities
    assert before.parameters | first.parameters | last.parameters == before.parameters
    assert first.capabilities_before.items() <= before.capabilities.items()


# --- purity --------------------------------------------------------------------------------------


@st.composite
def any_disk(draw: st.DrawFn, index: int) -> DiskFacts:
    path = draw(st.sampled_from([f"/vm/disk{index}.qcow2", "/dev/vg/one", "/vm/it's = 100%.raw"]))
    size = st.integers(0, 1 << 50)
    return make_disk(
        index,
        name=draw(st.sampled_from([f"disk{index}", "", "the same"])),
        qdev=draw(st.sampled_from([f"/machine/d{index}", ""])),
        image=Image(path, draw(st.sampled_from(["raw", "qcow2"]))),
        virtual_size_bytes=draw(size),
        l2_tables=draw(st.integers(0, 1 << 20)),
        cluster_bytes=draw(st.sampled_from([0, 512, 65536, 2 << 20])),
        free_bytes=draw(size),
        is_regular_file=draw(st.booleans()),
        mode=draw(st.integers(0, 0o7777)),
    )


@st.composite
def anything(draw: st.DrawFn) -> tuple[Facts, VmRecord]:
    """Facts that QEMU could show, sound or not, and a record that may not fit them."""
    words = st.sampled_from([(), ("a",), ("it's", "=%,\\n")])
    capabilities = ["background-snapshot", *take._NEVER_WITH_BACKGROUND_SNAPSHOT, "events"]
    count = draw(st.integers(0, 3))
    size = st.integers(0, 1 << 50)
    topology = make_topology(memory_bytes=draw(size), devices=draw(words))
    facts = make_facts(
        [draw(any_disk(index)) for index in range(count)],
        run_state=draw(st.sampled_from(["running", "paused", "prelaunch", "io-error", ""])),
        topology=topology,
        read_only=tuple(ReadOnlyDisk(name, "/vm/cd.iso") for name in draw(words)),
        strays=tuple(Stray(word) for word in draw(words)),
        block_jobs=draw(words),
        bitmaps=tuple(Bitmap("#block0", name) for name in draw(words)),
        memory_backends=draw(words),
        migration=make_migration(
            capabilities=draw(
                st.dictionaries(st.sampled_from(capabilities), st.booleans(), max_size=6)
            ),
            status=draw(st.sampled_from(["none", "active", "completed", "wait-unplug"])),
            blocked_reasons=draw(words),
            can_activate=draw(st.booleans()),
        ),
        host=make_host(
            write_tracking=draw(st.booleans()),
            may_unprotect=draw(st.booleans()),
            store_free_bytes=draw(size),
            resident_bytes=draw(size),
            huge_bytes=draw(size),
        ),
    )
    disks = [make_disk_record(index) for index in range(draw(st.integers(0, 4)))]
    return facts, make_record(disks, topology=draw(st.sampled_from([None, make_topology()])))


def any_request(facts: Facts) -> st.SearchStrategy[TakeRequest]:
    labels = sorted(frozenset[str]().union(*(disk.labels for disk in facts.disks)) | {"", "x"})
    return st.builds(
        TakeRequest,
        machine_state=st.sampled_from(["external", "none"]),
        method=st.sampled_from(["auto", "live", "paused"]),
        pause_limit_ms=st.floats(1.0, 1e9),
        disks=st.dictionaries(
            st.sampled_from(labels), st.sampled_from(get_args(StorageKind)), max_size=3
        ),
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_planning_never_raises_and_equal_input_gives_an_equal_plan(data: st.DataObject) -> None:
    facts, record = data.draw(anything())
    request = data.draw(any_request(facts))
    before = msgspec.json.encode([facts, record, request])
    plan = plan_take(facts, record, request, SNAPSHOT)
    assert plan_take(facts, record, request, SNAPSHOT) == plan
    assert msgspec.json.encode([facts, record, request]) == before
    assert len(plan.disks) == len(facts.disks) + len(facts.read_only)
    assert msgspec.json.decode(msgspec.json.encode(plan))["snapshot"] == SNAPSHOT
    assert all(blocker.remedy for blocker in plan.blockers)


# --- quiesced ------------------------------------------------------------------------------------


def test_file_systems_are_frozen_right_before_the_instant_and_thawed_right_after() -> None:
    steps = both(quiesced(), asked(freeze_limit_ms=700.0))(sound_case()).plan().steps
    place = [type(step) for step in steps].index(PassInstant)
    instant = steps[place]
    assert steps[place - 1] == FreezeFileSystems("/vm/agent.sock", 700.0)
    assert steps[place + 1] == ThawFileSystems("/vm/agent.sock")
    assert isinstance(instant, PassInstant)
    assert instant.agent == "/vm/agent.sock"


def test_who_does_not_ask_for_it_is_not_quiesced() -> None:
    steps = both(quiesced(), asked(quiesce=False))(sound_case()).plan().steps
    assert not [each for each in steps if isinstance(each, FreezeFileSystems | ThawFileSystems)]
    assert [each.agent for each in steps if isinstance(each, PassInstant)] == [""]


def test_a_power_failure_is_not_spoken_of_where_file_systems_are_frozen() -> None:
    warned = [asked(machine_state="none"), quiesced()]
    told = [" ".join(change(sound_case()).plan().warnings) for change in warned]
    assert ["power failure" in words for words in told] == [True, False]

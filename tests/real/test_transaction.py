"""A transaction with a machine state in it: all of one instant, or nothing at all."""

import json
import subprocess
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calotype.testing.machine import CommandFailed, Machine
from serving import Qmp, client_of, running
from witnessing import Boot, assert_consistent, assert_sound

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]

Action = dict[str, Any]

DISKS = ("zero.qcow2", "one.qcow2", "two.raw", "three.qcow2")
"""The last is copied: QEMU makes no snapshot of a disk that the same transaction begins to copy."""


def ours(destination: str = "external", **more: Any) -> Action:
    data = {"job-id": "save", "tag": "one", "destination": {"type": destination}} | more
    return {"type": "machine-state-save", "data": data}


def qemus(kind: str, **data: Any) -> Action:
    return {"type": kind, "data": {name.replace("_", "-"): data[name] for name in data}}


@pytest.fixture
def machine(folder: Path) -> Iterator[Machine]:
    with running(Machine(folder, disks=DISKS)) as vm:
        yield vm


@pytest.fixture
def qmp(machine: Machine) -> Iterator[Qmp]:
    with client_of(machine) as client:
        yield client


def before_and_after(machine: Machine, qmp: Qmp) -> dict[str, Any]:
    """What a transaction that failed must leave as it was."""
    listed = {
        image.name: subprocess.run(
            ["qemu-img", "snapshot", "-U", "-l", image], capture_output=True, text=True, check=True
        ).stdout
        for image in machine.folder.glob("*.qcow2")
    }
    nodes = qmp.ask("query-named-block-nodes", flat=True)
    return {
        "nodes": sorted((node["node-name"], node["file"], node["drv"]) for node in nodes),
        "bitmaps": sorted(
            (node["node-name"], each.get("name", ""))
            for node in nodes
            for each in node.get("dirty-bitmaps", [])
        ),
        "snapshots": listed,
        "files": sorted(path.name for path in machine.folder.iterdir()),
        "capabilities": qmp.ask("query-migrate-capabilities"),
        "parameters": qmp.ask("query-migrate-parameters"),
        "status": qmp.ask("query-status"),
        "jobs": qmp.ask("query-jobs"),
        "ours": qmp.ask("query-system-snapshots"),
    }


def node_of(qmp: Qmp, device: str) -> str:
    (node,) = (
        each["inserted"]["node-name"] for each in qmp.ask("query-block") if each["device"] == device
    )
    return str(node)


def open_overlay(machine: Machine, qmp: Qmp, disk: str = "one.qcow2") -> str:
    """An overlay over a disk's image, as a caller makes and opens it; its node."""
    path, base = machine.folder / "mine.qcow2", machine.folder / disk
    make = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", str(base)]
    subprocess.run([*make, str(path), "64M"], check=True)
    file = {"driver": "file", "filename": str(path)}
    qmp.ask("blockdev-add", driver="qcow2", node_name="mine", file=file, backing=None)
    return "mine"


def open_target(machine: Machine, qmp: Qmp) -> str:
    """A raw image to copy to; its node."""
    path = machine.folder / "copy.raw"
    path.write_bytes(b"\0" * (64 << 20))
    qmp.ask(
        "blockdev-add",
        driver="raw",
        node_name="copy",
        file={"driver": "file", "filename": str(path)},
    )
    return "copy"


def good(machine: Machine, qmp: Qmp, kinds: Collection[str]) -> dict[str, Action]:
    """An action of each of *kinds*, that succeeds, none about the disk of another."""
    one, two, three = (node_of(qmp, f"virtio{place}") for place in (1, 2, 3))
    made: dict[str, Callable[[], Action]] = {
        "blockdev-snapshot": lambda: qemus(
            "blockdev-snapshot", node=one, overlay=open_overlay(machine, qmp)
        ),
        "blockdev-snapshot-sync": lambda: qemus(
            "blockdev-snapshot-sync",
            node_name=two,
            snapshot_file=str(machine.folder / "new.qcow2"),
            snapshot_node_name="new",
        ),
        "blockdev-snapshot-internal-sync": lambda: qemus(
            "blockdev-snapshot-internal-sync", device="virtio0", name="inside"
        ),
        "block-dirty-bitmap-add": lambda: qemus("block-dirty-bitmap-add", node=three, name="b"),
        "blockdev-backup": lambda: qemus(
            "blockdev-backup",
            job_id="copying",
            device=three,
            target=open_target(machine, qmp),
            sync="none",
        ),
    }
    return {kind: made[kind]() for kind in kinds}


BAD = {
    "no such node": (
        qemus("block-dirty-bitmap-add", node="nobody", name="c"),
        "Cannot find device='nobody' nor node-name='nobody'",
    ),
    "no such disk": (
        qemus("blockdev-snapshot-internal-sync", device="nobody", name="c"),
        "Cannot find device='nobody' nor node-name='nobody'",
    ),
    "abort": ({"type": "abort", "data": {}}, "Transaction aborted using Abort action"),
    "no such type": ({"type": "no-such", "data": {}}, "does not accept value 'no-such'"),
    "raw": (
        qemus("blockdev-snapshot-internal-sync", device="virtio2", name="c"),
        "disk 'virtio2'",
    ),
}
KINDS = (
    "blockdev-snapshot",
    "blockdev-snapshot-sync",
    "blockdev-snapshot-internal-sync",
    "block-dirty-bitmap-add",
    "blockdev-backup",
)


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("bad", BAD)
def test_after_a_failing_one_all_is_as_before(
    machine: Machine, qmp: Qmp, bad: str, is_first: bool
) -> None:
    actions = list(good(machine, qmp, KINDS).values())
    fails, said = BAD[bad]
    mixed = [fails, ours(), *actions] if is_first else [*actions, ours(), fails]
    before = before_and_after(machine, qmp)
    assert said in qmp.refusal("transaction", actions=mixed)
    assert before_and_after(machine, qmp) == before


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.permutations([*KINDS, "machine-state-save", "abort"]), st.integers(1, 7))
def test_after_any_mix_that_fails_all_is_as_before(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], count: int
) -> None:
    chosen = [*order[:count], *(kind for kind in order[count:] if kind == "abort")]
    if "machine-state-save" not in chosen:
        chosen.insert(count % (len(chosen) + 1), "machine-state-save")
    with running(Machine(tmp_path_factory.mktemp("mix"), disks=DISKS)) as vm, client_of(vm) as qmp:
        each = {
            **good(vm, qmp, [kind for kind in chosen if kind in KINDS]),
            "machine-state-save": ours(),
            "abort": {"type": "abort", "data": {}},
        }
        before = before_and_after(vm, qmp)
        said = qmp.refusal("transaction", actions=[each[kind] for kind in chosen])
        assert "Transaction aborted using Abort action" in said
        assert before_and_after(vm, qmp) == before


def test_all_kinds_happen_at_one_instant_and_a_job_saves_the_rest(
    machine: Machine, qmp: Qmp
) -> None:
    zero, three = node_of(qmp, "virtio0"), node_of(qmp, "virtio3")
    actions = list(good(machine, qmp, KINDS).values())
    properties = {"completion-mode": "individual"}
    qmp.ask("transaction", actions=[*actions[:2], ours(), *actions[2:]], properties=properties)
    nodes = {node["node-name"]: node for node in qmp.ask("query-named-block-nodes")}
    assert node_of(qmp, "virtio1") == "mine"
    assert node_of(qmp, "virtio2") == "new"
    assert "b" in [each.get("name") for each in nodes[three]["dirty-bitmaps"]]
    assert [each["name"] for each in nodes[zero]["image"]["snapshots"]] == ["inside"]
    assert "copying" in [job["id"] for job in qmp.ask("query-jobs")]
    qmp.await_event("JOB_STATUS_CHANGE", id="save", status="concluded")
    (snapshot,) = qmp.ask("query-system-snapshots")
    assert [disk["kind"] for disk in snapshot["storage"]] == [
        "internal",
        "external",
        "external",
        "skip",
    ]
    assert not snapshot["is-whole"]


@pytest.mark.parametrize(
    ("actions", "said"),
    [
        ([ours(), ours()], "machine-state-save is there twice"),
        ([ours(destination="nowhere")], "does not accept value 'nowhere'"),
        ([{"type": "machine-state-save", "data": {}}], "Parameter 'actions[0].data.job-id' is m"),
        ([ours(), {"type": 1, "data": {}}], "Invalid parameter type for 'actions[1].type'"),
        ([ours(), {"type": "abort"}], "Parameter 'actions[1].data' is missing"),
        ([ours(), 7], "Invalid parameter type for 'actions[1]', expected: object"),
    ],
)
def test_what_is_no_transaction_is_refused(
    machine: Machine, qmp: Qmp, actions: list[Any], said: str
) -> None:
    before = before_and_after(machine, qmp)
    assert said in qmp.refusal("transaction", actions=actions)
    assert before_and_after(machine, qmp) == before


def test_an_overlay_that_stands_on_another_image_is_refused(machine: Machine, qmp: Qmp) -> None:
    overlay = open_overlay(machine, qmp, disk="zero.qcow2")
    before = before_and_after(machine, qmp)
    action = qemus("blockdev-snapshot", node=node_of(qmp, "virtio1"), overlay=overlay)
    assert "is no qcow2 that stands on" in qmp.refusal("transaction", actions=[ours(), action])
    assert before_and_after(machine, qmp) == before


def test_a_loose_image_that_stands_on_nothing_is_in_the_way_by_name(
    machine: Machine, qmp: Qmp
) -> None:
    base = machine.folder / "gone.qcow2"
    open_overlay(machine, qmp, disk=base.name)
    with pytest.raises(CommandFailed) as raised:
        machine.calotype("take", machine.name, "--plan")
    assert raised.value.data["exit_code"] == 4
    assert "writable node 'mine'" in str(raised.value)
    action = qemus("blockdev-snapshot", node=node_of(qmp, "virtio1"), overlay="mine")
    assert "is no qcow2 that stands on" in qmp.refusal("transaction", actions=[ours(), action])


def test_a_name_that_an_image_has_already_is_refused_and_stays(machine: Machine, qmp: Qmp) -> None:
    qmp.ask("blockdev-snapshot-internal-sync", device="virtio0", name="inside")
    before = before_and_after(machine, qmp)
    action = qemus("blockdev-snapshot-internal-sync", device="virtio0", name="inside")
    assert "already exists" in qmp.refusal("transaction", actions=[ours(), action])
    assert before_and_after(machine, qmp) == before


# --- with a guest that would notice ---------------------------------------------------------------


def transact(vm: Any, qmp: Qmp, *more: Action) -> None:
    sync = qemus(
        "blockdev-snapshot-sync",
        device="virtio1",
        snapshot_file=str(vm.folder / "mine.qcow2"),
        snapshot_node_name="mine",
    )
    inside = qemus("blockdev-snapshot-internal-sync", device="virtio0", name="inside")
    qmp.ask("transaction", actions=[inside, *more, ours(), sync])


def test_a_witness_that_was_saved_by_a_transaction_is_consistent(boot: Boot) -> None:
    vm = boot()
    with client_of(vm) as qmp:
        transact(vm, qmp)
        assert qmp.ask("query-status")["running"]
        qmp.await_event("JOB_STATUS_CHANGE", id="save", status="concluded")
        vm.await_rounds(20, vm.console_size())
        mark = vm.console_size()
        assert "error" not in qmp.run_job("system-snapshot-load", tag="one")
        assert_consistent(vm.testimony(mark))
    record = json.loads((vm.home / "record.json").read_text())
    assert record["parent"]
    assert_sound(vm)


def test_a_save_that_fails_later_undoes_the_storage_and_says_so(boot: Boot) -> None:
    vm = boot(disks=("zero.qcow2", "one.raw", "two.qcow2"))
    with client_of(vm) as qmp:
        node, target = node_of(qmp, "virtio2"), open_target(vm, qmp)
        backup = qemus("blockdev-backup", job_id="copy", device=node, target=target, sync="none")
        bitmap = qemus("block-dirty-bitmap-add", node=node, name="b")
        before = before_and_after(vm, qmp)
        transact(vm, qmp, bitmap, backup)
        assert "copy" in [job["id"] for job in qmp.ask("query-jobs")]
        qmp.ask("job-cancel", id="save")
        failed = qmp.await_event("SYSTEM_SNAPSHOT_FAILED")
        assert failed["undone"] is True
        qmp.ask("job-dismiss", id="save")
        assert before_and_after(vm, qmp) == before
        assert_sound(vm)

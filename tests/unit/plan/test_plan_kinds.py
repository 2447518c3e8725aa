"""The table of kinds: which rows are in the way of which snapshot, and what is not in it."""

from typing import Literal, get_args

import pytest
from msgspec.structs import replace

from builders import SNAPSHOT, make_facts, make_migration, make_record, make_topology
from calotype.formats.argv import block
from calotype.model.snapshot import MachineStateKind
from calotype.model.vm import Export
from calotype.plan.kinds import KINDS, MEANINGS, Kind, Treatment, kind_of, treatment
from calotype.plan.take import plan_take
from calotype.plan.take_plan import TakePlan, TakeRequest

How = Literal["live", "paused", "alone"]
IN_THE_WAY: dict[Treatment, set[How]] = {
    "blocks": {"live", "paused", "alone"},
    "blocks state": {"live", "paused"},
    "blocks live": {"live"},
    "needs state": {"alone"},
}
WARNED_OF: dict[Treatment, set[How]] = {
    "warned of": {"live", "paused", "alone"},
    "saved with state": {"alone"},
}
SORTS = ("device", "network", "export")
ROWS = [
    pytest.param(kind, name, id=f"{kind.sort}-{name}")
    for kind in KINDS
    if kind.sort in SORTS
    for name in kind.names
]


def plan(sort: str, name: str, how: How) -> TakePlan:
    """The plan for a VM that has something of this kind since its start."""
    given = (f"x={name}pci",) if sort == "device" and name.endswith("-") else (f"x={name}",)
    topology = make_topology(devices=given if sort == "device" else ())
    facts = make_facts(
        topology=topology,
        networks=given if sort == "network" else (),
        exports=(Export("x", name, "#block0"),) if sort == "export" else (),
    )
    state: MachineStateKind = "none" if how == "alone" else "external"
    request = TakeRequest(state, "paused" if how == "paused" else "auto", 9000.0)
    return plan_take(facts, make_record(topology=topology), request, SNAPSHOT)


@pytest.mark.parametrize("how", get_args(How))
@pytest.mark.parametrize(("kind", "name"), ROWS)
def test_each_kind_is_in_the_way_of_what_it_says(kind: Kind, name: str, how: How) -> None:
    planned = plan(kind.sort, name, how)
    expected = how in IN_THE_WAY.get(kind.treatment, set())
    assert [kind.reason in blocker.problem for blocker in planned.blockers] == [True] * expected
    assert all(kind.remedy in blocker.remedy for blocker in planned.blockers)
    warned = [kind.reason in warning for warning in planned.warnings]
    assert any(warned) == (how in WARNED_OF.get(kind.treatment, set()))


def test_what_qemu_refuses_by_itself_is_told_in_its_words() -> None:
    reason = "non-migratable device: 0000:00:03.0/nvme"
    facts = make_facts(migration=make_migration(blocked_reasons=(reason,)))
    (blocker,) = plan_take(facts, make_record(), TakeRequest(), SNAPSHOT).blockers
    assert blocker.problem.endswith(reason)
    alone = plan_take(facts, make_record(), TakeRequest(machine_state="none"), SNAPSHOT)
    assert alone.blockers == ()


@pytest.mark.parametrize(
    ("sort", "blocked"), [("device", False), ("network", False), ("export", True)]
)
def test_what_is_not_in_the_table_is_qemu_s_matter_unless_it_is_storage(
    sort: str, blocked: bool
) -> None:
    blockers = plan(sort, "unheard-of", "paused").blockers
    assert [("not known here" in blocker.problem) for blocker in blockers] == [True] * blocked
    assert kind_of("node", "unheard-of") is None
    assert treatment("node", "unheard-of") == "blocks"
    assert treatment("memory", "memory-backend-unheard-of") == "blocks live"


def test_the_first_row_of_a_device_counts() -> None:
    assert treatment("device", "vhost-user-blk-pci") == "blocks"
    assert treatment("device", "vhost-user-fs-pci") == "blocks state"
    assert treatment("device", "vhost-user-i2c-pci") == "blocks live"
    assert treatment("device", "virtio-blk-pci-transitional") == "disk"


def test_every_row_can_be_told() -> None:
    assert set(MEANINGS) == set(get_args(Treatment))
    assert {kind.treatment for kind in KINDS} == set(MEANINGS)
    labels = [(kind.sort, kind.label) for kind in KINDS]
    assert len(labels) == len(set(labels))
    for kind in KINDS:
        assert kind.reason
        assert bool(kind.remedy) == (kind.treatment in IN_THE_WAY)


def test_command_line_and_block_graph_know_the_same_nodes() -> None:
    assert {name for name in block.FORMAT_KEYS if treatment("node", name) == "image"} == set(
        block.FORMAT_KEYS
    )
    by_treatment = {
        each: {name for kind in KINDS if kind.treatment == each for name in kind.names}
        for each in get_args(Treatment)
    }
    assert by_treatment["image"] == set(block.FORMAT_KEYS)
    assert by_treatment["place"] == block.PROTOCOLS
    assert by_treatment["empty"] == block.NULLS
    assert by_treatment["filter"] == set(block.FILTER_KEYS)


def test_a_disk_under_filters_is_known_by_their_names_too() -> None:
    (disk,) = make_facts().disks
    assert disk.root == disk.node
    below = replace(disk, filters=("t", "c"))
    assert below.root == "t"
    assert {"t", "c", disk.node, disk.name} <= below.labels

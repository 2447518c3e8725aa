"""Where the parts of a snapshot are, and which of them an extraction means."""

import pytest

from builders import OTHER, SNAPSHOT, disk_path, make_layer, make_manifest, make_part
from calotype.errors import NotFoundError, RequestError
from calotype.model.vm import Image
from calotype.plan.contents import places, plan_extraction

TOP = Image(f"{disk_path(0)}.{OTHER}.qcow2", "qcow2")
CHAIN = (make_layer(TOP.path, 1), make_layer(disk_path(0), 2, format="raw"))
PARTS = [
    make_part(0, image=TOP, layers=CHAIN),
    make_part(1, "internal", layers=(make_layer("/vm/base.raw", 3, format="raw"),)),
    make_part(2, "skip"),
]


def test_a_chain_is_told_from_the_top() -> None:
    found = places(make_manifest(PARTS), "/store/b1")
    external, internal, skipped = found.disks
    assert external.chain == (TOP, Image(disk_path(0), "raw"))
    assert internal.chain == (Image(disk_path(1), "qcow2"), Image("/vm/base.raw", "raw"))
    assert (internal.internal_id, internal.internal_name) == ("1", f"calotype-{SNAPSHOT}")
    assert (external.internal_id, external.internal_name) == ("", "")
    assert (skipped.kind, skipped.chain) == ("skip", ())
    assert found.machine_state == "/store/b1/machine-state"


def test_a_snapshot_of_disks_alone_has_no_file_of_a_machine_state() -> None:
    assert places(make_manifest(PARTS, machine_state=None), "/store/b1").machine_state is None


def test_a_disk_is_meant_by_its_name_or_its_device() -> None:
    manifest = make_manifest(PARTS)
    for label in ("disk1", PARTS[1].qdev):
        plan = plan_extraction(manifest, label, "/out", "raw")
        assert (plan.source, plan.internal_name) == (PARTS[1].image, PARTS[1].internal_name)
    assert plan_extraction(manifest, "disk0", "/out", "raw").internal_name == ""


@pytest.mark.parametrize("label", ["disk9", "", "disk2"])
def test_what_the_snapshot_does_not_hold_is_named_with_what_it_holds(label: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        plan_extraction(
            make_manifest([*PARTS[:2], make_part(2, "skip", qdev="")]), label, "/o", "raw"
        )
    assert "disk0, disk1" in caught.value.remedy


def test_a_name_of_two_disks_names_none() -> None:
    manifest = make_manifest([make_part(0, disk="same"), make_part(1, disk="same")])
    with pytest.raises(RequestError, match="2 disks called 'same'"):
        plan_extraction(manifest, "same", "/out", "raw")
    assert plan_extraction(manifest, make_part(1).qdev, "/out", "raw").part.index == 1

"""Two sightings of an image: every difference is told, the gravest first."""

from typing import get_args

import msgspec
import pytest
from msgspec.structs import replace

from calotype.model.identity import Change, Difference, Identity, differences

RECORDED = Identity(
    device=2049,
    inode=17,
    size_bytes=196616,
    mtime_ns=1_700_000_000_000_000_000,
    ctime_ns=1_700_000_000_000_000_001,
    format="qcow2",
    virtual_size_bytes=1 << 30,
    header_digest="aa",
    l1_digest="bb",
    snapshots_digest="cc",
)


def test_the_same_image_does_not_differ() -> None:
    assert differences(RECORDED, replace(RECORDED)) == ()


@pytest.mark.parametrize(
    ("field", "found", "change"),
    [
        ("device", 1, "replaced"),
        ("inode", 18, "replaced"),
        ("format", "raw", "replaced"),
        ("virtual_size_bytes", 2 << 30, "resized"),
        ("size_bytes", 1, "written"),
        ("mtime_ns", 5, "written"),
        ("l1_digest", "x", "written"),
        ("header_digest", "x", "header"),
        ("snapshots_digest", "x", "snapshots"),
        ("ctime_ns", 5, "touched"),
    ],
)
def test_each_field_has_a_meaning(field: str, found: int | str, change: Change) -> None:
    (difference,) = differences(RECORDED, replace(RECORDED, **{field: found}))
    assert difference == Difference(field, getattr(RECORDED, field), found)
    assert difference.change == change
    assert difference.text
    assert "\n" not in difference.text


def test_no_field_and_no_change_is_forgotten() -> None:
    other = Identity(1, 2, 3, 4, 5, "raw", 6, "7", "8", "9")
    found = differences(RECORDED, other)
    assert {difference.field for difference in found} == set(Identity.__struct_fields__)
    assert {difference.change for difference in found} == set(get_args(Change))


def test_the_gravest_comes_first() -> None:
    found = differences(RECORDED, replace(RECORDED, ctime_ns=1, mtime_ns=2, inode=3))
    assert [difference.change for difference in found] == ["replaced", "written", "touched"]


def test_the_text_tells_both_values() -> None:
    (difference,) = differences(RECORDED, replace(RECORDED, inode=18))
    assert difference.text == "it is another file: inode 18 instead of 17"


def test_an_identity_travels_as_json() -> None:
    wire = msgspec.json.encode(RECORDED)
    assert msgspec.json.decode(wire, type=Identity) == RECORDED


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("mtime_ns", "it was written at 2026-10-06T06:46:13Z, last known 2023-11-14T22:13:20Z"),
        ("ctime_ns", "was changed at 2026-10-06T06:46:13Z, last known 2023-11-14T22:13:20Z"),
    ],
)
def test_a_time_is_told_as_people_read_it(field: str, text: str) -> None:
    recorded = replace(RECORDED, ctime_ns=RECORDED.mtime_ns)
    (found,) = differences(recorded, replace(recorded, **{field: 1_791_269_173_802_233_845}))
    assert found.text.endswith(text)


def test_two_times_of_one_second_are_told_apart() -> None:
    (found,) = differences(RECORDED, replace(RECORDED, mtime_ns=1_700_000_000_000_000_007))
    assert "2023-11-14T22:13:20.000000007Z, last" in found.text
    assert found.text.endswith("2023-11-14T22:13:20.000000000Z")

"""What becomes of an image that nobody needs: one rule each, and the reason where nothing does."""

from typing import Any

import pytest
from msgspec.structs import replace

from calotype.model import names
from calotype.model.vm import Image
from calotype.plan.layers import (
    DiskLayers,
    Down,
    Inside,
    Layer,
    Operation,
    Remove,
    Replace,
    Up,
    growth_bytes,
    settle,
    stays,
)

GIB = 1 << 30
ORIGIN = Image("/vm/a.qcow2", "qcow2")
RAW = Image("/vm/a.raw", "raw")
SAVED = (Inside("1", "by hand"),)


def overlay(number: int, origin: Image = ORIGIN) -> Image:
    return Image(names.overlay_path(origin.path, f"{number:016x}"), "qcow2")


def layer(image: Image, backing: Image | None = None, **changes: Any) -> Layer:
    whole = Layer(image, backing, virtual_size_bytes=10 * GIB, allocated_bytes=GIB)
    return replace(whole, **changes)


def disk(*layers: Layer, active: Image | None = None, **changes: Any) -> DiskLayers:
    """A disk whose first layer is the user's, on whose last the newest content is."""
    whole = DiskLayers(
        index=0,
        disk="disk0",
        origin=layers[0].image,
        active=active or layers[-1].image,
        layers={each.path: each for each in layers},
        free_bytes=1000 * GIB,
    )
    return replace(whole, **changes)


def chain(length: int, origin: Image = ORIGIN, **changes: Any) -> list[Layer]:
    """The user's image and overlays, each on the one before."""
    stack = [origin, *(overlay(number, origin) for number in range(1, length))]
    backings = [None, *stack]
    return [layer(*each, **changes) for each in zip(stack, backings, strict=False)]


def words(operations: list[Operation]) -> list[tuple[str, str]]:
    """Each operation by its kind and by the image that goes away."""
    told = []
    for operation in operations:
        match operation:
            case Remove(gone) | Down(top=gone) | Replace(copy=gone) | Up(layer=Layer() as gone):
                told.append((type(operation).__name__, gone.path))
            case Up(children=children):
                told.append(("Up onto the origin", children[0].path))
            case _:
                pass
    return told


def reason(of: DiskLayers, image: Image) -> str:
    """Why an image that is not needed stays."""
    (stay,) = [stay for stay in stays(settle(of)[1]) if stay.path == image.path]
    assert not stay.is_needed
    return stay.reason


@pytest.mark.parametrize("origin", [ORIGIN, RAW])
def test_a_chain_that_nobody_needs_is_merged_into_the_users_image_from_the_bottom(
    origin: Image,
) -> None:
    layers = chain(4, origin)
    operations, end = settle(disk(*layers))
    assert words(operations) == [("Down", each.path) for each in layers[1:]]
    assert end.active == origin
    assert list(end.layers) == [origin.path]


def test_a_needed_image_is_not_merged_into_and_its_heir_inherits_the_need() -> None:
    layers = chain(4)
    held = {layers[0].path: ("s1",), layers[2].path: ("s3",)}
    operations, end = settle(disk(*layers, held=held))
    assert words(operations) == [("Down", layers[2].path)]
    assert end.held == {layers[0].path: ("s1",), layers[1].path: ("s3",)}
    assert end.layers[layers[3].path].backing == layers[1].image


def test_a_leaf_that_nobody_needs_is_removed_before_anything_is_merged() -> None:
    left, now = overlay(1), overlay(2)
    branches = disk(layer(ORIGIN), layer(left, ORIGIN), layer(now, ORIGIN))
    operations, end = settle(branches)
    assert words(operations) == [("Remove", left.path), ("Down", now.path)]
    assert end.active == ORIGIN


def test_the_users_image_with_two_branches_stays() -> None:
    left, now = overlay(1), overlay(2)
    branches = disk(
        layer(ORIGIN), layer(left, ORIGIN), layer(now, ORIGIN), held={left.path: ("s1",)}
    )
    assert settle(branches)[0] == []
    assert "2 images stand on it" in reason(branches, ORIGIN)


def fork(**changes: Any) -> DiskLayers:
    """A needed origin, an overlay that nobody needs, and two branches on that."""
    base, left, now = overlay(1), overlay(2), overlay(3)
    return disk(
        layer(ORIGIN),
        layer(base, ORIGIN, allocated_bytes=1000),
        layer(left, base),
        layer(now, base),
        **{"held": {ORIGIN.path: ("s0",), left.path: ("s1",)}, **changes},
    )


def test_a_small_base_of_two_branches_is_merged_up() -> None:
    operations, end = settle(fork())
    assert words(operations) == [("Up", overlay(1).path)]
    assert {each.backing for each in end.layers.values()} == {None, ORIGIN}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"free_bytes": 19_999}, "would write 2000 bytes"),
        ({"claimed": {overlay(2).path: "the VM 'b' has it"}}, "the VM 'b' has it"),
    ],
)
def test_a_base_that_is_dear_or_claimed_above_stays(changes: dict[str, Any], text: str) -> None:
    assert text in reason(fork(**changes), overlay(1))


@pytest.mark.parametrize(
    ("number", "changes", "text"),
    [
        (1, {"is_open": True}, "QEMU has it open"),
        (1, {"inside": SAVED}, "it holds the snapshot inside 'by hand'"),
        (1, {"obstacle": "is encrypted"}, "is encrypted"),
        (2, {"inside": SAVED}, "which holds the snapshot inside 'by hand'"),
        (2, {"is_open": True}, "QEMU has it open"),
        (2, {"is_known": False}, "no snapshot knows it"),
        (2, {"is_ours": False}, "none of Calotype's"),
        (2, {"virtual_size_bytes": GIB}, "sizes differ"),
    ],
)
def test_a_base_is_not_merged_up_where_there_is_a_doubt(
    number: int, changes: dict[str, Any], text: str
) -> None:
    whole = fork()
    path = overlay(number).path
    changed = {**whole.layers, path: replace(whole.layers[path], **changes)}
    assert text in reason(replace(whole, layers=changed), overlay(1))


@pytest.mark.parametrize(
    ("number", "changes", "text"),
    [
        (1, {"inside": SAVED}, "stands on it and holds the snapshot inside 'by hand'"),
        (1, {"virtual_size_bytes": 11 * GIB}, "sizes differ"),
        (1, {"obstacle": "holds dirty bitmaps"}, "holds dirty bitmaps"),
        (1, {"is_open": True}, "QEMU has"),
        (2, {"is_known": False}, "no snapshot knows it"),
        (2, {"is_ours": False}, "none of Calotype's"),
    ],
)
def test_an_image_is_not_merged_down_where_there_is_a_doubt(
    number: int, changes: dict[str, Any], text: str
) -> None:
    layers = chain(3)
    layers[number] = replace(layers[number], **changes)
    held = {layers[1].path: ("s1",)}
    stack = disk(*layers, active=None if number == 1 else layers[1].image, held=held)
    assert text in reason(stack, ORIGIN)


def test_what_is_inside_the_base_does_not_keep_another_from_coming_down() -> None:
    layers = chain(2)
    layers[0] = replace(layers[0], inside=SAVED)
    operations, end = settle(disk(*layers))
    assert words(operations) == [("Down", layers[1].path)]
    assert end.layers[ORIGIN.path].inside == SAVED


def test_a_leaf_with_something_inside_stays() -> None:
    left = overlay(1)
    kept = disk(layer(ORIGIN), layer(left, ORIGIN, inside=SAVED), active=ORIGIN)
    assert reason(kept, left) == "it holds the snapshot inside 'by hand'"


def test_an_image_that_no_snapshot_knows_is_left_alone() -> None:
    left = overlay(1)
    kept = disk(layer(ORIGIN), layer(left, ORIGIN, is_known=False), active=ORIGIN)
    assert settle(kept)[0] == []


def test_what_the_users_image_stands_on_is_left_alone() -> None:
    template = Image("/vm/template.qcow2", "qcow2")
    stack = disk(
        layer(ORIGIN, template), layer(overlay(1), ORIGIN), layer(template, is_ours=False),
        active=overlay(1),
    )  # fmt: skip
    operations, end = settle(stack)
    assert words(operations) == [("Down", overlay(1).path)]
    assert template.path in end.layers


# --- the user's path -----------------------------------------------------------------------------


def test_a_copy_takes_the_users_path() -> None:
    operations, end = settle(disk(layer(ORIGIN), layer(overlay(1))))
    assert words(operations) == [("Replace", overlay(1).path)]
    assert (end.active, list(end.layers)) == (ORIGIN, [ORIGIN.path])


def test_a_copy_of_another_format_is_put_onto_the_users_image_and_comes_down() -> None:
    operations, end = settle(disk(layer(RAW), layer(overlay(1, RAW))))
    path = overlay(1, RAW).path
    assert words(operations) == [("Up onto the origin", path), ("Down", path)]
    assert end.active == RAW


@pytest.mark.parametrize(
    ("origin", "changes", "text"),
    [
        (ORIGIN, {"is_open": True}, "only while the VM is off"),
        (RAW, {"inside": SAVED}, "a raw image cannot"),
        (RAW, {"virtual_size_bytes": GIB}, "sizes differ"),
    ],
)
def test_a_copy_that_cannot_take_the_users_path_leaves_it(
    origin: Image, changes: dict[str, Any], text: str
) -> None:
    copy = overlay(1, origin)
    assert text in reason(disk(layer(origin), layer(copy, **changes)), origin)


def test_the_users_path_is_never_removed() -> None:
    moved = disk(layer(ORIGIN), layer(overlay(1)), layer(overlay(2), overlay(1)),
                 held={overlay(1).path: ("s1",)})  # fmt: skip
    assert settle(moved)[0] == []
    assert "the path that the command line names" in reason(moved, ORIGIN)


def test_an_image_grows_by_what_comes_down_but_not_beyond_its_disk() -> None:
    base, top = chain(2)
    assert growth_bytes(top, base) == GIB
    full = replace(base, allocated_bytes=10 * GIB)
    assert growth_bytes(top, full) < GIB
    assert growth_bytes(top, replace(base, allocated_bytes=20 * GIB)) == 0

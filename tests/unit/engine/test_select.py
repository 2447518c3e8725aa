"""Which snapshot is meant: an id is never tried as a tag, nor a tag as an id."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import VM_ID, make_manifest, make_record
from calotype.engine.select import select
from calotype.errors import NotFoundError, RequestError
from calotype.model.vm import VmRecord
from calotype.store.store import Store

Chosen = Callable[..., str]

RECORD = make_record()
OTHER_VM = make_record(id="00000000000000a1", name="mail")

TWO = "2000000000000000"
TWENTY_ONE = "2100000000000000"
ABC = "abc0000000000000"
ABD = "abd0000000000000"
LEFT = "f000000000000000"


@pytest.fixture
def chosen(tmp_path: Path) -> Chosen:
    """Choose in a store of two VMs: an id that begins with 2, a tag "2", two equal tags."""
    store = Store(tmp_path)
    keep(store, RECORD, TWO, at=1)
    keep(store, RECORD, TWENTY_ONE, at=2, tag="once")
    keep(store, RECORD, ABC, at=4, tag="2")
    keep(store, RECORD, ABD, at=3, tag="twice")
    keep(store, RECORD, "e000000000000000", at=0, tag="twice")
    keep(store, RECORD, LEFT, at=9, method="left-behind")
    keep(store, OTHER_VM, "bbb0000000000000", at=10, tag="elsewhere")
    return lambda record=RECORD, **wanted: select(store, record, **wanted).id


def keep(store: Store, record: VmRecord, snapshot: str, at: int, **changes: Any) -> None:
    store.make_vm_folder(record.id)
    store.save(record)
    store.make_snapshot_folder(record.id, snapshot)
    instant = f"2025-01-02T03:04:{at:02}+00:00"
    store.commit(make_manifest(id=snapshot, vm_id=record.id, instant=instant, **changes))


def test_a_tag_that_looks_like_an_id_is_a_tag(chosen: Chosen) -> None:
    assert chosen(tag="2") == ABC


def test_an_id_that_looks_like_a_tag_is_an_id(chosen: Chosen) -> None:
    assert chosen(id_prefix="20") == TWO


@pytest.mark.parametrize("tag", [TWO, "20", "abc", LEFT, ABC])
def test_an_id_is_no_tag(chosen: Chosen, tag: str) -> None:
    with pytest.raises(NotFoundError, match="no snapshot with the tag"):
        chosen(tag=tag)


def test_a_tag_is_no_id(chosen: Chosen) -> None:
    with pytest.raises(RequestError, match="'once' is no id") as caught:
        chosen(id_prefix="once")
    assert "--tag" in caught.value.remedy


@pytest.mark.parametrize(
    ("prefix", "snapshot"),
    [("20", TWO), ("21", TWENTY_ONE), (TWO, TWO), ("abc", ABC), ("abd00", ABD), ("f", LEFT)],
)
def test_the_beginning_of_an_id_is_enough_if_it_is_the_only_one(
    chosen: Chosen, prefix: str, snapshot: str
) -> None:
    assert chosen(id_prefix=prefix) == snapshot


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        ({"id_prefix": "2"}, [TWO, TWENTY_ONE]),
        ({"id_prefix": "ab"}, [ABD, ABC]),
        ({"tag": "twice"}, ["e000000000000000", ABD]),
    ],
)
def test_more_than_one_is_refused_and_all_are_named(
    chosen: Chosen, wanted: dict[str, str], ids: list[str]
) -> None:
    with pytest.raises(NotFoundError) as caught:
        chosen(**wanted)
    assert caught.value.data["ids"] == ids
    assert all(snapshot in caught.value.problem for snapshot in ids)
    assert "--id" in caught.value.remedy


@pytest.mark.parametrize("tag", ["tw", "twice ", "TWICE", "", "%", "_"])
def test_a_tag_is_compared_whole(chosen: Chosen, tag: str) -> None:
    with pytest.raises(NotFoundError):
        chosen(tag=tag)


@pytest.mark.parametrize(
    "text", ["", "g", "2 ", " 2", "2\n", "A", "2%", "0x2", "-2", f"{TWO}0", "²"]
)
def test_what_can_be_no_id_is_refused(chosen: Chosen, text: str) -> None:
    with pytest.raises(RequestError, match="is no id"):
        chosen(id_prefix=text)


def test_an_id_that_is_not_there_is_not_found(chosen: Chosen) -> None:
    with pytest.raises(NotFoundError, match="'web' has no snapshot with an id that begins") as it:
        chosen(id_prefix="cafe")
    assert it.value.remedy == "see `calotype list web`"


def test_the_latest_is_the_latest_that_was_taken_and_not_one_left_behind(chosen: Chosen) -> None:
    assert chosen(latest=True) == ABC


def test_the_latest_is_by_the_instant_to_the_microsecond(tmp_path: Path) -> None:
    store = Store(tmp_path)
    keep(store, RECORD, ABC, at=1)
    whole_second = "2025-01-02T03:04:59+00:00"
    for snapshot, instant in ((TWO, whole_second.replace("+", ".000001+")), (ABD, whole_second)):
        store.make_snapshot_folder(VM_ID, snapshot)
        store.commit(make_manifest(id=snapshot, instant=instant))
    assert select(store, RECORD, latest=True).id == TWO


def test_a_vm_with_nothing_but_what_was_left_behind_has_no_latest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    keep(store, RECORD, LEFT, at=1, method="left-behind")
    with pytest.raises(NotFoundError, match="'web' has no snapshot yet"):
        select(store, RECORD, latest=True)


@pytest.mark.parametrize("wanted", [{"id_prefix": "bbb"}, {"tag": "elsewhere"}])
def test_the_snapshots_of_another_vm_do_not_count(chosen: Chosen, wanted: dict[str, str]) -> None:
    with pytest.raises(NotFoundError):
        chosen(**wanted)
    assert chosen(OTHER_VM, **wanted) == "bbb0000000000000"


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"id_prefix": "2", "tag": "2"},
        {"id_prefix": "2", "latest": True},
        {"tag": "2", "latest": True},
        {"id_prefix": "2", "tag": "2", "latest": True},
        {"id_prefix": "", "tag": ""},
    ],
)
def test_exactly_one_of_the_three_is_given(chosen: Chosen, wanted: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="which snapshot") as caught:
        chosen(**wanted)
    assert caught.value.remedy == "give exactly one of --id, --tag and --latest"

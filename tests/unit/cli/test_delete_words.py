"""What a delete says: what it frees, what it keeps, and how the rest is got rid of."""

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from builders import SNAPSHOT, make_record
from calotype.cli.main import main
from calotype.engine import deletion
from calotype.plan.delete import DeletePlan
from calotype.plan.layers import Stay
from calotype.plan.steps import TakePath
from calotype.store.store import Store

PLAN = DeletePlan(
    snapshots=(SNAPSHOT,),
    reparented={},
    freed_bytes=1 << 20,
    freed_limit_bytes=1 << 30,
    removes=(),
    merges=(),
    seconds=0.0,
    stays=(),
    blockers=(),
    mismatches=(),
    steps=(),
)
LEFT = Stay("/vm/copy", "it waits", is_needed=False)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALOTYPE_STORE", str(tmp_path / "store"))
    store = Store(tmp_path / "store")
    store.make_vm_folder(make_record().id)
    store.save(make_record(name="my web"))
    return tmp_path / "store"


@pytest.fixture
def said(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(plan: DeletePlan, *words: str) -> str:
        async def planned(*_: Any, **__: Any) -> DeletePlan:
            return plan

        assert root.exists()
        monkeypatch.setattr(deletion, "delete", planned)
        monkeypatch.setattr(deletion, "delete_plan_only", planned)
        with pytest.raises(SystemExit) as caught:
            main(["delete", "my web", "--leftovers", *words])
        assert caught.value.code == 0
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_what_waits_until_the_vm_is_off_is_told_with_the_commands(
    said: Any, words: tuple[str, ...]
) -> None:
    ways = ("once it is off: `calotype stop 'my web'", "`calotype delete 'my web' --leftovers")
    waiting = replace(PLAN, stays=(LEFT,), is_more_when_off=True)
    assert all(way in said(waiting, *words) for way in ways)
    assert "--leftovers" not in said(replace(waiting, is_more_when_off=False), *words)


def test_a_program_is_told_too(said: Any) -> None:
    told = json.loads(said(replace(PLAN, is_more_when_off=True), "--json"))
    assert told["is_more_when_off"] is True


def test_a_dry_run_names_what_takes_the_place_of_the_first_image(said: Any) -> None:
    plan = replace(PLAN, steps=(TakePath("/vm/copy.qcow2", "/vm/disk.qcow2"),))
    assert "replaces /vm/disk.qcow2 by /vm/copy.qcow2" in said(plan, "--dry-run")


@pytest.mark.parametrize(
    ("least", "most", "words"),
    [
        (1 << 20, 1 << 30, "frees: 1 MiB to 1.0 GiB (estimated)"),
        (1 << 20, 1 << 20, "frees: 1 MiB"),
        (-(1 << 20), 1 << 30, "frees: up to 1.0 GiB, or takes up to 1 MiB more (estimated)"),
        (-(1 << 30), -(1 << 20), "frees: nothing, but takes 1 MiB to 1.0 GiB more (estimated)"),
        (-(1 << 20), -(1 << 20), "frees: nothing, but takes 1 MiB more"),
    ],
)
def test_what_is_freed_and_what_is_taken_is_told(
    said: Any, least: int, most: int, words: str
) -> None:
    plan = replace(PLAN, freed_bytes=least, freed_limit_bytes=most)
    assert f"{words}\n" in said(plan, "--dry-run")
    assert f"deleted 1 snapshot, {words.replace('frees:', 'freed')}\n" in said(plan)

"""A first run that fails takes its VM away again, unless it is somebody else's by then."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from calotype.engine import defining, lifecycle
from calotype.errors import CalotypeError, ConflictError, QemuError
from calotype.model.vm import VmRecord
from calotype.store.store import Store

ARGV = ("/bin/false", "-S")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def run(store: Store) -> CalotypeError:
    """Run a VM whose QEMU does not start; why it was not."""
    with pytest.raises(CalotypeError) as refused:
        asyncio.run(lifecycle.run(store, "web", ARGV, "/"))
    return refused.value


@pytest.fixture
def taken_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[contextlib.ExitStack]:
    """Somebody else comes between a definition and what follows it."""
    with contextlib.ExitStack() as stack:
        define = defining.define_new

        def defined(*words: object) -> VmRecord | None:
            new = define(*words)  # type: ignore[arg-type]
            assert new is not None
            stack.enter_context(store.locked(new, "start"))
            return new

        monkeypatch.setattr(defining, "define_new", defined)
        yield stack


def test_a_first_run_that_fails_leaves_no_vm(store: Store) -> None:
    assert isinstance(run(store), QemuError)
    assert store.records() == []
    assert list((store.root / "vms").iterdir()) == []


def test_a_vm_that_somebody_else_is_at_is_left_to_him(
    store: Store, taken_up: contextlib.ExitStack
) -> None:
    assert isinstance(run(store), ConflictError)
    assert [record.name for record in store.records()] == ["web"]
    taken_up.close()


def test_a_vm_that_somebody_else_has_started_since_is_his(
    store: Store, taken_up: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = lifecycle._drop

    def later(store: Store, new: VmRecord) -> None:
        store.save(replace(new, cwd="/tmp"))
        taken_up.close()
        drop(store, new)

    monkeypatch.setattr(lifecycle, "_drop", later)
    run(store)
    assert [record.cwd for record in store.records()] == ["/tmp"]

"""What the tests with a witness share: let it testify, break a take on purpose, kill a command."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from calotype.engine import operations
from calotype.plan import window
from calotype.plan.take_plan import TakeRequest
from calotype.plan.window import WindowMethod
from calotype.store.store import Store
from calotype.testing.witness import Verdict
from calotype.testing.witness_vm import WitnessVm

Boot = Callable[..., WitnessVm]


def restore(vm: WitnessVm, *which: str) -> Verdict:
    """Crash the VM, restore it, and let it testify."""
    vm.kill()
    mark = vm.console_size()
    vm.calotype("restore", vm.name, *which)
    return vm.testimony(mark)


def assert_consistent(verdict: Verdict) -> None:
    assert verdict.is_consistent, verdict
    assert verdict.boots == 0, "the guest was booted, not restored"


def assert_sound(vm: WitnessVm) -> None:
    """The guest runs on, and complains of nothing; nor does qemu-img."""
    mark = vm.console_size()
    verdict = vm.testimony(mark)
    assert verdict.is_consistent, verdict
    for path in vm.folder.glob("*.qcow2"):
        vm.check_image(path)


def broken_take(
    vm: WitnessVm,
    monkeypatch: pytest.MonkeyPatch,
    rows: Mapping[Any, Any],
    method: WindowMethod = "live",
) -> str:
    """Take a snapshot with a transition table that was broken on purpose."""
    table = {**window.TABLES[method, True], **rows}
    with monkeypatch.context() as patched:
        patched.setitem(window.TABLES, (method, True), table)
        store = Store(vm.store)
        return asyncio.run(operations.take(store, vm.name, TakeRequest())).id


def assert_caught(vm: WitnessVm, take: Callable[[], str]) -> None:
    """An unsound order shows only if the guest wrote in the gap, which a few tries will see.

    A sound take goes before each: it splits huge pages, so that QEMU takes longer to set up the
    next one, and the gap is wider.
    """
    for _ in range(10):
        vm.calotype("take", vm.name)
        snapshot = take()
        vm.await_rounds(20, vm.console_size())
        verdict = restore(vm, "--id", snapshot)
        assert verdict.has_testified
        if not verdict.is_consistent:
            return
    pytest.fail("the witness did not notice")


def struck(vm: WitnessVm, moment: str, deed: str, *words: str) -> "subprocess.Popen[bytes]":
    """Run a command, with something happening at a moment of it; it is not waited for."""
    return subprocess.Popen(
        [sys.executable, "-m", "calotype.testing.crash", moment, deed, *words],
        cwd=vm.folder,
        env={**os.environ, "CALOTYPE_STORE": str(vm.store)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def exit_code_at(vm: WitnessVm, moment: str, deed: str, *words: str) -> int:
    """The exit code of a command, with something happening at a moment of it."""
    command = struck(vm, moment, deed, *words)
    command.communicate(timeout=120)
    return command.returncode

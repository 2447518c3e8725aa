"""No order of events, replies and timeouts makes the window accept parts of different instants.

`World` is a QEMU reduced to what matters: a guest that advances whenever it runs, a save that
captures RAM at the moment QEMU would, a transaction that captures the disks, and one wire on which
replies and events travel in order. Hypothesis chooses who moves next: QEMU's main loop, its
migration thread, the wire, the clock, or a stranger who stops and continues the VM.
"""

import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from calotype.plan.window import (
    TABLES,
    Accepted,
    Command,
    Event,
    Failed,
    Failure,
    Input,
    Interrupt,
    Lost,
    Reply,
    State,
    Tick,
    Window,
    WindowMethod,
)

Case = tuple[WindowMethod, bool]
CASES = sorted(TABLES)
MOVES = (
    ["main"] * 6
    + ["thread"] * 4
    + ["wire"] * 6
    + ["tick"] * 2
    + ["guest", "guest", "stranger-cont", "stranger-stop", "refuse", "late", "lost"]
)


class World:
    """A QEMU and its guest, moved one small step at a time."""

    def __init__(self, method: WindowMethod, *, was_running: bool) -> None:
        self.gives_back = method != "live-storage-first"
        self.is_background = method.startswith("live")
        self.running = was_running
        self.guest = 0
        self.ram: int | None = None
        self.disks: int | None = None
        self.save = "none"
        self.protected = False
        self.found_running = False
        self.commands: deque[Command] = deque()
        self.wire: deque[Input] = deque()
        self.elapsed_ms = 0.0
        self.refuse_next = False
        self.at_us = 0

    def event(self, name: str) -> None:
        self.at_us += 1
        self.wire.append(Event(name, self.at_us))

    def stop(self) -> None:
        if self.running:
            self.running = False
            self.event("STOP")

    def resume(self) -> None:
        if not self.running:
            self.event("RESUME")
            self.running = True
            self.guest += 1

    def move(self, who: str) -> None:
        if who == "guest" and self.running:
            self.guest += 1
        elif who == "main" and self.commands:
            self.answer(self.commands.popleft())
        elif who == "thread":
            self.thread()
        elif who == "stranger-cont":
            self.resume()
        elif who == "stranger-stop":
            self.stop()
        elif who == "refuse":
            self.refuse_next = True

    def thread(self) -> None:
        """The migration thread: set-up, QEMU's own stop, protection, QEMU's own resume."""
        if self.save == "setup":
            self.save = "active"
        elif self.save == "active" and self.is_background and self.ram is None:
            self.found_running = self.running
            self.stop()
            self.ram = self.guest
            self.save = "protecting"
        elif self.save == "protecting":
            if self.found_running or not self.gives_back:
                self.resume()
            self.protected = True
            self.save = "saving"
        elif self.save == "active" and not self.is_background:
            self.stop()
            self.ram = self.guest
            self.save = "completed"

    def answer(self, command: Command) -> None:
        name = command.execute
        if self.refuse_next and name != "query-status":
            self.refuse_next = False
            self.wire.append(Failure(name, "refused"))
            return
        value: dict[str, Any] = {}
        if name == "stop":
            self.stop()
        elif name == "cont":
            self.resume()
        elif name == "migrate":
            self.save = "setup"
        elif name == "transaction":
            self.disks = self.guest
        elif name == "migrate_cancel":
            self.save = "cancelled" if self.save != "none" else "none"
        elif name == "query-migrate":
            pages = 7 if self.protected or self.save == "completed" else 0
            status = "active" if self.save in ("protecting", "saving") else self.save
            value = {"status": status, "ram": {"normal": pages, "duplicate": 0}}
        elif name == "query-status":
            value = {"running": self.running, "status": "running" if self.running else "paused"}
        self.wire.append(Reply(name, value))


def play(
    case: Case, moves: Sequence[str], *, limit_ms: float = 50.0
) -> tuple[World, Window, list[Accepted | Failed]]:
    method, was_running = case
    world = World(method, was_running=was_running)
    window = Window(
        method,
        was_running=was_running,
        migrate={"uri": "file:x"},
        actions=[{"type": "blockdev-snapshot"}],
        limit_ms=limit_ms,
    )
    outputs = window.begin()
    ends: list[Accepted | Failed] = []
    for move in moves:
        for output in outputs:
            if isinstance(output, Command):
                world.commands.append(output)
            else:
                ends.append(output)
        outputs = []
        if ends:
            break
        if move == "wire" and world.wire:
            outputs = window.feed(world.wire.popleft())
        elif move in ("tick", "late"):
            world.elapsed_ms += 1.0 if move == "tick" else 60.0
            outputs = window.feed(Tick(world.elapsed_ms))
        elif move == "lost":
            outputs = window.feed(Lost("gone"))
        else:
            world.move(move)
    return world, window, ends


def is_sound(case: Case, world: World) -> bool:
    method, _ = case
    return method == "storage-only" or (world.ram is not None and world.ram == world.disks)


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_what_is_accepted_is_of_one_instant(case: Case, data: st.DataObject) -> None:
    moves = data.draw(st.lists(st.sampled_from(MOVES), max_size=120))
    world, _, ends = play(case, moves)
    assert len(ends) <= 1
    if ends and isinstance(ends[0], Accepted):
        assert is_sound(case, world)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_undisturbed_window_is_accepted(case: Case) -> None:
    world, window, ends = play(case, ["main", "wire", "thread", "wire", "tick"] * 40)
    assert [type(end) for end in ends] == [Accepted]
    assert window.state is State.ACCEPTED
    assert is_sound(case, world)
    assert world.running is case[1]


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_happened_the_guest_runs_again_where_it_ran(
    case: Case, data: st.DataObject
) -> None:
    strange = ("stranger-stop", "stranger-cont", "lost")
    quiet = [move for move in MOVES if move not in strange]
    moves = data.draw(st.lists(st.sampled_from(quiet), max_size=80))
    calm = ["main", "thread", "wire", "main", "wire", "tick"] * 60
    world, _, ends = play(case, [*moves, *calm])
    assert len(ends) == 1
    if isinstance(ends[0], Accepted) or ends[0].settled:
        assert world.running is case[1]


BROKEN: Mapping[str, Mapping[tuple[State, str], tuple[State, str | None]]] = {
    "storage after cont": {
        (State.WATCHING, "protected"): (State.RESUMING, "cont"),
        (State.RESUMED, "ok cont"): (State.STORING, "transaction"),
        (State.STORING, "ok transaction"): (State.ACCEPTED, None),
    },
    "active taken for protected": {
        (State.WATCHING, "unprotected"): (State.STORING, "transaction"),
    },
    "a stranger's resume overlooked": {
        (State.WATCHING, "RESUME"): (State.WATCHING, None),
        (State.WAITING, "RESUME"): (State.WAITING, None),
        (State.STORING, "RESUME"): (State.STORING, None),
        (State.RESUMING, "ok cont"): (State.ACCEPTED, None),
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case: Case = ("live", True)
    monkeypatch.setitem(TABLES, case, {**TABLES[case], **BROKEN[name]})
    moves = ("main", "thread", "wire", "tick", "guest") * 4 + ("stranger-cont",)
    for seed in range(500):
        world, _, ends = play(case, random.Random(seed).choices(moves, k=200))
        if ends and isinstance(ends[0], Accepted) and not is_sound(case, world):
            return
    pytest.fail("the twin went unnoticed")


def test_a_stranger_who_had_paused_the_vm_is_not_overruled() -> None:
    window = Window("live", was_running=True, migrate={"uri": "x"}, actions=[], limit_ms=1000.0)
    assert window.begin() == [Command("stop", {})]
    assert window.feed(Reply("stop", {})) == [Command("query-migrate", {})]
    window.feed(Reply("query-migrate", {}))
    (end,) = window.feed(Reply("query-status", {"running": False}))
    assert isinstance(end, Failed)
    assert end.reason == "the guest was already stopped when the pause was to begin"
    assert end.settled


@pytest.mark.parametrize("had_paused", [True, False])
def test_a_retreat_before_stop_is_answered_learns_who_stopped_the_guest(
    *, had_paused: bool
) -> None:
    window = Window("live", was_running=True, migrate={"uri": "x"}, actions=[], limit_ms=1000.0)
    window.begin()
    assert window.feed(Interrupt()) == [Command("query-migrate", {})]
    if not had_paused:
        assert window.feed(Event("STOP", 1)) == []
    window.feed(Reply("stop", {}))
    assert window.feed(Reply("query-migrate", {})) == [Command("query-status", {})]
    outputs = window.feed(Reply("query-status", {"running": False}))
    ended = Failed("interrupted", limit=False, settled=True)
    assert outputs == ([ended] if had_paused else [Command("cont", {})])


def test_the_pause_limit_leads_to_the_retreat_and_names_itself() -> None:
    calm = ["main", "thread", "wire", "tick"] * 40
    _, _, ends = play(("live", True), ["main", "wire", "late", *calm])
    assert ends == [Failed("the pause reached its limit of 50 ms", True, True)]


def test_a_refused_transaction_ends_with_qemus_own_words() -> None:
    window = Window("live", was_running=True, migrate={"uri": "x"}, actions=[], limit_ms=1000.0)
    window.begin()
    for arrived in (
        Event("STOP", 1),
        Reply("stop", {}),
        Reply("migrate", {}),
        Reply("query-migrate", {"status": "active", "ram": {"normal": 1, "duplicate": 0}}),
    ):
        (command,) = window.feed(arrived) or (None,)
    assert command == Command("transaction", {"actions": []})
    outputs = window.feed(Failure("transaction", "No space left on device"))
    commands = [output.execute for output in outputs if isinstance(output, Command)]
    assert commands == ["cont", "migrate_cancel", "query-migrate"]
    window.feed(Reply("query-migrate", {"status": "cancelled"}))
    assert window.feed(Reply("query-status", {"running": True})) == [
        Failed("QEMU refused transaction: No space left on device", False, True)
    ]

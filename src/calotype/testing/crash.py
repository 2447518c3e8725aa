"""Crash injection: run one command of Calotype, and have something happen at an exact moment.

    python -m calotype.testing.crash MOMENT DEED [--without STEP,...] WORDS...

The command is the real one, in a process of its own, on a real QEMU; only the moment is chosen.
Two moments with a deed each are joined by `+`, and so are their deeds.

=================  ==============================================================================
moment             when
=================  ==============================================================================
doing:N            step N was noted in the journal; its effect has not begun
done:N             the effect of step N is done, and nothing after it
sent:COMMAND       that command was sent inside the paused window, a millisecond ago
handing:N          the N-th act of a handover is about to begin
handing:run        all is handed over and recorded, and the new guest is about to be let run
switch:COMMAND:N   that command was sent for the N-th time while a guest that stands still goes over
                   from an overlay to the image below, a millisecond ago
switch:record:N    ... the record was written for the N-th time there
answer:COMMAND:N   ... that command was answered for the N-th time there
undoing:N          the N-th undo of a step is about to begin
undone:N           the N-th undo of a step is done
applied:N          the N-th effect of a step is done, by whoever finishes what was cut off too
=================  ==============================================================================

=================  ==============================================================================
deed               what happens then
=================  ==============================================================================
kill-self          SIGKILL of the command
stop-self          SIGSTOP of the command
kill-qemu          SIGKILL of QEMU
hang-qemu          SIGSTOP of QEMU
kill-new           SIGKILL of a QEMU that was started beside it
kill-guard         SIGKILL of the guard of the pause
EIO, ENOSPC        the effect fails with this error of the host
ask:FD             a byte is sent to that socket and one is waited for: the caller does something
=================  ==============================================================================

`--without` takes out what undoes a kind of step, what does one that is never undone, the guard, or
the sweep: the twin of a test that everything is undone. It also breaks the order in which a guest
goes over (`order`: the record is written last), or leaves the guard ignorant of it (`switch`).
Waits for a QEMU that hangs are shortened: hundreds of cells take minutes.
"""

import asyncio
import contextlib
import errno
import math
import os
import runpy
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import msgspec

from calotype import guard
from calotype.engine import handover_effects, launch, switching
from calotype.engine.abandon_effects import ABANDON_EFFECTS
from calotype.engine.effects import EFFECTS
from calotype.engine.world import Effect
from calotype.model.vm import Process
from calotype.plan import window
from calotype.plan.steps import Step
from calotype.plan.window import Command, Input, Output, Window
from calotype.qemu import freezing, guarding, migration, monitor, observe, process
from calotype.qemu.monitor import Monitor
from calotype.qemu.process import start_ticks
from calotype.store import journal as journals
from calotype.store.files import host_errors
from calotype.store.journal import Journal
from calotype.store.store import Store

PATIENCE_S = 2.0
Work = Callable[..., Awaitable[None]]
_EFFECTS = cast("dict[type[Step], Effect]", EFFECTS)
_ABANDON_EFFECTS = cast("dict[type[Step], Effect]", ABANDON_EFFECTS)


def _qemu() -> int:
    """The pid of the one QEMU in the store."""
    (path,) = Path(os.environ["CALOTYPE_STORE"]).glob("vms/*/process.json")
    qemu = msgspec.json.decode(path.read_bytes(), type=Process)
    return qemu.pid if start_ticks(qemu.pid) == qemu.start_ticks else 0


def _signal_qemu(number: signal.Signals) -> None:
    if pid := _qemu():
        os.kill(pid, number)


def _kill_new() -> None:
    (folder,) = Path(os.environ["CALOTYPE_STORE"]).glob("vms/*")
    for qemu in process.find(launch.MARK, folder.name):
        if qemu.pid != _old_pid(folder):
            process.kill(qemu)


def _old_pid(folder: Path) -> int:
    """Whose record was last written before the handover."""
    (journal,) = (folder / "journal").iterdir()
    entries = journals.read(journal)
    began = entries[0]
    assert isinstance(began, journals.Began)
    assert began.qemu is not None
    return began.qemu.pid


def _kill_guard() -> None:
    """End the guard that we started; other commands have guards of their own."""
    ours = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for pid in ours:
        if guard.__file__.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            os.kill(int(pid), signal.SIGKILL)


def _fail(number: int) -> None:
    with host_errors(Path(os.devnull)):
        raise OSError(number, os.strerror(number))


def _ask(descriptor: int) -> None:
    os.write(descriptor, b"?")
    os.read(descriptor, 1)


DEEDS: dict[str, Callable[[], None]] = {
    "kill-self": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop-self": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill-qemu": lambda: _signal_qemu(signal.SIGKILL),
    "hang-qemu": lambda: _signal_qemu(signal.SIGSTOP),
    "kill-new": _kill_new,
    "kill-guard": _kill_guard,
    "EIO": lambda: _fail(errno.EIO),
    "ENOSPC": lambda: _fail(errno.ENOSPC),
}


def _deed(words: str) -> Callable[[], None]:
    word, _, descriptor = words.partition(":")
    return partial(_ask, int(descriptor)) if word == "ask" else DEEDS[words]


class Striker:
    """Does each deed once, at its moment."""

    def __init__(self, moments: str, deeds: str) -> None:
        listed = map(_deed, deeds.split("+"))
        self._deeds = dict(zip(moments.split("+"), listed, strict=True))
        self._counts = Counter[str]()
        self._switched: Counter[str] | None = None
        """How often what happened in the switch that is under way."""

    def reach(self, moment: str) -> None:
        """Say that a moment has come."""
        if deed := self._deeds.pop(moment, None):
            deed()

    def watch_journal(self) -> None:
        """Reach `doing` and `done`."""
        note_doing, note_done = Journal.note_doing, Journal.note_done

        def doing(journal: Journal, step: int) -> None:
            note_doing(journal, step)
            self.reach(f"doing:{step}")

        def done(journal: Journal, step: int, spent_ms: float) -> None:
            self.reach(f"done:{step}")
            note_done(journal, step, spent_ms)

        _replace(Journal, note_doing=doing, note_done=done)

    def watch_window(self) -> None:
        """Reach `sent`, as soon as the pump has handed the command to the socket."""
        begin, feed = Window.begin, Window.feed

        def began(passing: Window) -> list[Output]:
            return self._noting_sent(begin(passing))

        def fed(passing: Window, arrived: Input) -> list[Output]:
            return self._noting_sent(feed(passing, arrived))

        _replace(Window, begin=began, feed=fed)

    def _noting_sent(self, outputs: list[Output]) -> list[Output]:
        for output in outputs:
            if isinstance(output, Command):
                moment = f"sent:{output.execute}"
                asyncio.get_running_loop().call_later(0.001, self.reach, moment)
        return outputs

    def watch_handover(self) -> None:
        """Reach `handing`."""
        perform, let_run, places = handover_effects.perform, handover_effects.let_run, count()

        async def performed(*words: Any) -> None:
            self.reach(f"handing:{next(places)}")
            await perform(*words)

        async def ran(new: Monitor) -> None:
            self.reach("handing:run")
            await let_run(new)

        handover_effects.perform = performed  # type: ignore[assignment]
        handover_effects.let_run = ran

    def watch_switch(self) -> None:
        """Reach `switch`, as soon as the command is on its way, or the record is written."""
        paused, record_newest = switching.paused, switching.record_newest
        execute = monitor.Monitor.execute

        async def watched(*what: Any) -> None:
            self._switched = Counter()
            await paused(*what)
            self._switched = None

        def recorded(*what: Any) -> None:
            record_newest(*what)
            if moment := self._in_switch("record"):
                self.reach(moment)

        async def executed(connection: monitor.Monitor, command: str, **arguments: Any) -> Any:
            moment = self._in_switch(command)
            if not moment:
                return await execute(connection, command, **arguments)
            asyncio.get_running_loop().call_later(0.001, self.reach, moment)
            answer = await execute(connection, command, **arguments)
            self.reach(moment.replace("switch", "answer", 1))
            return answer

        _replace(monitor.Monitor, execute=executed)
        _replace(switching, paused=watched, record_newest=recorded)

    def _in_switch(self, what: str) -> str:
        if self._switched is None:
            return ""
        self._switched[what] += 1
        return f"switch:{what}:{self._switched[what]}"

    def watch_effects(self) -> None:
        """Reach `applied`, `undoing` and `undone`."""
        for kind, effect in _EFFECTS.items():
            apply = self._watched(effect.apply, "applying", "applied")
            revert = effect.revert and self._watched(effect.revert, "undoing", "undone")
            _EFFECTS[kind] = Effect(apply, revert)

    def _watched(self, do: Work, before: str, after: str) -> Work:
        async def watched(world: Any, step: Any) -> None:
            place = self._counts[before]
            self._counts[before] += 1
            self.reach(f"{before}:{place}")
            await do(world, step)
            self.reach(f"{after}:{place}")

        return watched


def _replace(owner: type | ModuleType, **functions: Callable[..., Any]) -> None:
    """Put functions of ours in the place of a class's or a module's own."""
    for name, function in functions.items():
        setattr(owner, name, function)


def take_out(mechanism: str) -> None:
    """Take out what undoes a kind of step or an instant, or what does one; or one of `_PARTS`."""
    for kind, effect in _EFFECTS.items():
        if kind.__name__ == mechanism:
            _EFFECTS[kind] = Effect(effect.apply if effect.revert else _do_nothing)
    for kind in _ABANDON_EFFECTS:
        if kind.__name__ == mechanism:
            _ABANDON_EFFECTS[kind] = Effect(_do_nothing)
    if mechanism in _PARTS:
        _PARTS[mechanism]()


def _without_guard() -> None:
    _replace(guarding, posted=_no_guard)
    _replace(freezing, posted_at_agent=_no_guard)


def _without_sweep() -> None:
    _replace(Store, sweep=lambda store, vm_id: None)  # noqa: ARG005 - its signature
    _replace(observe, sweep=_do_nothing)


def _without_switch() -> None:
    """Let the guard be told of no switch, so that it has none completed."""
    arm = guarding.Post.arm

    async def armed(post: guarding.Post, limit_s: float, _: object = None, **also: Any) -> None:
        await arm(post, limit_s, **also)

    _replace(guarding.Post, arm=armed)


def _without_order() -> None:
    """Have QEMU go over first, and record where to afterwards."""
    go_over, record_newest = switching.go_over, switching.record_newest

    async def wrong(world: Any, connection: Any, job: str, top: Any, base: Any, _: float) -> None:
        _replace(switching, record_newest=lambda *_: None)
        await go_over(world, connection, job, top, base, math.inf)
        await connection.execute("query-status")  # a moment to be struck at,
        await asyncio.sleep(0.1)  # and time for that
        record_newest(world, base, {top, base})

    _replace(switching, go_over=wrong)


_PARTS: dict[str, Callable[[], None]] = {
    "guard": _without_guard,
    "sweep": _without_sweep,
    "switch": _without_switch,
    "order": _without_order,
}


async def _do_nothing(*_: object) -> None:
    """Have no effect."""


@contextlib.asynccontextmanager
async def _no_guard(*_: object, **__: object) -> AsyncIterator["_NoGuard"]:
    yield _NoGuard()


class _NoGuard:
    """Stands by and does nothing."""

    async def arm(self, limit_s: float, change: object = None, **also: object) -> None:
        """Do nothing."""

    async def stand_down(self) -> bool:
        """Do nothing."""
        return True

    async def act(self, patience_s: float) -> bool:
        """Do nothing."""
        return patience_s > 0


def main(words: Sequence[str]) -> None:
    """Run one command, with something happening at a moment of it."""
    moment, deed, *rest = words
    monitor.REPLY_TIMEOUT_S = migration.SETTLE_S = PATIENCE_S
    switching.LIMIT_S = PATIENCE_S * 2
    window.GRACE_MS = PATIENCE_S * 1000
    if rest[0] == "--without":
        for mechanism in rest[1].split(","):
            take_out(mechanism)
        rest = rest[2:]
    striker = Striker(moment, deed)
    striker.watch_journal()
    striker.watch_window()
    striker.watch_handover()
    striker.watch_switch()
    striker.watch_effects()
    sys.argv = ["calotype", *rest]
    runpy.run_module("calotype", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

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
undoing:N          the N-th undo of a step is about to begin
undone:N           the N-th undo of a step is done
=================  ==============================================================================

=================  ==============================================================================
deed               what happens then
=================  ==============================================================================
kill-self          SIGKILL of the command
stop-self          SIGSTOP of the command
kill-qemu          SIGKILL of QEMU
hang-qemu          SIGSTOP of QEMU
kill-guard         SIGKILL of the guard of the pause
EIO, ENOSPC        the effect fails with this error of the host
ask:FD             a byte is sent to that socket and one is waited for: the caller does something
=================  ==============================================================================

`--without` takes out what undoes a kind of step, the guard, or the sweep: the twin of a test that
everything is undone. Waits for a QEMU that hangs are shortened: hundreds of cells take minutes.
"""

import asyncio
import contextlib
import errno
import os
import runpy
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec

from calotype import guard
from calotype.engine.abandon_effects import ABANDON_EFFECTS
from calotype.engine.effects import EFFECTS
from calotype.engine.world import Effect
from calotype.model.vm import Process
from calotype.plan import window
from calotype.plan.steps import Step
from calotype.plan.window import Command, Input, Output, Window
from calotype.qemu import guarding, migration, monitor, observe
from calotype.qemu.process import start_ticks
from calotype.store.files import host_errors
from calotype.store.journal import Journal
from calotype.store.store import Store

PATIENCE_S = 2.0
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


def _kill_guard() -> None:
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            is_guard = guard.__file__.encode() in command.read_bytes().split(b"\0")
        except OSError:
            continue
        if is_guard:
            os.kill(int(command.parent.name), signal.SIGKILL)


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
        self._undos = 0

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

    def watch_undo(self) -> None:
        """Reach `undoing` and `undone`."""
        for kind, effect in _EFFECTS.items():
            if effect.revert is not None:
                _EFFECTS[kind] = Effect(effect.apply, self._watched(effect.revert))

    def _watched(self, revert: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def watched(world: Any, step: Any) -> None:
            place, self._undos = self._undos, self._undos + 1
            self.reach(f"undoing:{place}")
            await revert(world, step)
            self.reach(f"undone:{place}")

        return watched


def _replace(owner: type, **functions: Callable[..., Any]) -> None:
    """Put functions of ours in the place of a class's own."""
    for name, function in functions.items():
        setattr(owner, name, function)


def take_out(mechanism: str) -> None:
    """Take out what undoes a kind of step or an instant; the guard; or the sweep of recover."""
    for kind, effect in _EFFECTS.items():
        if kind.__name__ == mechanism:
            _EFFECTS[kind] = Effect(effect.apply)
    for kind in _ABANDON_EFFECTS:
        if kind.__name__ == mechanism:
            _ABANDON_EFFECTS[kind] = Effect(_do_nothing)
    if mechanism == "guard":
        guarding.posted = _no_guard  # type: ignore[assignment]
    if mechanism == "sweep":
        _replace(Store, sweep=lambda store, vm_id: None)  # noqa: ARG005 - its signature
        observe.sweep = _do_nothing  # type: ignore[assignment]


async def _do_nothing(*_: object) -> None:
    """Have no effect."""


@contextlib.asynccontextmanager
async def _no_guard(*_: object) -> AsyncIterator["_NoGuard"]:
    yield _NoGuard()


class _NoGuard:
    """Stands by and does nothing."""

    async def arm(self, limit_s: float) -> None:
        """Do nothing."""

    async def stand_down(self) -> bool:
        """Do nothing."""
        return True


def main(words: Sequence[str]) -> None:
    """Run one command, with something happening at a moment of it."""
    moment, deed, *rest = words
    monitor.REPLY_TIMEOUT_S = migration.SETTLE_S = PATIENCE_S
    window.GRACE_MS = PATIENCE_S * 1000
    if rest[0] == "--without":
        for mechanism in rest[1].split(","):
            take_out(mechanism)
        rest = rest[2:]
    striker = Striker(moment, deed)
    striker.watch_journal()
    striker.watch_window()
    striker.watch_undo()
    sys.argv = ["calotype", *rest]
    runpy.run_module("calotype", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

"""How commands speak: words on standard output, one JSON object with `--json`, errors apart.

With `--json` standard output holds exactly one object, whether the command worked or not:
`{"schema": 1, ...}`, with a member `error` if it did not. A new schema number means that a member
changed its meaning or went away; members may be added at any time.
"""

import asyncio
import contextlib
import json
import math
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
import msgspec

from calotype.cli import completing
from calotype.cli.place import located
from calotype.errors import CalotypeError, HostError, InterruptError, StoreError

SCHEMA = 1

LONGEST_PROBLEM = 300
_CUT = " ... "

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Result = TypeVar("Result")


class Settings(NamedTuple):
    """What every command takes: where the store is, and how to speak."""

    store_path: Path
    as_json: bool
    is_store_named: bool = False
    """Whether the user said which store, so that a command that is suggested must say so too."""

    def suggested(self, *words: str) -> list[str]:
        """The words of a command that works on the same store."""
        store = ["--store", str(self.store_path)] if self.is_store_named else []
        return ["calotype", *words, *store]


class Finite(click.FloatRange):
    """A number of a range that has an end: not nan, not infinity."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read the number, as click wants it done."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--store` and `--json`, as the one argument `settings`."""

    @click.option("--store", metavar="DIR", help="Where everything is kept.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    @click.pass_context
    def wrapped(context: click.Context, /, store: str | None, as_json: bool, **rest: Any) -> Any:
        named = store or (context.obj or {}).get("store")
        try:
            return command(Settings(located(named), as_json, named is not None), **rest)
        except CalotypeError as error:
            error.remedy = _filled_in(error.remedy, rest.get("name"))
            raise

    wrapped.__doc__ = command.__doc__
    return wrapped


def _filled_in(remedy: str, name: str | None) -> str:
    """A remedy for the VM that was named: who gave it may not know which it was."""
    return remedy if name is None else re.sub(r"\bNAME\b", lambda _: shlex.quote(name), remedy)


def vm_name(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the argument that names a VM which there is."""
    return click.argument("name", shell_complete=completing.vm_names)(command)


def snapshot_choice(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the three ways to name a snapshot."""
    for option in (
        click.option("--latest", is_flag=True, help="The latest that was taken."),
        click.option(
            "--tag", metavar="TAG", shell_complete=completing.tags, help="The one with this tag."
        ),
        click.option(
            "--id",
            "id_prefix",
            metavar="ID",
            shell_complete=completing.ids,
            help="By id, or the beginning of one.",
        ),
    ):
        command = option(command)
    return command


def say(settings: Settings, value: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Print the result: *value* with `--json`, *lines* without; an interrupt comes too late now."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    say_meanwhile(settings, value, lines)


def say_meanwhile(settings: Settings, value: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Print what is so by now, of a command that goes on and can be interrupted; as `say`."""
    if settings.as_json:
        _say_json(value)
        return
    for line in lines:
        indent = line[: len(line) - len(line.lstrip(" "))]
        _print(indent + one_line(line))


def say_unfinished(
    settings: Settings, value: Mapping[str, Any], line: str, unfinished: int, name: str
) -> None:
    """Print the result of what could be done although an earlier operation is not over."""
    lines = [line]
    if unfinished:
        again = shlex.join(settings.suggested("recover", name))
        lines.append(f"an earlier operation on it is not over yet: `{again}` tells why")
    say(settings, {**value, "unfinished": unfinished}, lines)


def say_with_damage(
    settings: Settings,
    value: Mapping[str, Any],
    lines: Sequence[str],
    damage: Iterable[StoreError],
) -> None:
    """Print what could be found out, and name the files that are in the way of the rest."""
    found = list({str(error): error for error in damage}.values())
    say(settings, {**value, "damaged": [error_members(error) for error in found]}, lines)
    for error in found:
        tell_error(error)


def _print(said: str | bytes) -> None:
    """Print a line; that nobody reads any more is no failure, but a full disk is one."""
    from calotype.store.files import host_error  # noqa: PLC0415

    try:
        click.echo(said)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise host_error("standard output", error) from error


def _say_json(value: Mapping[str, Any]) -> None:
    """Print the one object; a path that is no UTF-8 is told by escapes, as JSON can."""
    told = {"schema": SCHEMA, **value}
    try:
        said = msgspec.json.encode(told, enc_hook=str)
    except UnicodeEncodeError:
        said = json.dumps(msgspec.to_builtins(told, enc_hook=str), separators=(",", ":")).encode()
    _print(said)


# --- errors --------------------------------------------------------------------------------------


def report_error(error: CalotypeError, words: Sequence[str]) -> int:
    """Print an error, as an object too if *words* ask for that; return the exit code.

    That nobody can be told is no reason to fail otherwise.
    """
    own = words[: words.index("--")] if "--" in words else words
    with contextlib.suppress(OSError):
        tell_error(error)
    with contextlib.suppress(OSError, HostError):
        if "--json" in own:
            _say_json({"error": error_members(error)})
    return error.exit_code


def tell_error(error: CalotypeError) -> None:
    """Print an error for people: what is wrong, what could not be undone, what to do."""
    if os.environ.get("CALOTYPE_DEBUG"):
        traceback.print_exception(error)
    remedy = [f"what to do: {error.remedy}"] if error.remedy else []
    for line in (_problem(error), *_notes(error), *remedy):
        click.echo(f"calotype: {one_line(line)}", err=True)


def error_members(error: CalotypeError) -> dict[str, Any]:
    """What a program is told of an error."""
    return {
        "family": error.family,
        "problem": _problem(error),
        "remedy": one_line(error.remedy),
        "notes": [one_line(note) for note in _notes(error)],
        **error.data,
    }


def _notes(error: CalotypeError) -> list[str]:
    return list(getattr(error, "__notes__", []))


def _problem(error: CalotypeError) -> str:
    """What is wrong, in one line; QEMU's words are cut short where the data holds all of them."""
    line = one_line(error.problem)
    if len(line) <= LONGEST_PROBLEM or "qemu" not in error.data:
        return line
    half = (LONGEST_PROBLEM - len(_CUT)) // 2
    return f"{line[:half]}{_CUT}{line[-half:]}"


def one_line(text: str) -> str:
    """Fold *text* into one line that no terminal takes for an order."""
    folded = "; ".join(filter(None, map(str.strip, text.splitlines())))
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in folded
    )


# --- work that can be interrupted ----------------------------------------------------------------


class Stopped(NamedTuple):
    """What is said of work that was interrupted."""

    problem: str
    remedy: str
    meanwhile: str = "stopping; please wait"
    """Said if somebody is impatient."""


STOPPED = Stopped("stopped", "give the command again when it suits")
UNDONE = Stopped(
    "stopped: what was begun has been undone",
    "give the command again when it suits",
    "undoing what was begun; please wait",
)
NOT_ALL_UNDONE = Stopped(
    "stopped, but not all of what was begun could be undone", "see what is said of each step"
)


def run_async(work: Coroutine[Any, Any, Result], stopped: Stopped = STOPPED) -> Result:
    """Run *work*; Ctrl-C and SIGTERM cancel it once, which undoes what it began.

    Args:
        work: What is to be done.
        stopped: What is said if it is interrupted: `UNDONE` where that is so.

    Raises:
        InterruptError: It was cancelled.
    """

    async def supervised() -> Result:
        task = asyncio.create_task(work)
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, _cancel, task, stopped)
        try:
            return await task
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        return asyncio.run(supervised())
    except (asyncio.CancelledError, KeyboardInterrupt) as error:
        raise _interrupted(error, stopped) from error
    finally:
        work.close()  # it may never have begun
        _answer_as_before(before)


def _answer_as_before(answers: Mapping[signal.Signals, Any]) -> None:
    """Let signals through again, but for one that came when all was done or undone already."""
    for number, answer in answers.items():
        signal.signal(number, signal.SIG_IGN)
        signal.signal(number, answer)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, answers)


def _cancel(task: asyncio.Task[Any], stopped: Stopped) -> None:
    if task.cancelling():
        click.echo(f"calotype: {stopped.meanwhile}", err=True)
    task.cancel()


def _interrupted(error: BaseException, stopped: Stopped) -> InterruptError:
    notes = getattr(error, "__notes__", [])
    said = NOT_ALL_UNDONE if notes and stopped is UNDONE else stopped
    told = InterruptError(said.problem, said.remedy)
    for note in notes:
        told.add_note(note)
    return told


# --- words ---------------------------------------------------------------------------------------


def size(count: int) -> str:
    """A number of bytes for people."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:  # noqa: PLR2004 - the unit's own step
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def duration(seconds: float) -> str:
    """A time span for people: its two greatest units, or a fraction of a second."""
    if seconds < 60:  # noqa: PLR2004 - the unit's own step
        return f"{seconds:.1f} s"
    left = round(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        parts += [f"{count} {unit}"] if count or parts else []
    return " ".join(parts[:2])


def is_terminal() -> bool:
    """Whether somebody watches standard error."""
    is_open = sys.stderr is not None  # Python has none where the descriptor is closed
    return is_open and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

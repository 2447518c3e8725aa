"""How commands speak: words on standard output, one JSON object with `--json`, errors apart.

With `--json` standard output holds exactly one object, whether the command worked or not:
`{"schema": 1, ...}`, with a member `error` if it did not. A new schema number means that a member
changed its meaning or went away; members may be added at any time.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
import msgspec

from calotype.errors import CalotypeError, InterruptError

SCHEMA = 1

Result = TypeVar("Result")


class Settings(NamedTuple):
    """What every command takes: where the store is, and how to speak."""

    store_path: Path
    as_json: bool


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--store` and `--json`, as the one argument `settings`."""

    @click.option("--store", metavar="DIR", help="Where everything is kept.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    @click.pass_context
    def wrapped(context: click.Context, /, store: str | None, as_json: bool, **rest: Any) -> Any:
        path = store or (context.obj or {}).get("store") or _default_store()
        return command(Settings(Path(path).absolute(), as_json), **rest)

    wrapped.__doc__ = command.__doc__
    return wrapped


def _default_store() -> str:
    import platformdirs  # noqa: PLC0415 - only where no store is named

    return platformdirs.user_data_dir("calotype")


def snapshot_choice(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the three ways to name a snapshot."""
    for option in (
        click.option("--latest", is_flag=True, help="The latest that was taken."),
        click.option("--tag", metavar="TAG", help="The one with this tag."),
        click.option("--id", "id_prefix", metavar="ID", help="By id, or the beginning of one."),
    ):
        command = option(command)
    return command


def say(settings: Settings, value: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Print the result: *value* with `--json`, *lines* without."""
    if settings.as_json:
        click.echo(msgspec.json.encode({"schema": SCHEMA, **value}))
        return
    for line in lines:
        click.echo(line)


def report_error(error: CalotypeError, words: Sequence[str]) -> int:
    """Print an error, and its notes, which tell what could not be undone; return the exit code."""
    notes = list(getattr(error, "__notes__", []))
    click.echo(f"calotype: {error.problem}", err=True)
    for note in notes:
        click.echo(f"calotype: {note}", err=True)
    if error.remedy:
        click.echo(f"calotype: what to do: {error.remedy}", err=True)
    own = words[: words.index("--")] if "--" in words else words
    if "--json" in own:
        told = {
            "family": error.family,
            "problem": error.problem,
            "remedy": error.remedy,
            "notes": notes,
            **error.data,
        }
        click.echo(msgspec.json.encode({"schema": SCHEMA, "error": told}, enc_hook=str))
    return error.exit_code


def run_async(work: Coroutine[Any, Any, Result]) -> Result:
    """Run *work*; Ctrl-C and SIGTERM cancel it once, which undoes what it began.

    Raises:
        InterruptError: It was cancelled.
    """

    async def supervised() -> Result:
        task = asyncio.create_task(work)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, _cancel, task)
        return await task

    try:
        return asyncio.run(supervised())
    except asyncio.CancelledError as error:
        stopped = InterruptError("stopped: what was begun has been undone")
        for note in getattr(error, "__notes__", []):
            stopped.add_note(note)
        raise stopped from error


def _cancel(task: asyncio.Task[Any]) -> None:
    if task.cancelling():
        click.echo("calotype: undoing what was begun; please wait", err=True)
    task.cancel()


def size(count: int) -> str:
    """A number of bytes for people."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:  # noqa: PLR2004 - the unit's own step
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def is_terminal() -> bool:
    """Whether somebody watches standard error."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

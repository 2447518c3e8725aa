"""`calotype logs`: what the guest's console, or QEMU itself, said."""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import click

from calotype.cli.output import Settings, common, say


@click.command("logs")
@click.argument("name")
@click.option("--qemu", is_flag=True, help="What QEMU itself said, instead of the console.")
@click.option("-f", "--follow", is_flag=True, help="Go on as more is said, while the VM runs.")
@common
def command(settings: Settings, name: str, qemu: bool, follow: bool) -> None:
    """Print what was said on the console of the VM NAME."""
    from calotype.engine import launch  # noqa: PLC0415
    from calotype.errors import InterruptError, NotFoundError  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    record = store.find(name)
    path = store.folder(record.id) / (launch.QEMU_LOG if qemu else launch.CONSOLE_LOG)
    running = launch.is_running(store, record)
    if running is not None and running.monitor and not (path.exists() and path.stat().st_size):
        raise NotFoundError(
            f"there are no logs of {name!r}, which was adopted",
            "what it says goes where its own command line sends it",
        )
    if not path.exists():
        raise NotFoundError(
            f"{name!r} has said nothing yet", f"`calotype start {shlex.quote(name)}`"
        )
    if settings.as_json:
        say(settings, {"vm": name, "text": path.read_text(errors="replace")}, [])
        return
    try:
        _copy(path, lambda: follow and launch.is_running(store, record) is not None)
    except KeyboardInterrupt:  # there is no other way to end it
        raise click.exceptions.Exit(InterruptError.exit_code) from None


def _copy(path: Path, goes_on: Callable[[], bool]) -> None:
    """Copy a log to standard output, and what is added to it while *goes_on*."""
    with path.open("rb") as log:
        while goes_on():
            _copy_rest(log)
            time.sleep(0.1)
        _copy_rest(log)


def _copy_rest(log: BinaryIO) -> None:
    while piece := log.read(1 << 16):
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()

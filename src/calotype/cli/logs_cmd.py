"""`calotype logs`: what the guest's console, or QEMU itself, said."""

import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import click

from calotype.cli.output import Settings, common, say, vm_name


@click.command("logs")
@vm_name
@click.option("--qemu", is_flag=True, help="What QEMU itself said, instead of the console.")
@click.option("-f", "--follow", is_flag=True, help="Go on as more is said, while the VM runs.")
@common
def command(settings: Settings, name: str, qemu: bool, follow: bool) -> None:
    """Print what was said on the console of the VM NAME."""
    from calotype.engine import launch  # noqa: PLC0415
    from calotype.errors import InterruptError, NotFoundError  # noqa: PLC0415
    from calotype.formats.secrets import redacted_log  # noqa: PLC0415
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
        text = redacted_log(path.read_text(errors="replace"), record.argv if qemu else ())
        say(settings, {"vm": name, "text": text}, [])
        return

    def told(line: bytes) -> bytes:
        text = line.decode(errors="surrogateescape")
        return redacted_log(text, record.argv).encode(errors="surrogateescape")

    goes_on = lambda: follow and launch.is_running(store, record) is not None  # noqa: E731
    try:
        _copy(path, goes_on, told if qemu else None)
    except KeyboardInterrupt:  # there is no other way to end it
        raise click.exceptions.Exit(InterruptError.exit_code) from None


Told = Callable[[bytes], bytes]
"""How a line is told; where there is none, bytes pass as they come."""


def _copy(path: Path, goes_on: Callable[[], bool], told: Told | None) -> None:
    """Copy a log to standard output, and what is added to it while *goes_on*."""
    if sys.stdout is None:  # it is closed: nobody reads
        return
    with path.open("rb") as log:
        while goes_on():
            _copy_rest(log, told, is_end=False)
            time.sleep(0.1)
        _copy_rest(log, told, is_end=True)


def _copy_rest(log: BinaryIO, told: Told | None, *, is_end: bool) -> None:
    """Copy what there is more; a line that is to be told otherwise waits until it is whole."""
    if told is None:
        while piece := log.read(1 << 16):
            sys.stdout.buffer.write(piece)
    else:
        while line := log.readline():
            if not is_end and not line.endswith(b"\n"):
                log.seek(-len(line), os.SEEK_CUR)
                break
            sys.stdout.buffer.write(told(line))
    sys.stdout.buffer.flush()

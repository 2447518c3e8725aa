"""A bar on standard error that shows how far an operation is."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from calotype.cli.output import is_terminal

if TYPE_CHECKING:
    from calotype.engine.progress import Progress


@contextlib.contextmanager
def progress_bar(quiet: bool) -> Iterator["Progress"]:
    """A progress bar on standard error, where that is a terminal."""
    from calotype.engine.progress import silent  # noqa: PLC0415

    if quiet or not is_terminal():
        yield silent
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("preparing", total=None)

        def show(phase: str, done_bytes: int, expected_bytes: int) -> None:
            total = max(done_bytes, expected_bytes) or None
            shown.update(task, description=phase, completed=done_bytes, total=total)

        yield show

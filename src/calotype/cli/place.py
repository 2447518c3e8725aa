"""Where the store is: where the command line says, or the environment, or the user's own data."""

from pathlib import Path

import click

from calotype.errors import HostError


def named_store(context: click.Context) -> Path:
    """The store of a command line that may not be complete."""
    return located(context.params.get("store") or context.find_root().params.get("store"))


def located(named: str | None) -> Path:
    """The folder of the store that was *named*, or of the one where none was."""
    path = Path(named or _default_store())
    return path if path.is_absolute() else working_directory() / path


def _default_store() -> str:
    import platformdirs  # noqa: PLC0415 - only where no store is named

    return platformdirs.user_data_dir("calotype")


def working_directory() -> Path:
    """Where the command was given; one that is gone cannot be.

    Raises:
        HostError: It was removed meanwhile.
    """
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise HostError("the working directory is gone", "`cd` to one that is there") from error

"""`calotype`: the group of commands, and the one place where errors become exit codes.

Each command is a module of its own that is imported when it is called, so that `--help` and `list`
do not wait for what only `take` needs.
"""

import importlib
import sys
from typing import Any

import click

from calotype import __version__
from calotype.cli.output import report_error
from calotype.errors import CalotypeError, RequestError

COMMANDS = (
    "run", "ps", "start", "stop", "forget", "console", "logs",
    "take", "list", "show", "restore",
    "delete", "du", "tag", "describe", "protect", "unprotect", "doctor",
)  # fmt: skip
"""In the order in which a user meets them; each is `calotype.cli.NAME_cmd`."""


class _Commands(click.Group):
    """A group that imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"calotype.cli.{cmd_name}_cmd")
        command: click.Command = module.command
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="calotype")
@click.option(
    "--store",
    metavar="DIR",
    envvar="CALOTYPE_STORE",
    help="Where everything is kept (also CALOTYPE_STORE).",
)
@click.pass_context
def cli(context: click.Context, store: str | None) -> None:
    """Point-in-time snapshots of whole QEMU virtual machines.

    A snapshot holds RAM, devices and every writable disk of one instant, or it does not exist.
    """
    context.obj = {"store": store}


def main(arguments: list[str] | None = None) -> None:
    """Run one command; the exit code says by whose fault it failed."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        result: Any = cli.main(args=words, prog_name="calotype", standalone_mode=False)
    except CalotypeError as error:
        sys.exit(report_error(error, words))
    except click.exceptions.Abort:
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        wrong = RequestError(error.format_message(), "see `calotype --help`")
        sys.exit(report_error(wrong, words))
    sys.exit(result if isinstance(result, int) else 0)

"""`calotype`: the group of commands, and the one place where errors become exit codes.

Each command is a module of its own that is imported when it is called, so that `--help` and `list`
do not wait for what only `take` needs.
"""

import importlib
import io
import os
import signal
import sys
from typing import Any

import click

from calotype import __version__
from calotype.cli.output import STOPPED, report_error
from calotype.errors import CalotypeError, InterruptError, RequestError

COMMANDS = (
    "run", "adopt", "ps", "start", "stop", "forget", "console", "logs",
    "take", "list", "show", "extract", "restore",
    "delete", "du", "tag", "describe", "protect", "unprotect", "history", "recover", "doctor",
    "serve", "completion",
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

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; click would answer Ctrl-C with an empty line and no reason."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise InterruptError(STOPPED.problem, STOPPED.remedy) from error


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
        _prepare()
        result: Any = cli.main(args=words, prog_name="calotype", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last resort
        code = report_error(_as_ours(error), words)
    finally:
        _finish_output()
    sys.exit(code)


def _prepare() -> None:
    """Let signals through, SIGTERM like Ctrl-C; no letter is one that a stream cannot say.

    Where a standard stream is closed no file of ours gets its number: a child would lose it.
    """
    while (nowhere := os.open(os.devnull, os.O_RDWR)) <= 2:  # noqa: PLR2004 - standard error
        pass
    os.close(nowhere)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _as_ours(error: BaseException) -> CalotypeError:
    """What is told of an exception that went all the way up."""
    match error:
        case CalotypeError():
            return error
        case click.exceptions.Abort() | KeyboardInterrupt():
            return InterruptError(STOPPED.problem, STOPPED.remedy)
        case click.ClickException():
            context = error.ctx if isinstance(error, click.UsageError) else None
            path = context.command_path if context else "calotype"
            return RequestError(error.format_message(), f"see `{path} --help`")
        case OSError(errno=int()):
            from calotype.store.files import host_error  # noqa: PLC0415

            ours: CalotypeError = host_error(error.filename or "the host", error)
        case _:
            ours = CalotypeError(
                f"a fault in Calotype itself: {type(error).__name__}: {error}",
                "report it, with the traceback that CALOTYPE_DEBUG=1 shows",
            )
    ours.__cause__ = error
    return ours


def _finish_output() -> None:
    """Say the rest; what cannot be said is dropped, or Python would fail on it once more."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)

"""`calotype run`: define a VM by QEMU's own command line, and start it."""

from typing import Any

import click

from calotype.cli.output import UNDONE, Settings, common, run_async, say
from calotype.cli.place import working_directory


@click.command("run")
@click.argument("name")
@click.argument("qemu_argv", nargs=-1, type=click.UNPROCESSED, metavar="-- QEMU-ARGV...")
@common
def command(settings: Settings, name: str, qemu_argv: tuple[str, ...]) -> None:
    """Define the VM NAME by QEMU's command line, and start it.

    QEMU runs apart from this terminal; its console is kept for `calotype console` and
    `calotype logs`. A VM of that name that does not run is defined anew, on the newest content of
    its disks.
    """
    from calotype.engine import lifecycle  # noqa: PLC0415
    from calotype.errors import RequestError  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    if not qemu_argv:
        raise RequestError(
            "QEMU's command line is missing", "calotype run NAME -- qemu-system-x86_64 ..."
        )
    store = Store(settings.store_path)
    cwd = str(working_directory())
    for word in (cwd, *qemu_argv):
        _require_text(word)
    record = run_async(lifecycle.run(store, name, qemu_argv, cwd), UNDONE)
    told: dict[str, Any] = {
        "vm": record.name,
        "vm_id": record.id,
        "disks": [disk.name for disk in record.disks],
    }
    disks = ", ".join(disk.name for disk in record.disks) or "none"
    say(settings, told, [f"{record.name} runs; writable disks: {disks}"])


def _require_text(word: str) -> None:
    """Refuse what the record could not keep; bytes that are no UTF-8 reach us as surrogates."""
    from calotype.errors import RequestError  # noqa: PLC0415
    from calotype.model.names import is_text  # noqa: PLC0415

    if not is_text(word):
        raise RequestError(f"{word!r} is not UTF-8", "give the file or the folder another name")

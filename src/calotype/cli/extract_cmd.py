"""`calotype extract`: copy one disk, as a snapshot had it, into an image of its own."""

from typing import Any

import click

from calotype.cli.output import (
    Settings,
    Stopped,
    common,
    run_async,
    say,
    size,
    snapshot_choice,
    vm_name,
)
from calotype.cli.place import working_directory

_STOPPED = Stopped(
    "stopped: nothing was extracted, and nothing is left of it",
    "give the command again when it suits",
)


@click.command("extract")
@vm_name
@click.argument("disk")
@snapshot_choice
@click.option(
    "-o", "--output", required=True, metavar="FILE", help="The new image; nothing may be there yet."
)
@click.option(
    "--format",
    "image_format",
    type=click.Choice(["qcow2", "raw"]),
    default="qcow2",
    show_default=True,
    help="The format of the new image.",
)
@click.option(
    "--accept-touched",
    is_flag=True,
    help="Go on although a file's mode, owner or name was changed, if nothing else of it was.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print the path of the new image alone.")
@common
def command(
    settings: Settings,
    name: str,
    disk: str,
    id_prefix: str | None,
    tag: str | None,
    latest: bool,
    output: str,
    image_format: Any,
    accept_touched: bool,
    quiet: bool,
) -> None:
    """Copy the DISK of the VM NAME, as a snapshot had it, into an image that stands alone.

    The VM may run, and nothing of it is changed.
    """
    from calotype.cli.progress_bar import progress_bar  # noqa: PLC0415
    from calotype.engine.extraction import extract  # noqa: PLC0415
    from calotype.engine.select import select  # noqa: PLC0415
    from calotype.plan.contents import plan_extraction  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path)
    record = store.find(name)
    entry = select(store, record, id_prefix=id_prefix, tag=tag, latest=latest)
    manifest = store.manifest(record.id, entry.id)
    path = str(working_directory() / output)
    plan = plan_extraction(manifest, disk, path, image_format)
    with progress_bar(quiet or settings.as_json) as progress:
        work = extract(
            store, record, manifest, plan, accept_touched=accept_touched, progress=progress
        )
        taken_bytes = run_async(work, _STOPPED)
    told = {
        "vm": name,
        "id": entry.id,
        "disk": plan.part.disk,
        "path": path,
        "format": image_format,
        "virtual_size_bytes": plan.size_bytes,
        "bytes": taken_bytes,
    }
    line = f"{path}: {size(taken_bytes)}, a disk of {size(plan.size_bytes)}"
    say(settings, told, [path if quiet else line])

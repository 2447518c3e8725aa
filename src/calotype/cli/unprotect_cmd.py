"""`calotype unprotect`: let a snapshot be deleted again."""

import click

from calotype.cli.output import Settings, common, run_async, say, snapshot_choice, vm_name


@click.command("unprotect")
@vm_name
@snapshot_choice
@common
def command(
    settings: Settings, name: str, id_prefix: str | None, tag: str | None, latest: bool
) -> None:
    """Let a snapshot of the VM NAME be deleted again."""
    from calotype.engine import labelling  # noqa: PLC0415
    from calotype.engine.select import select  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    entry = select(store, store.find(name), id_prefix=id_prefix, tag=tag, latest=latest)
    run_async(labelling.protect(store, name, entry.id, is_protected=False))
    told = {"vm": name, "id": entry.id, "is_protected": False}
    say(settings, told, [f"{entry.id} may be deleted"])

"""`calotype protect`: keep a snapshot from being deleted."""

import click

from calotype.cli.output import Settings, common, run_async, say, snapshot_choice, vm_name


@click.command("protect")
@vm_name
@snapshot_choice
@common
def command(
    settings: Settings, name: str, id_prefix: str | None, tag: str | None, latest: bool
) -> None:
    """Keep a snapshot of the VM NAME from being deleted."""
    from calotype.engine import labelling  # noqa: PLC0415
    from calotype.engine.select import select  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    entry = select(store, store.find(name), id_prefix=id_prefix, tag=tag, latest=latest)
    run_async(labelling.protect(store, name, entry.id, is_protected=True))
    told = {"vm": name, "id": entry.id, "is_protected": True}
    say(settings, told, [f"{entry.id} is protected"])

"""`calotype describe`: give a snapshot another description."""

import click

from calotype.cli.output import Settings, common, run_async, say, snapshot_choice, vm_name


@click.command("describe")
@vm_name
@click.argument("text")
@snapshot_choice
@common
def command(
    settings: Settings, name: str, text: str, id_prefix: str | None, tag: str | None, latest: bool
) -> None:
    """Describe a snapshot of the VM NAME by TEXT; an empty one takes its description away."""
    from calotype.engine import labelling  # noqa: PLC0415
    from calotype.engine.select import select  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    entry = select(store, store.find(name), id_prefix=id_prefix, tag=tag, latest=latest)
    run_async(labelling.describe(store, name, entry.id, text))
    told = {"vm": name, "id": entry.id, "description": text}
    say(settings, told, [f"{entry.id}  {text!r}"])

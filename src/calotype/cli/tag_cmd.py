"""`calotype tag`: give a snapshot another tag."""

import click

from calotype.cli.output import Settings, common, run_async, say, snapshot_choice, vm_name


@click.command("tag")
@vm_name
@click.argument("new")
@snapshot_choice
@common
def command(
    settings: Settings, name: str, new: str, id_prefix: str | None, tag: str | None, latest: bool
) -> None:
    """Give a snapshot of the VM NAME the tag NEW; an empty one takes its tag away."""
    from calotype.engine import labelling  # noqa: PLC0415
    from calotype.engine.select import select  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    entry = select(store, store.find(name), id_prefix=id_prefix, tag=tag, latest=latest)
    run_async(labelling.tag(store, name, entry.id, new))
    say(settings, {"vm": name, "id": entry.id, "tag": new}, [f"{entry.id}  {new!r}"])

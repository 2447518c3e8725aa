"""`calotype doctor`: put the store's index right."""

import click

from calotype.cli.output import Settings, common, say


@click.command("doctor")
@click.option(
    "--rebuild", is_flag=True, required=True, help="Make the index anew from the manifests."
)
@common
def command(settings: Settings, rebuild: bool) -> None:  # noqa: ARG001 - the only cure so far
    """Put the store right: the index is made anew from the manifests, which are the truth."""
    from calotype.store.store import Store  # noqa: PLC0415

    count = Store(settings.store_path).rebuild_index()
    say(settings, {"snapshots": count}, [f"the index holds {count} snapshots"])

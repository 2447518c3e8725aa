"""`calotype doctor`: put the store's index right."""

from typing import TYPE_CHECKING

import click

from calotype.cli.output import Settings, common, say

if TYPE_CHECKING:
    from calotype.errors import StoreError


@click.command("doctor")
@click.option(
    "--rebuild", is_flag=True, required=True, help="Make the index anew from the manifests."
)
@common
def command(settings: Settings, rebuild: bool) -> None:  # noqa: ARG001 - the only cure so far
    """Put the store right: the index is made anew from the manifests, which are the truth."""
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    count = store.rebuild_index()
    if store.index.fault is not None:
        raise store.index.fault
    if store.damage:
        raise _not_all(store.damage)
    say(settings, {"snapshots": count}, [f"the index holds {count} snapshots"])


def _not_all(damage: "list[StoreError]") -> "StoreError":
    """The first file that could not be read; the others are notes on it."""
    first, *others = damage
    for other in others:
        first.add_note(f"{other.problem}; what to do: {other.remedy}")
    return first

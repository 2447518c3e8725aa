"""`calotype du`: how much space snapshots take."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from calotype.cli import completing
from calotype.cli.output import Settings, common, run_async, say_with_damage, size

if TYPE_CHECKING:
    from calotype.engine.usage import Usage


@click.command("du")
@click.argument("name", required=False, shell_complete=completing.vm_names)
@common
def command(settings: Settings, name: str | None) -> None:
    """Say how much space the VM NAME, or each, takes, and what deleting a snapshot would free."""
    from calotype.engine.usage import usage  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    records, damage = ([store.find(name)], []) if name is not None else store.sound_records()
    found = [run_async(usage(store, record)) for record in records]
    told = {
        "vms": [
            {
                "name": each.record.name,
                "total_bytes": each.total_bytes,
                "snapshots": [snapshot._asdict() for snapshot in each.snapshots],
            }
            for each in found
        ]
    }
    damage += [error for each in found for error in each.damage]
    say_with_damage(settings, told, [line for each in found for line in _lines(each)], damage)


def _lines(usage: "Usage") -> Iterator[str]:
    yield f"{usage.record.name}  {size(usage.total_bytes)} in all"
    for snapshot in usage.snapshots:
        tag = f"  {snapshot.tag!r}" if snapshot.tag else ""
        own, shared = size(snapshot.own_bytes), size(snapshot.shared_bytes)
        yield f"  {snapshot.id}  {own} its own, {shared} shared{tag}"

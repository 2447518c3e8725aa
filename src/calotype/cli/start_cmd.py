"""`calotype start`: start a VM that is defined."""

import click

from calotype.cli.output import UNDONE, Settings, common, run_async, say_unfinished, vm_name


@click.command("start")
@vm_name
@common
def command(settings: Settings, name: str) -> None:
    """Start the VM NAME from the newest content of its disks."""
    from calotype.engine import lifecycle  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    record = run_async(lifecycle.start(store, name), UNDONE)
    told = {"vm": record.name, "vm_id": record.id}
    say_unfinished(settings, told, f"{name} runs", len(store.unfinished(record.id)), name)

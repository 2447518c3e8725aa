"""`calotype ps`: which VMs there are, and whether they run."""

import asyncio
from typing import Any

import click

from calotype.cli.output import Settings, common, run_async, say_with_damage


@click.command("ps")
@click.option("-q", "--quiet", is_flag=True, help="Print the names alone.")
@common
def command(settings: Settings, quiet: bool) -> None:
    """List the VMs: run state, pid, disks, number of snapshots."""
    from calotype.engine import looking  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)

    records, damage = store.sound_records()

    async def look() -> list[Any]:
        return await asyncio.gather(*(looking.glance(store, vm) for vm in records))

    glances = run_async(look())
    told = {
        "vms": [
            {
                "name": glance.record.name,
                "vm_id": glance.record.id,
                "run_state": glance.run_state,
                "pid": glance.pid,
                "disks": [disk.name for disk in glance.record.disks],
                "snapshots": glance.snapshots,
            }
            for glance in glances
        ]
    }
    if quiet:
        lines = [glance.record.name for glance in glances]
    else:
        width = max([4, *(len(glance.record.name) for glance in glances)])
        lines = [f"{'NAME':{width}}  {'STATE':10}  {'PID':>7}  SNAPSHOTS  DISKS"]
        lines += [
            f"{glance.record.name:{width}}  {glance.run_state:10}  {glance.pid or '-':>7}"
            f"  {glance.snapshots:9}  {', '.join(disk.name for disk in glance.record.disks)}"
            for glance in glances
        ]
    damage += [glance.damage for glance in glances if glance.damage is not None]
    say_with_damage(settings, told, lines, store.damage + damage)

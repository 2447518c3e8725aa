"""`calotype recover`: bring to an end what was cut off."""

from typing import Any

import click

from calotype.cli import completing
from calotype.cli.output import Settings, common, run_async, say_with_damage
from calotype.errors import CalotypeError


@click.command("recover")
@click.argument("name", required=False, shell_complete=completing.vm_names)
@common
def command(settings: Settings, name: str | None) -> None:
    """Finish or undo what was cut off on the VM NAME, or on all: a take, a restore, a start.

    Every command that changes a VM does this first; nothing is ever lost by waiting.
    """
    from calotype.engine import operations  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    vms, damage = ([store.find(name)], []) if name is not None else store.sound_records()

    failures: list[CalotypeError] = []

    async def work() -> list[tuple[str, Any]]:
        done: list[tuple[str, Any]] = []
        for vm in vms:
            try:
                done += [(vm.name, each) for each in await operations.recover(store, vm.name)]
            except CalotypeError as error:  # the next VM is not affected
                failures.append(error)
        return done

    recovered = run_async(work())
    if failures:
        for other in failures[1:]:
            failures[0].add_note(str(other))
        raise failures[0]
    told = [
        {
            "vm": vm,
            "operation": each.began.operation,
            "snapshot": each.began.snapshot,
            "at": each.began.at,
            "outcome": each.outcome,
        }
        for vm, each in recovered
    ]
    lines = [
        f"{each['vm']}: {each['operation']} of {each['at'][:19].replace('T', ' ')}"
        f" {each['snapshot']} was {each['outcome']}"
        for each in told
    ]
    say_with_damage(settings, {"recovered": told}, lines or ["nothing was cut off"], damage)

"""`calotype restore`: put a VM back to a snapshot."""

import shlex
from typing import Any

import click

from calotype.cli.output import UNDONE, Settings, common, run_async, say, snapshot_choice


@click.command("restore")
@click.argument("name")
@snapshot_choice
@click.option(
    "--run-state",
    type=click.Choice(["saved", "running", "paused"]),
    default="saved",
    show_default=True,
    help="Whether the guest runs afterwards.",
)
@click.option(
    "--discard-current",
    is_flag=True,
    help="Do not keep the disks as they are now; there is no way back then.",
)
@click.option(
    "--accept-touched",
    is_flag=True,
    help="Go on although a file's mode, owner or name was changed, if nothing else of it was.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print the restored id alone.")
@common
def command(
    settings: Settings,
    name: str,
    id_prefix: str | None,
    tag: str | None,
    latest: bool,
    run_state: Any,
    discard_current: bool,
    accept_touched: bool,
    quiet: bool,
) -> None:
    """Put the VM NAME, which must not run, back to a snapshot.

    Everything is compared with what the snapshot was taken of before anything is touched. The disks
    left behind are kept as a snapshot without a machine state.
    """
    from calotype.engine import operations  # noqa: PLC0415
    from calotype.engine.select import select  # noqa: PLC0415
    from calotype.plan.restore import RestoreRequest  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path)
    entry = select(store, store.find(name), id_prefix=id_prefix, tag=tag, latest=latest)
    request = RestoreRequest(run_state, discard_current, accept_touched)
    restored = run_async(operations.restore(store, name, entry.id, request), UNDONE)
    plan = restored.plan
    undo = [settings.suggested("restore", name, "--id", plan.left_behind)]
    if plan.run_state != "off":
        undo.insert(0, settings.suggested("stop", name, "--now"))
    told = {
        "id": plan.snapshot,
        "vm": name,
        "run_state": plan.run_state,
        "restore_ms": round(restored.restore_ms, 1),
        "left_behind": plan.left_behind if plan.keeps_left_behind else None,
        "undo": undo if plan.keeps_left_behind else None,
    }
    if quiet:
        lines = [plan.snapshot]
    else:
        lines = [f"{name} is {plan.run_state}, restored in {restored.restore_ms:.0f} ms"]
        lines += ["to go back to the disks left behind:"] * plan.keeps_left_behind
        lines += [" && ".join(map(shlex.join, undo))] * plan.keeps_left_behind
    say(settings, told, lines)

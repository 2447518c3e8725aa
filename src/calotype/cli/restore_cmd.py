"""`calotype restore`: put a VM back to a snapshot."""

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from calotype.cli.output import UNDONE, Settings, common, duration, run_async, say, snapshot_choice

if TYPE_CHECKING:
    from calotype.engine.operations import Restored


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
@click.option(
    "--sync-time",
    is_flag=True,
    help="Have the guest's agent set its clock, which stood still since the snapshot.",
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
    sync_time: bool,
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
    request = RestoreRequest(run_state, discard_current, accept_touched, sync_time)
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
        "clock_behind_s": restored.clock_behind_s,
        "is_clock_set": restored.is_clock_set,
        "warnings": restored.warnings,
    }
    if quiet:
        lines = [plan.snapshot]
    else:
        lines = [f"{name} is {plan.run_state}, restored in {restored.restore_ms:.0f} ms"]
        lines += _clock_lines(restored)
        lines += [f"warning: {warning}" for warning in restored.warnings]
        lines += ["to go back to the disks left behind:"] * plan.keeps_left_behind
        lines += [" && ".join(map(shlex.join, undo))] * plan.keeps_left_behind
    say(settings, told, lines)


def _clock_lines(restored: "Restored") -> Iterator[str]:
    """By how much the guest's clock is behind, if its RAM is from the past."""
    if restored.clock_behind_s is None:
        return
    behind = duration(restored.clock_behind_s)
    if restored.is_clock_set:
        yield f"the guest's clock was {behind} behind, and was set"
    else:
        stands = "" if restored.plan.run_state == "running" else ", and stands still"
        yield f"the guest's clock is {behind} behind{stands}"

"""`calotype restore`: put a VM back to a snapshot."""

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from calotype.cli.output import (
    UNDONE,
    Settings,
    common,
    duration,
    error_members,
    run_async,
    say,
    snapshot_choice,
    tell_error,
    vm_name,
)

if TYPE_CHECKING:
    from calotype.engine.operations import Restored
    from calotype.plan.restore_plan import RestorePlan


@click.command("restore")
@vm_name
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
    "--keep-current",
    is_flag=True,
    help="Keep the RAM and devices that are left behind too, of a VM that runs.",
)
@click.option(
    "--stop-first",
    is_flag=True,
    help="Save and end a VM that runs before anything else; a failure brings it back.",
)
@click.option(
    "--sync-time",
    is_flag=True,
    help="Have the guest's agent set its clock, which stood still since the snapshot.",
)
@click.option("--plan", "plan_only", is_flag=True, help="Say what would be done, and do nothing.")
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
    keep_current: bool,
    stop_first: bool,
    sync_time: bool,
    plan_only: bool,
    quiet: bool,
) -> None:
    """Put the VM NAME back to a snapshot.

    Everything is compared with what the snapshot was taken of before anything is touched. The disks
    left behind are kept as a snapshot without a machine state.

    A VM that runs is not stopped: a second QEMU is prepared beside it and takes its place in one
    pause, with its ports and sockets. What keeps it from that is told; --stop-first does without.
    """
    from calotype.engine import operations  # noqa: PLC0415
    from calotype.engine.select import select  # noqa: PLC0415
    from calotype.plan.restore_plan import RestoreRequest  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    _refuse_contradiction(discard_current, keep_current, stop_first)
    store = Store(settings.store_path, make=False)
    entry = select(store, store.find(name), id_prefix=id_prefix, tag=tag, latest=latest)
    request = RestoreRequest(run_state, discard_current, accept_touched, keep_current, sync_time)
    if plan_only:
        planned = operations.restore_plan_only(
            store, name, entry.id, request, stop_first=stop_first
        )
        _say_plan(settings, name, run_async(planned))
        return
    way_back = None
    if stop_first:
        work = operations.restore_stopping_first(store, name, entry.id, request)
        restored, way_back = run_async(work, UNDONE)
    else:
        restored = run_async(operations.restore(store, name, entry.id, request), UNDONE)
    _say_restored(settings, name, restored, way_back, quiet=quiet, keeps_state=keep_current)


def _refuse_contradiction(discards: bool, keeps: bool, stops_first: bool) -> None:
    from calotype.errors import RequestError  # noqa: PLC0415

    if discards and keeps:
        raise RequestError(
            "--keep-current and --discard-current exclude each other", "give one of the two"
        )
    if discards and stops_first:
        raise RequestError(
            "--stop-first saves the VM as the way back, and --discard-current says that there is"
            " to be none",
            "leave one of them out; what was saved can be deleted afterwards",
        )


def _say_restored(
    settings: Settings,
    name: str,
    restored: "Restored",
    way_back: str | None,
    *,
    quiet: bool,
    keeps_state: bool,
) -> None:
    plan = restored.plan
    left = way_back or (plan.left_behind if plan.keeps_left_behind else None)
    undo = [settings.suggested("restore", name, "--id", left)] if left else []
    has_state = way_back is not None or keeps_state
    if undo and plan.run_state != "off" and not has_state:
        undo.insert(0, settings.suggested("stop", name, "--now"))
    told = {
        "id": plan.snapshot,
        "vm": name,
        "run_state": plan.run_state,
        "restore_ms": round(restored.restore_ms, 1),
        "pause_ms": None if restored.pause_ms is None else round(restored.pause_ms, 1),
        "left_behind": left,
        "undo": undo or None,
        "clock_behind_s": restored.clock_behind_s,
        "is_clock_set": restored.is_clock_set,
        "warnings": restored.warnings,
    }
    if quiet:
        lines = [plan.snapshot]
    else:
        lines = [f"{name} is {plan.run_state}, restored in {restored.restore_ms:.0f} ms"]
        if restored.pause_ms is not None:
            lines[0] += f"; nobody ran for {restored.pause_ms:.0f} ms"
        lines += _clock_lines(restored)
        lines += [f"warning: {warning}" for warning in restored.warnings]
        what = "what was" if has_state else "the disks"
        lines += [f"to go back to {what} left behind:", " && ".join(map(shlex.join, undo))] * bool(
            undo
        )
    say(settings, told, lines)


def _say_plan(settings: Settings, name: str, plan: "RestorePlan") -> None:
    """Print a plan; one that cannot be carried out is printed whole too, and then fails."""
    from calotype.engine.operations import in_the_way as refusal  # noqa: PLC0415

    in_the_way = [mismatch.text for mismatch in plan.mismatches]
    blockers = [f"{blocker.problem}: {blocker.remedy}" for blocker in plan.blockers]
    lines = [f"{name} would be {plan.run_state} afterwards"]
    lines += [f"handed over: {what}: {how}" for what, how in plan.endpoints]
    lines += [f"note: {note}" for note in plan.notes]
    lines += [f"differs: {text}" for text in in_the_way]
    lines += [f"in the way: {text}" for text in blockers]
    lines += [f"step: {type(step).__name__}" for step in plan.steps]
    told = {
        "id": plan.snapshot,
        "vm": name,
        "run_state": plan.run_state,
        "endpoints": [{"what": what, "how": how} for what, how in plan.endpoints],
        "notes": list(plan.notes),
        "mismatches": in_the_way,
        "blockers": [[blocker.problem, blocker.remedy] for blocker in plan.blockers],
        "steps": [type(step).__name__ for step in plan.steps],
    }
    error = refusal(name, plan)
    say(settings, told | ({"error": error_members(error)} if error else {}), lines)
    if error:
        tell_error(error)
        raise click.exceptions.Exit(error.exit_code)


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

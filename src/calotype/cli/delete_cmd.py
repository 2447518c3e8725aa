"""`calotype delete`: delete snapshots and merge the images that they leave."""

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from calotype.cli.output import (
    Settings,
    Stopped,
    common,
    error_members,
    run_async,
    say,
    size,
    tell_error,
    vm_name,
)

if TYPE_CHECKING:
    from calotype.model.vm import VmRecord
    from calotype.plan.delete import DeletePlan
    from calotype.store.store import Store


_STOPPED = Stopped(
    "stopped: what was begun is not undone", "`calotype recover` goes on with it, and finishes it"
)


@click.command("delete")
@vm_name
@click.option(
    "--id",
    "id_prefixes",
    multiple=True,
    metavar="ID",
    help="By id, or the beginning of one. Repeatable.",
)
@click.option("--tag", metavar="TAG", help="The one with this tag.")
@click.option("--leftovers", is_flag=True, help="None: merge what earlier deletes had to keep.")
@click.option("--children", is_flag=True, help="Delete all that descends from it as well.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("-q", "--quiet", is_flag=True, help="Print the deleted ids alone.")
@common
def command(
    settings: Settings,
    name: str,
    id_prefixes: tuple[str, ...],
    tag: str | None,
    leftovers: bool,
    children: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Delete snapshots of the VM NAME, whether or not it runs: just what nothing else needs.

    What descends from them stays, and descends from the nearest ancestor that stays.
    """
    from calotype.cli.progress_bar import progress_bar  # noqa: PLC0415
    from calotype.engine import deletion  # noqa: PLC0415
    from calotype.plan.delete import DeleteRequest  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    chosen = _chosen(store, store.find(name), id_prefixes, tag, leftovers)
    request = DeleteRequest(chosen, children)
    if dry_run:
        plan = run_async(deletion.delete_plan_only(store, name, request))
        _say_plan(settings, name, plan)
        return
    with progress_bar(quiet or settings.as_json) as progress:
        plan = run_async(deletion.delete(store, name, request, progress=progress), _STOPPED)
    _say_deleted(settings, name, plan, quiet)


def _chosen(
    store: "Store",
    record: "VmRecord",
    id_prefixes: tuple[str, ...],
    tag: str | None,
    leftovers: bool,
) -> frozenset[str]:
    """The ids of the snapshots that are meant."""
    from calotype.engine.select import select  # noqa: PLC0415
    from calotype.errors import RequestError  # noqa: PLC0415

    if sum((bool(id_prefixes), tag is not None, leftovers)) != 1:
        raise RequestError("which snapshots?", "give --id (repeatable), --tag, or --leftovers")
    if tag is not None:
        return frozenset({select(store, record, tag=tag).id})
    return frozenset(select(store, record, id_prefix=prefix).id for prefix in id_prefixes)


def _say_plan(settings: Settings, name: str, plan: "DeletePlan") -> None:
    """Print a plan; one that cannot be carried out is printed whole too, and then fails."""
    import msgspec  # noqa: PLC0415

    from calotype.plan.delete import as_error  # noqa: PLC0415

    error = as_error(name, plan)
    told = {"plan": msgspec.to_builtins(plan)}
    told |= {"error": error_members(error)} if error else {}
    say(settings, told, [*_plan_lines(plan), *_later(settings, name, plan)])
    if error:
        tell_error(error)
        raise click.exceptions.Exit(error.exit_code)


def _plan_lines(plan: "DeletePlan") -> Iterator[str]:
    from calotype.plan.steps import TakePath  # noqa: PLC0415

    yield f"deletes: {', '.join(plan.snapshots) or 'no snapshot'}"
    yield f"frees: {_freed(plan)}"
    for snapshot, parent in plan.reparented.items():
        yield f"{snapshot} descends from {parent or 'no snapshot'} then"
    for step in plan.steps:
        if isinstance(step, TakePath):
            yield f"replaces {step.origin} by {step.copy}, which holds the newest content"
    for path in plan.removes:
        yield f"removes {path}"
    for merge in plan.merges:
        into = ", ".join(merge.target)
        yield (
            f"merges {merge.direction} {merge.source} into {into}:"
            f" {size(merge.bytes)}, about {merge.seconds:.0f} s"
        )
    for stay in plan.stays:
        yield f"{'keeps' if stay.is_needed else 'cannot yet remove'} {stay.path}: {stay.reason}"
    yield "steps: " + ", ".join(type(step).__name__ for step in plan.steps)
    for mismatch in plan.mismatches:
        yield f"mismatch: {mismatch.text}"
    for blocker in plan.blockers:
        yield f"blocker: {blocker.problem}; what to do: {blocker.remedy}"


def _later(settings: Settings, name: str, plan: "DeletePlan") -> Iterator[str]:
    """How what has to wait for the VM to be off is brought to an end."""
    if plan.is_more_when_off:
        stop = shlex.join(settings.suggested("stop", name))
        delete = shlex.join(settings.suggested("delete", name, "--leftovers"))
        yield f"more goes once it is off: `{stop}`, then `{delete}`"


def _freed(plan: "DeletePlan") -> str:
    """What is freed and what is taken, in words; an estimate where the two limits differ."""
    least, most = plan.freed_bytes, plan.freed_limit_bytes
    estimated = " (estimated)" * (least != most)
    if least >= 0:
        return f"{_range(least, most)}{estimated}"
    if most > 0:
        return f"up to {size(most)}, or takes up to {size(-least)} more{estimated}"
    return f"nothing, but takes {_range(-most, -least)} more{estimated}"


def _range(least: int, most: int) -> str:
    low, high = size(least), size(most)
    return low if low == high else f"{low} to {high}"


def _say_deleted(settings: Settings, name: str, plan: "DeletePlan", quiet: bool) -> None:
    left = [stay for stay in plan.stays if not stay.is_needed]
    told = {
        "vm": name,
        "deleted": plan.snapshots,
        "reparented": plan.reparented,
        "freed_bytes": plan.freed_bytes,
        "freed_limit_bytes": plan.freed_limit_bytes,
        "is_more_when_off": plan.is_more_when_off,
        "left": [{"path": stay.path, "reason": stay.reason} for stay in left],
    }
    count = len(plan.snapshots)
    lines = [f"deleted {count} snapshot{'s' * (count != 1)}, freed {_freed(plan)}"]
    lines += [f"cannot yet remove {stay.path}: {stay.reason}" for stay in left]
    lines += _later(settings, name, plan)
    say(settings, told, list(plan.snapshots) if quiet else lines)

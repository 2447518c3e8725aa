"""`calotype take`: take a system snapshot of a running VM, or say what that would do."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from calotype.cli.output import (
    UNDONE,
    Finite,
    Settings,
    common,
    error_members,
    run_async,
    say,
    size,
    tell_error,
    vm_name,
)

if TYPE_CHECKING:
    from calotype.model.snapshot import Manifest
    from calotype.plan.take_plan import TakePlan

_KINDS = ("external", "internal", "skip")


@click.command("take")
@vm_name
@click.option("--tag", metavar="TAG", help="Your name for it; need not be unique.")
@click.option("--description", default="", metavar="TEXT", help="Free text, kept with it.")
@click.option(
    "--machine-state",
    type=click.Choice(["external", "none"]),
    default="external",
    show_default=True,
    help="Save RAM and devices in files of their own, or not at all.",
)
@click.option(
    "--method",
    type=click.Choice(["auto", "live", "paused"]),
    default="auto",
    show_default=True,
    help="Let the guest run while RAM is saved, or let it stand still; auto is live.",
)
@click.option(
    "--pause-limit",
    type=Finite(min=1.0),
    default=2000.0,
    show_default=True,
    metavar="MS",
    help="Give up, the guest running on, if the pause gets longer.",
)
@click.option(
    "--disk",
    "disks",
    multiple=True,
    metavar="NODE=KIND",
    help="How one disk is snapshotted: external (the default), internal or skip. Repeatable.",
)
@click.option(
    "--quiesce",
    is_flag=True,
    help="Have the guest's agent freeze its file systems meanwhile; for disks alone.",
)
@click.option(
    "--freeze-limit",
    type=Finite(min=1.0),
    default=10_000.0,
    show_default=True,
    metavar="MS",
    help="Give up, and thaw them, if they are frozen for longer.",
)
@click.option("--plan", "plan_only", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("-q", "--quiet", is_flag=True, help="Print the new id alone.")
@common
def command(
    settings: Settings,
    name: str,
    tag: str | None,
    description: str,
    machine_state: Any,
    method: Any,
    pause_limit: float,
    disks: tuple[str, ...],
    quiesce: bool,
    freeze_limit: float,
    plan_only: bool,
    quiet: bool,
) -> None:
    """Take a snapshot of the running VM NAME: RAM, devices and disks, all of one instant.

    The guest stands still for milliseconds; its RAM is saved while it runs on.
    """
    from calotype.cli.progress_bar import progress_bar  # noqa: PLC0415
    from calotype.engine import operations  # noqa: PLC0415
    from calotype.errors import RequestError  # noqa: PLC0415
    from calotype.model import names  # noqa: PLC0415
    from calotype.plan.take_plan import TakeRequest  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    if tag == "":
        raise RequestError("the tag is empty", "name one, or leave --tag out")
    names.check_tag(tag or "")
    names.check_description(description)
    _refuse_contradiction(machine_state, method)
    store = Store(settings.store_path, make=False)
    request = TakeRequest(
        machine_state, method, pause_limit, _disk_kinds(disks), quiesce, freeze_limit
    )
    if plan_only:
        plan = run_async(operations.plan_only(store, name, request))
        _say_plan(settings, name, plan)
        return
    with progress_bar(quiet or settings.as_json) as progress:
        manifest = run_async(
            operations.take(
                store, name, request, tag=tag or "", description=description, progress=progress
            ),
            UNDONE,
        )
    _say_taken(settings, manifest, quiet)


def _refuse_contradiction(machine_state: str, method: str) -> None:
    from calotype.errors import RequestError  # noqa: PLC0415

    if machine_state == "none" and method != "auto":
        raise RequestError(
            f"--method {method} says how the machine state is saved, and --machine-state none says"
            " that it is not",
            "leave one of them out",
        )


def _disk_kinds(words: tuple[str, ...]) -> dict[str, Any]:
    from calotype.errors import RequestError  # noqa: PLC0415

    kinds: dict[str, Any] = {}
    for word in words:
        node, _, kind = word.rpartition("=")
        if not node or kind not in _KINDS:
            raise RequestError(
                f"--disk {word!r} is not understood", "write NODE=external, =internal or =skip"
            )
        if node in kinds:
            raise RequestError(f"--disk names {node!r} twice", "name it once")
        kinds[node] = kind
    return kinds


def _say_plan(settings: Settings, name: str, plan: "TakePlan") -> None:
    """Print a plan; one that is blocked is printed whole too, and then fails."""
    import msgspec  # noqa: PLC0415

    from calotype.plan.take_plan import as_error  # noqa: PLC0415

    error = as_error(name, plan) if plan.blockers else None
    told = {"plan": msgspec.to_builtins(plan)}
    told |= {"error": error_members(error)} if error else {}
    say(settings, told, list(_plan_lines(plan)))
    if error:
        tell_error(error)
        raise click.exceptions.Exit(error.exit_code)


def _plan_lines(plan: "TakePlan") -> Iterator[str]:
    estimate = plan.estimate
    yield f"machine state: {plan.machine_state}, {plan.method}: {plan.method_reason}"
    for disk in plan.disks:
        where = f" -> {disk.overlay}" if disk.overlay else ""
        yield f"disk {disk.disk}: {disk.kind} ({disk.reason}) {disk.image.path}{where}"
    yield (
        f"estimate: pause {estimate.pause_ms:.0f} ms, {size(estimate.bytes)}"
        f" of {size(estimate.store_free_bytes)} free"
    )
    yield "steps: " + ", ".join(type(step).__name__ for step in plan.steps)
    for warning in plan.warnings:
        yield f"warning: {warning}"
    for blocker in plan.blockers:
        yield f"blocker: {blocker.problem}; what to do: {blocker.remedy}"


def _say_taken(settings: Settings, manifest: "Manifest", quiet: bool) -> None:
    timings = manifest.timings
    told = {
        "id": manifest.id,
        "tag": manifest.tag,
        "vm": manifest.vm_name,
        "parent": manifest.parent,
        "instant": manifest.instant,
        "pause_ms": timings.pause_ms,
        "total_ms": timings.total_ms,
        "bytes": manifest.bytes_written,
        "parts": {part.disk: part.kind for part in manifest.storage},
        "consistency": manifest.consistency,
    }
    pause = "the guest was not stopped" if timings.pause_ms is None else (
        f"pause {timings.pause_ms:.1f} ms"
    )  # fmt: skip
    if manifest.quiesced is not None:
        count, frozen_ms = manifest.quiesced.file_systems, manifest.quiesced.frozen_ms
        pause += f", its {count} file systems were frozen for {frozen_ms:.0f} ms"
    line = (
        f"{manifest.id}  {pause}, {size(manifest.bytes_written)} in {timings.total_ms / 1000:.1f} s"
    )
    say(settings, told, [manifest.id if quiet else line])

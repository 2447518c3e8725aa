"""`calotype stop`: stop a VM."""

import shlex

import click

from calotype.cli.output import (
    STOPPED,
    Finite,
    Settings,
    Stopped,
    common,
    run_async,
    say_unfinished,
    vm_name,
)


@click.command("stop")
@vm_name
@click.option("--now", is_flag=True, help="Do not ask the guest: flush the images and end QEMU.")
@click.option(
    "--timeout",
    type=Finite(min=0.0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="S",
    help="Wait so long for it.",
)
@common
def command(settings: Settings, name: str, now: bool, timeout: float) -> None:
    """Press the power button of the VM NAME, and wait until it is off."""
    from calotype.engine import lifecycle  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    work = lifecycle.stop(store, name, now=now, timeout_s=timeout)
    run_async(work, STOPPED if now else _not_awaited(name))
    unfinished = len(store.unfinished(store.find(name).id))
    say_unfinished(settings, {"vm": name}, f"{name} is off", unfinished, name)


def _not_awaited(name: str) -> Stopped:
    """A power button that was pressed cannot be undone."""
    return Stopped(
        "stopped waiting: the power button may be pressed, and the guest powering off",
        f"`calotype ps` tells whether it is off, `calotype stop --now {shlex.quote(name)}` ends it",
    )

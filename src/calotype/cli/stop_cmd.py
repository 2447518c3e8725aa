"""`calotype stop`: stop a VM."""

import click

from calotype.cli.output import Settings, common, run_async, say


@click.command("stop")
@click.argument("name")
@click.option("--now", is_flag=True, help="Do not ask the guest: flush the images and end QEMU.")
@click.option(
    "--timeout", default=60.0, show_default=True, metavar="S", help="Wait so long for it."
)
@common
def command(settings: Settings, name: str, now: bool, timeout: float) -> None:
    """Press the power button of the VM NAME, and wait until it is off."""
    from calotype.engine import operations  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    run_async(operations.stop(Store(settings.store_path), name, now=now, timeout_s=timeout))
    say(settings, {"vm": name}, [f"{name} is off"])

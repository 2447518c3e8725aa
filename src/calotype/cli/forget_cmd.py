"""`calotype forget`: take a VM out of the catalogue, and say what stays."""

import click

from calotype.cli.output import Settings, common, run_async, say, vm_name


@click.command("forget")
@vm_name
@common
def command(settings: Settings, name: str) -> None:
    """Forget the VM NAME, which must not run; nothing of it is deleted.

    One that was adopted may run, and runs on.

    What is kept is listed: the image with the newest content of each disk, and the snapshots.
    """
    from calotype.engine import lifecycle  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    record, folder, manifests = run_async(
        lifecycle.forget(Store(settings.store_path, make=False), name)
    )
    disks = {disk.name: disk.active.path for disk in record.disks}
    told = {
        "vm": name,
        "kept": {
            "folder": str(folder),
            "active_images": disks,
            "snapshots": [manifest.id for manifest in manifests],
        },
    }
    lines = [f"forgot {name}; kept:"]
    lines += [f"  disk {disk}: newest content in {path}" for disk, path in disks.items()]
    lines += [f"  {len(manifests)} snapshots and the logs: {folder}"]
    say(settings, told, lines)

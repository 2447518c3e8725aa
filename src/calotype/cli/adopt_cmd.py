"""`calotype adopt`: take a QEMU that somebody started by hand into the store."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calotype.cli.output import Settings, common, run_async, say
from calotype.cli.place import working_directory

if TYPE_CHECKING:
    from calotype.engine.adopting import Adoption
    from calotype.model.vm import Limit


@click.command("adopt")
@click.argument("name")
@click.option(
    "--qmp",
    required=True,
    metavar="SOCKET",
    help="The unix socket of a QMP monitor that QEMU has, and that nobody is connected to.",
)
@common
def command(settings: Settings, name: str, qmp: str) -> None:
    """Take a running QEMU that was started by hand into the store, as the VM NAME.

    It says which commands will not work with it, and why. Nothing is changed in QEMU or its files.
    """
    import msgspec  # noqa: PLC0415

    from calotype.engine.adopting import adopt  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    path = Path(qmp) if Path(qmp).is_absolute() else working_directory() / qmp
    done = run_async(adopt(Store(settings.store_path), name, path))
    told = {
        "vm": done.record.name,
        "vm_id": done.record.id,
        "pid": done.qemu.pid,
        "is_new": done.is_new,
        "disks": [disk.name for disk in done.record.disks],
        **msgspec.to_builtins({
            "dropped": done.record.adopted.dropped if done.record.adopted else (),
            "limits": done.limits,
            "blockers": done.blockers,
        }),
    }  # fmt: skip
    say(settings, told, list(_lines(done)))


def _lines(done: "Adoption") -> Iterator[str]:
    record, adopted = done.record, done.record.adopted
    assert adopted is not None
    word = "adopted" if done.is_new else "bound to another process"
    disks = ", ".join(disk.name for disk in record.disks) or "none"
    yield f"{record.name} is {word}: process {done.qemu.pid}; writable disks: {disks}"
    for disk in record.disks:
        if disk.active != disk.origin:
            yield f"disk {disk.name} is on {disk.active.path} now"
    for dropped in adopted.dropped:
        yield f"it would be started without this: {dropped.words}: {dropped.reason}"
    yield from limit_lines(done.limits)
    for blocker in done.blockers:
        yield f"does not work now: take: {blocker.problem}; what to do: {blocker.remedy}"


def limit_lines(limits: "tuple[Limit, ...]") -> Iterator[str]:
    """The commands that do not work with a VM, with reason and remedy."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for limit in limits:
        grouped.setdefault((limit.problem, limit.remedy), []).append(limit.command)
    for (problem, remedy), commands in grouped.items():
        yield f"does not work: {', '.join(commands)}: {problem}; what to do: {remedy}"

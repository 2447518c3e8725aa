"""`calotype history`: what was done to a VM, how long it took, and what went wrong."""

import click

from calotype.cli.output import Settings, common, say, vm_name


@click.command("history")
@vm_name
@click.option("-v", "--verbose", is_flag=True, help="Show the time that each kind of step took.")
@common
def command(settings: Settings, name: str, verbose: bool) -> None:
    """List each operation on the VM NAME: what it was, how it ended, how long it took."""
    import msgspec  # noqa: PLC0415

    from calotype.engine.history import history  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    past = history(store, store.find(name))
    lines = []
    for each in past:
        spent = "" if each.total_ms is None else f"  {each.total_ms / 1000:.2f} s"
        error = f"  {each.error}" if each.error else ""
        when = each.at[:19].replace("T", " ")
        lines.append(f"{when}  {each.operation:8}{each.snapshot:18}{each.outcome}{spent}{error}")
        if verbose:
            lines += [f"    {phase}: {ms:.1f} ms" for phase, ms in each.phases_ms.items()]
    say(settings, {"history": msgspec.to_builtins(past)}, lines)

"""`calotype doctor`: whether host, store and VMs are well, and what to do where they are not."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from calotype.cli.output import (
    Settings,
    common,
    error_members,
    one_line,
    run_async,
    say,
    size,
    tell_error,
)

if TYPE_CHECKING:
    from calotype.errors import StoreError
    from calotype.plan.diagnosis import Finding
    from calotype.plan.sights import Sight


@click.command("doctor")
@click.option(
    "--rebuild", is_flag=True, help="Make the index anew from the manifests, and do no more."
)
@common
def command(settings: Settings, rebuild: bool) -> None:
    """Say whether host, store and VMs are well, and what to do where they are not.

    Nothing is changed but by --rebuild, and nobody is waited for.
    """
    if rebuild:
        _rebuild(settings)
        return
    import msgspec  # noqa: PLC0415

    from calotype.engine.examination import examine  # noqa: PLC0415
    from calotype.plan.diagnosis import as_error, counted, diagnose  # noqa: PLC0415

    sight = run_async(examine(settings.store_path))
    findings = diagnose(sight)
    error = as_error(findings)
    told = {
        "is_well": error is None,
        "findings": msgspec.to_builtins(findings),
        "host": msgspec.to_builtins(sight.host),
        "store": msgspec.to_builtins(sight.store),
        "vms": [
            {"name": vm.record.name, "pid": vm.pid, "is_changing": vm.is_changing}
            for vm in sight.vms
        ],
    }
    told |= {"error": error_members(error)} if error else {}
    verdict = [] if error else [f"all is well: {counted(findings)}"]
    say(settings, told, [*_facts(sight), *_findings(findings), *verdict])
    if error:
        tell_error(error)
        raise click.exceptions.Exit(error.exit_code)


def _facts(sight: "Sight") -> Iterator[str]:
    """What is neither good nor bad, and good to know."""
    from calotype.plan.diagnosis import ABILITIES  # noqa: PLC0415

    host, store = sight.host, sight.store
    words = [host.kernel, f"KVM: {_yes(host.has_kvm)}"]
    words += [f"live snapshots: {_yes(host.may_track_writes)}"]
    if host.shared_memory_free_bytes is not None:
        words += [f"{size(host.shared_memory_free_bytes)} free on /dev/shm"]
    yield f"host: {', '.join(words)}"
    for qemu in host.qemus:
        if qemu.version is not None:
            can = ", ".join(ABILITIES[each] for each in qemu.abilities) or "saves no guest"
            yield f"qemu: {qemu.program} {'.'.join(map(str, qemu.version))}: {can}"
    if store is None:
        yield f"store: there is none yet at {sight.store_path}"
    else:
        reflinks = "unknown" if store.has_reflinks is None else _yes(store.has_reflinks)
        yield f"store: {store.path}, {size(store.free_bytes)} free, reflinks: {reflinks}"
    for vm in sight.vms:
        state = f"pid {vm.pid}" if vm.pid else "off"
        changing = ", being changed just now" if vm.is_changing else ""
        yield f"vm: {vm.record.name}, {state}, {len(vm.snapshots)} snapshots{changing}"
    if host.unseen_processes:
        yield f"not looked at: the files of {host.unseen_processes} processes of other users"


def _yes(claim: bool) -> str:
    return "yes" if claim else "no"


def _findings(findings: "tuple[Finding, ...]") -> Iterator[str]:
    for each in findings:
        yield one_line(
            f"{each.severity}: {each.about}: {each.problem}; what to do: {each.remedy}"
            f" [{each.check}]"
        )


def _rebuild(settings: Settings) -> None:
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    count = store.rebuild_index()
    if store.index.fault is not None:
        raise store.index.fault
    if store.damage:
        raise _not_all(store.damage)
    say(settings, {"snapshots": count}, [f"the index holds {count} snapshots"])


def _not_all(damage: "list[StoreError]") -> "StoreError":
    """The first file that could not be read; the others are notes on it."""
    first, *others = damage
    for other in others:
        first.add_note(f"{other.problem}; what to do: {other.remedy}")
    return first

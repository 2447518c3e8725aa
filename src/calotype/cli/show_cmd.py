"""`calotype show`: all there is to say of a VM, or of one of its snapshots."""

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calotype.cli.output import Settings, common, say, size, snapshot_choice, vm_name

if TYPE_CHECKING:
    from calotype.model.snapshot import Manifest, StoragePart
    from calotype.model.vm import VmRecord
    from calotype.plan.contents import Places
    from calotype.store.store import Store


@click.command("show")
@vm_name
@snapshot_choice
@click.option("--paths", "as_paths", is_flag=True, help="Show where each part of it is, alone.")
@common
def command(
    settings: Settings,
    name: str,
    id_prefix: str | None,
    tag: str | None,
    latest: bool,
    as_paths: bool,
) -> None:
    """Show the VM NAME, and which image of each disk is the active one; or one of its snapshots."""
    from calotype.engine.select import select  # noqa: PLC0415
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
    record = store.find(name)
    if id_prefix is None and tag is None and not latest and not as_paths:
        _say_vm(settings, store, record)
        return
    entry = select(store, record, id_prefix=id_prefix, tag=tag, latest=latest)
    if as_paths:
        _say_paths(settings, store, record, entry.id)
    else:
        _say_snapshot(settings, store, record, entry.id)


def _say_vm(settings: Settings, store: "Store", record: "VmRecord") -> None:
    import msgspec  # noqa: PLC0415

    from calotype.engine import launch  # noqa: PLC0415
    from calotype.formats.secrets import redacted  # noqa: PLC0415

    adopted = record.adopted
    if adopted is not None:
        adopted = msgspec.structs.replace(adopted, argv=redacted(adopted.argv))
    record = msgspec.structs.replace(record, argv=redacted(record.argv), adopted=adopted)
    frozen = [disk.origin.path for disk in record.disks if disk.active != disk.origin]
    told = {
        "vm": msgspec.to_builtins(record),
        "protection": _protection(frozen),
        "limits": msgspec.to_builtins(launch.limits(store, record)),
    }
    say(settings, told, [*_vm_lines(store, record), *_adopted_lines(store, record)])


def _say_snapshot(settings: Settings, store: "Store", record: "VmRecord", snapshot: str) -> None:
    import msgspec  # noqa: PLC0415

    from calotype.formats.secrets import redacted, redacted_pairs  # noqa: PLC0415
    from calotype.model.labels import labelled  # noqa: PLC0415

    labels = store.labels(record.id, snapshot)
    manifest = labelled(store.manifest(record.id, snapshot), labels)
    manifest = msgspec.structs.replace(
        manifest, argv=redacted(manifest.argv), definition=redacted_pairs(manifest.definition)
    )
    frozen = [
        part.image.path for part in manifest.storage if part.kind == "external" and part.image
    ]
    shown = {
        **msgspec.to_builtins(manifest),
        "consistency": manifest.consistency,
        "is_protected": labels.is_protected,
    }
    told = {"snapshot": shown, "protection": _protection(frozen)}
    protected = ["protected from being deleted"] * labels.is_protected
    say(settings, told, [*_snapshot_lines(manifest), *protected])


def _say_paths(settings: Settings, store: "Store", record: "VmRecord", snapshot: str) -> None:
    import msgspec  # noqa: PLC0415

    from calotype.plan.contents import places  # noqa: PLC0415

    folder = store.snapshot_folder(record.id, snapshot)
    found = places(store.manifest(record.id, snapshot), str(folder))
    told = {"id": snapshot, "vm": record.name, "paths": msgspec.to_builtins(found)}
    say(settings, told, list(_path_lines(found)))


def _path_lines(found: "Places") -> Iterator[str]:
    for disk in found.disks:
        inside = f", inside as {disk.internal_name} (id {disk.internal_id})"
        yield f"disk {disk.disk}: {disk.kind}{inside if disk.kind == 'internal' else ''}"
        yield from (f"  {image.path} ({image.format})" for image in disk.chain)
    yield f"machine state: {found.machine_state_type or 'none'}"
    if found.machine_state:
        yield f"  {found.machine_state}"


def _vm_lines(store: "Store", record: "VmRecord") -> Iterator[str]:
    yield f"{record.name}  ({record.id})"
    is_under_way = record.parent is not None and store.is_under_way(record.id, record.parent)
    under_way = "a snapshot under way, " * is_under_way
    yield f"descends from: {under_way}{record.parent or 'no snapshot'}"
    for disk in record.disks:
        yield f"disk {disk.name}: active image {disk.active.path} ({disk.active.format})"
        if disk.active != disk.origin:
            yield f"  the command line names {disk.origin.path}, which is frozen"
            yield f"    {_protection_words(disk.origin.path)}"
    yield f"{'starts' if record.adopted else 'started'} in {record.cwd} with:"
    yield f"  {shlex.join(record.argv)}"


def _adopted_lines(store: "Store", record: "VmRecord") -> Iterator[str]:
    """Where a VM that was adopted is reached, and what does not work with it."""
    from calotype.cli.adopt_cmd import limit_lines  # noqa: PLC0415
    from calotype.engine import launch  # noqa: PLC0415

    if record.adopted is None:
        return
    qemu = launch.is_running(store, record)
    own = "its own user" if qemu is None or qemu.monitor else "Calotype, since"
    yield f"adopted at {record.adopted.qmp}; started last by {own}"
    for dropped in record.adopted.dropped:
        yield f"  was started with {dropped.words}: {dropped.reason}"
    yield from limit_lines(launch.limits(store, record))


def _snapshot_lines(manifest: "Manifest") -> Iterator[str]:
    yield f"{manifest.id}  {manifest.tag!r}" if manifest.tag else manifest.id
    if manifest.description:
        yield repr(manifest.description)
    yield f"instant: {manifest.instant}, {manifest.method}, the VM was {manifest.run_state}"
    yield f"{manifest.consistency}-consistent: {_CONSISTENCIES[manifest.consistency]}"
    yield f"parent: {manifest.parent or 'none'}"
    state = manifest.machine_state
    yield f"machine state: {size(manifest.bytes_written) + ', ' + state.type if state else 'none'}"
    for part in manifest.storage:
        yield f"disk {part.disk}: {_part_words(part)}"
        if part.kind == "external" and part.image is not None:
            yield f"  {_protection_words(part.image.path)}"
    if manifest.topology is not None:
        topology = manifest.topology
        yield (
            f"machine: {topology.machine}, {size(topology.memory_bytes)}, {len(topology.cpus)} CPUs"
        )
    if manifest.timings.pause_ms is not None:
        yield f"pause: {manifest.timings.pause_ms:.1f} ms"
    for phase, spent_ms in manifest.timings.phases_ms.items():
        yield f"  {phase}: {spent_ms:.1f} ms"
    yield f"taken of: {shlex.join(manifest.argv)}"


_CONSISTENCIES = {
    "machine": "the guest goes on where it was",
    "filesystem": "the guest boots, and finds its file systems in order",
    "crash": "the guest boots, and finds what a power failure leaves",
}


def _part_words(part: "StoragePart") -> str:
    if part.kind == "skip" or part.image is None:
        return f"skipped: {part.reason}"
    inside = f", inside as {part.internal_name}" if part.kind == "internal" else ""
    return f"{part.kind}, {part.image.path} ({part.image.format}){inside}"


_PROTECTIONS = {
    "immutable": "frozen: immutable, for root too",
    "read-only": "frozen: read-only by its mode alone, which does not stop root",
    "writable": "not frozen: it can be written to, which would spoil the snapshot",
    "missing": "missing",
    "unknown": "it may not be looked at by this user",
}


def _protection(paths: Iterable[str]) -> dict[str, str]:
    """How each of these frozen images is protected now."""
    from calotype.store import images  # noqa: PLC0415

    return {path: images.protection(Path(path)) for path in paths}


def _protection_words(path: str) -> str:
    return _PROTECTIONS[_protection([path])[path]]

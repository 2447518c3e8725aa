"""Defining a VM: which disks a command line names, and which images hold their newest content.

A disk is known by the image that the user's command line names, its *origin*. The record keeps
every disk that the VM ever had: one that a later command line leaves out is set aside with its
newest image, and comes back with it. Nobody may write to an image that something else stands on:
another VM, or a snapshot of any.
"""

import secrets
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, cast

from msgspec.structs import replace

from calotype.errors import ConflictError, StoreError
from calotype.formats import argv as command_line
from calotype.formats.argv import CommandLine, DiskArgument
from calotype.model import names
from calotype.model.identity import Format
from calotype.model.vm import DiskRecord, Image, VmRecord
from calotype.store import images
from calotype.store.store import Store

_GIVE_EACH_ITS_OWN = "give each VM images of its own, or an overlay over that one"


class Claim(NamedTuple):
    """What stands on an image, and what to do instead of writing to it."""

    words: str
    remedy: str = _GIVE_EACH_ITS_OWN


def define_new(store: Store, name: str, argv: tuple[str, ...], cwd: str) -> VmRecord | None:
    """Define the VM *name* if there is none; its record, or None where there is one already.

    Raises:
        CommandLineError: The command line holds something that cannot be stood for.
        ConflictError: An image belongs to something else.
        HostError: An image is missing.
        RequestError: That cannot be a name.
    """
    names.check_name(name)
    command = CommandLine.parse(argv)
    with store.naming():
        if store.index.vm_named(name) is not None:
            return None
        record = VmRecord(
            id=secrets.token_hex(names.ID_LENGTH // 2),
            name=name,
            argv=argv,
            cwd=cwd,
            disks=tuple(_disks(in_use(store, ""), {}, command, cwd)),
            created=datetime.now(UTC).isoformat(),
        )
        store.make_vm_folder(record.id)
        store.save(record)
    return record


def define_again(store: Store, record: VmRecord, argv: tuple[str, ...], cwd: str) -> VmRecord:
    """The record of a VM with another command line; it is not kept yet.

    Raises:
        CommandLineError: As `define_new`, and so the others.
        ConflictError: ...
        HostError: ...
    """
    command = CommandLine.parse(argv)
    known = {disk.origin.path: disk for disk in record.disks + record.set_aside}
    with store.naming():
        disks = tuple(_disks(in_use(store, record.id), known, command, cwd))
    named = {disk.origin.path for disk in disks}
    set_aside = tuple(disk for path, disk in known.items() if path not in named)
    again = replace(record, argv=argv, cwd=cwd, disks=disks, topology=None, set_aside=set_aside)
    return replace(again, adopted=None)


def refuse_in_use(path: str, taken: Mapping[str, Claim]) -> None:
    """Refuse an image that something else stands on.

    Raises:
        ConflictError: It is among those *taken*, as `in_use` tells them.
    """
    if path in taken:
        raise ConflictError(
            f"{path} cannot be written to: {taken[path].words}", taken[path].remedy, path=path
        )


def _disks(
    taken: Mapping[str, Claim],
    known: dict[str, DiskRecord],
    command: CommandLine,
    cwd: str,
) -> Iterator[DiskRecord]:
    """The writable disks of a command line, on the images with their newest content."""
    for disk in command_line.disks(command, cwd):
        if disk.read_only:
            continue
        path = str(Path(disk.path).resolve())
        images.require_disk(Path(path))
        if path not in known:
            refuse_in_use(path, taken)
        origin = Image(path, _format(disk, path, known))
        active = known[path].active if path in known else origin
        yield DiskRecord(disk.index, disk.name, origin, active)


def _format(disk: DiskArgument, path: str, known: dict[str, DiskRecord]) -> Format:
    """The format that the user gave; else the one found when the disk was first seen."""
    if disk.format:
        return cast("Format", disk.format)
    return known[path].origin.format if path in known else images.probe_format(Path(path))


def in_use(store: Store, own_id: str) -> dict[str, Claim]:
    """Each image that a VM would damage by writing to it, and what stands on it.

    The newest image of a forgotten VM is free to take: nothing stands on it any more.
    """
    taken = dict(_of_forgotten(store))
    for record in store.records():
        for manifest in store.sound_manifests(record.id)[0]:
            for part in manifest.storage:
                for layer in part.layers:
                    words = f"the snapshot {manifest.id} of {record.name!r} stands on it"
                    taken[layer.path] = Claim(words)
        if record.id != own_id:
            for disk in record.disks + record.set_aside:
                owner = f"it belongs to the VM {record.name!r}"
                newest = f"its newest content is in {disk.active.path}"
                taken[disk.origin.path] = Claim(f"{owner}; {newest}")
                taken[disk.active.path] = Claim(owner)
    return taken


def _of_forgotten(store: Store) -> Iterator[tuple[str, Claim]]:
    """The first images of forgotten VMs that newer ones stand on still."""
    for record in store.forgotten():
        for disk in record.disks + record.set_aside:
            newest = disk.active.path
            if disk.active != disk.origin and _may_be_there(Path(newest)):
                words = f"it was of the forgotten VM {record.name!r}; its newest content is in"
                claim = Claim(f"{words} {newest}", f"put {newest} on the command line in its place")
                if _may_be_the_one(store, record, disk.origin.path):
                    yield disk.origin.path, claim


def _may_be_there(path: Path) -> bool:
    """Whether a file is there; one that may not be looked at may be."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _may_be_the_one(store: Store, record: VmRecord, path: str) -> bool:
    """Whether the file at *path* may be the one that a forgotten VM had there.

    By its inode alone: a file system may get another device number at each start of the host.
    """
    try:
        manifests = store.forgotten_manifests(record.id)
        found = Path(path).stat().st_ino
    except (StoreError, OSError):
        return True
    layers = [layer for manifest in manifests for part in manifest.storage for layer in part.layers]
    inodes = {layer.identity.inode for layer in layers if layer.path == path}
    return not inodes or bool(inodes & {found, 0})  # 0: of a device, which has none

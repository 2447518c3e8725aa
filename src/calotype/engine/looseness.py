"""What lies about: files that look like ours and that no record, manifest or journal names.

A file that was just made may be named by what is written next, so files are listed before what
names them is read. Where a record, a manifest or a journal cannot be read, nobody knows what it
names: then no image is called loose.
"""

import contextlib
import functools
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from calotype.errors import CalotypeError, StoreError
from calotype.model import names
from calotype.model.snapshot import Manifest
from calotype.model.vm import VmRecord
from calotype.plan.sights import LooseFile, Trouble
from calotype.store import images
from calotype.store import journal as journals
from calotype.store.files import TEMPORARY_PREFIX
from calotype.store.store import Store

_YOUNG_S = 60.0
"""A temporary file that is younger may be about to be opened by the one who made it."""

_Value = TypeVar("_Value")


class Catalogue(msgspec.Struct, frozen=True):
    """All that can be read of a store, and what is wrong with the rest."""

    records: tuple[VmRecord, ...]
    forgotten: tuple[VmRecord, ...]
    manifests: dict[str, tuple[Manifest, ...]]
    """By VM, those that were forgotten included."""
    damage: tuple[Trouble, ...]


def read(store: Store) -> Catalogue:
    """Read all records and manifests; what cannot be read is told, and in the way of no other."""
    errors: list[CalotypeError] = list(store.damage)
    records, damage = store.sound_records()
    errors += damage
    manifests = {}
    for record in records:
        manifests[record.id], damage = store.sound_manifests(record.id)
        errors += damage
        _try(errors, functools.partial(store.process, record.id))
        for path in store.unfinished(record.id):
            _try(errors, functools.partial(journals.read, path), moved=path)
    forgotten = _try(errors, store.forgotten) or []
    for record in forgotten:
        kept = _try(errors, functools.partial(store.forgotten_manifests, record.id))
        manifests[record.id] = kept or []
    return Catalogue(
        records=tuple(records),
        forgotten=tuple(forgotten),
        manifests={vm_id: tuple(each) for vm_id, each in manifests.items()},
        damage=tuple(dict.fromkeys(Trouble(each.problem, each.remedy) for each in errors)),
    )


def _try(
    errors: list[CalotypeError], look: Callable[[], _Value], moved: Path | None = None
) -> _Value | None:
    """Look; note an error, unless it is that the file *moved* has gone to another place."""
    try:
        return look()
    except CalotypeError as error:
        if moved is None or moved.exists():
            errors.append(error)
        return None


def origins(catalogue: Catalogue) -> set[str]:
    """The images that the users' command lines name, or named."""
    records = catalogue.records + catalogue.forgotten
    found = {disk.origin.path for each in records for disk in each.disks + each.set_aside}
    for manifests in catalogue.manifests.values():
        found |= {part.origin.path for manifest in manifests for part in manifest.storage}
    return found


def list_beside(origins_: Iterable[str]) -> list[Path]:
    """The files of ours, by their names, in the folders of these images."""
    by_folder: dict[Path, list[str]] = {}
    for origin in origins_:
        by_folder.setdefault(Path(origin).parent, []).append(origin)
    found = []
    for folder, images_ in by_folder.items():
        with contextlib.suppress(OSError):
            for path in sorted(folder.iterdir()):
                is_overlay = any(names.is_overlay_of(str(path), origin) for origin in images_)
                if is_overlay or path.name.startswith(TEMPORARY_PREFIX):
                    found.append(path)
    return found


def loose_files(
    store: Store, catalogue: Catalogue, beside: Iterable[Path]
) -> tuple[LooseFile, ...]:
    """What nothing names, of the files *beside* the images and of those in the store."""
    known = set(map(os.path.realpath, _named(store, catalogue)))
    found = list(_in_store(store, catalogue))
    for path in beside:
        if path.name.startswith(TEMPORARY_PREFIX):
            found += _temporary(path, "")
        elif not catalogue.damage and os.path.realpath(path) not in known:
            found.append(LooseFile(str(path), "overlay", _size(path)))
    return tuple(found)


# --- what is named -------------------------------------------------------------------------------


def _named(store: Store, catalogue: Catalogue) -> Iterator[str]:
    """Every path that a record, a manifest or a journal names, and what such an image stands on."""
    for record in catalogue.records + catalogue.forgotten:
        for disk in record.disks + record.set_aside:
            yield disk.origin.path
            yield disk.active.path
            with contextlib.suppress(CalotypeError):
                chain = images.backing_chain(Path(disk.active.path), disk.active.format)
                yield from (str(path) for path, _ in chain)
    for manifests in catalogue.manifests.values():
        yield from _texts(msgspec.to_builtins(manifests))
    for record in catalogue.records:
        for path in store.unfinished(record.id):
            with contextlib.suppress(StoreError):
                yield from _texts(msgspec.to_builtins(journals.read(path)[0]))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value that is an absolute path."""
    if isinstance(value, str):
        yield from [value] if value.startswith("/") else []
    elif isinstance(value, dict):
        for key, member in value.items():
            yield from _texts(key)
            yield from _texts(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _texts(member)


# --- the store's own folders ----------------------------------------------------------------------


def _in_store(store: Store, catalogue: Catalogue) -> Iterator[LooseFile]:
    for folder in sorted(store.root.glob("vms/*/")):
        if not (folder / "record.json").exists():
            yield LooseFile(str(folder), "vm", _size(folder))
    for record in catalogue.records:
        folder = store.folder(record.id)
        for path in sorted(folder.rglob(f"{TEMPORARY_PREFIX}*")):
            yield from _temporary(path, record.name)
        sound = {manifest.id: manifest for manifest in catalogue.manifests[record.id]}
        under_way = set(_under_way(store, record))
        for snapshot in sorted(folder.glob("snapshots/*/")):
            if not (snapshot / "manifest.json").exists():
                if snapshot.name not in under_way:
                    yield LooseFile(str(snapshot), "snapshot", _size(snapshot), record.name)
            elif snapshot.name in sound:
                yield from _beside_manifest(snapshot, sound[snapshot.name], record)


def _under_way(store: Store, record: VmRecord) -> Iterator[str]:
    """The snapshots that the journals are about; what was cut off is told by itself."""
    for path in store.unfinished(record.id):
        with contextlib.suppress(StoreError):
            began = journals.read(path)[0]
            assert isinstance(began, journals.Began)
            yield from (began.snapshot, began.id)


def _beside_manifest(folder: Path, manifest: Manifest, record: VmRecord) -> Iterator[LooseFile]:
    expected = {"manifest.json", "labels.json"}
    expected |= {manifest.machine_state.file} if manifest.machine_state else set()
    for path in sorted(folder.iterdir()):
        if path.name not in expected and not path.name.startswith(TEMPORARY_PREFIX):
            yield LooseFile(str(path), "state", _size(path), record.name)


def _temporary(path: Path, vm: str) -> Iterator[LooseFile]:
    with contextlib.suppress(OSError):
        if time.time() - path.lstat().st_mtime > _YOUNG_S:
            yield LooseFile(str(path), "temporary", _size(path), vm)


def _size(path: Path) -> int:
    """How much space a file or a folder takes."""
    total = 0
    with contextlib.suppress(OSError):
        for each in (path, *path.rglob("*")):
            found = each.lstat()
            total += found.st_blocks * 512 if stat.S_ISREG(found.st_mode) else 0
    return total

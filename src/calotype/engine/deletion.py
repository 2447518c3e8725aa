"""Delete: look at all images of a VM and at who needs them, plan, and carry the plan out.

As with every operation everything is looked at before anything is touched: what the manifests say,
what lies on disk beside the images (an overlay that no snapshot knows may stand on one of ours),
what other VMs name, and what the QEMU that runs has open.
"""

import os
import secrets
import shlex
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from calotype.engine import launch
from calotype.engine.changing import carry_out, changing
from calotype.engine.progress import Progress, silent
from calotype.engine.world import World
from calotype.errors import CalotypeError
from calotype.formats.qcow2 import Header, Metadata
from calotype.model import names
from calotype.model.identity import Format, Identity
from calotype.model.snapshot import Manifest
from calotype.model.vm import DiskRecord, Image, Process, VmRecord
from calotype.plan.delete import Catalogue, DeletePlan, DeleteRequest, as_error, plan_delete
from calotype.plan.layers import DiskLayers, Inside, Layer
from calotype.plan.take_plan import Blocker
from calotype.qemu import live_merge
from calotype.qemu.live_merge import Open
from calotype.store import images
from calotype.store.store import Store

_BITMAPS = 1
"""The bit of a qcow2's autoclear features that says that it holds dirty bitmaps."""

_NOTHING_OPEN = Open(frozenset(), (), {}, ())


async def delete_plan_only(store: Store, name: str, request: DeleteRequest) -> DeletePlan:
    """Say what `delete` would do; nothing is changed."""
    record = store.find(name)
    return plan_delete(await look_around(store, record), request)


async def delete(
    store: Store, name: str, request: DeleteRequest, *, progress: Progress = silent
) -> DeletePlan:
    """Delete snapshots of a VM, whether or not it runs, and merge the images that they leave.

    Args:
        store: Where they are kept.
        name: The VM.
        request: Which, and whether their descendants go too.
        progress: Told how far it is.

    Returns:
        The plan, which has been carried out.

    Raises:
        NotFoundError: There is no such VM.
        ConflictError: Somebody else is changing it.
        BlockedError: The plan has blockers, a protected snapshot among them; nothing was changed.
        MismatchError: An image is not what was recorded; nothing was changed.
        QemuError: QEMU failed to merge. The snapshots are gone; the rest can be gone on with.
        HostError: As QemuError, of qemu-img and the files.
    """
    async with changing(store, name, "delete", progress=progress) as record:
        launch.refuse_limited(store, record, "delete")
        plan = plan_delete(await look_around(store, record, is_holder=True), request)
        if error := as_error(record.name, plan):
            raise error
        if plan.steps:
            world = World(store, record, launch.is_running(store, record), progress)
            first = plan.snapshots[0] if plan.snapshots else ""
            operation_id = secrets.token_hex(names.ID_LENGTH // 2)
            await carry_out(world, "delete", operation_id, first, plan.steps)
    return plan


# --- looking around ------------------------------------------------------------------------------


async def look_around(
    store: Store,
    record: VmRecord,
    manifests: Sequence[Manifest] | None = None,
    *,
    is_holder: bool = False,
) -> Catalogue:
    """Read all that a delete must know of a VM; contents are not read.

    Args:
        store: Where it is kept.
        record: The VM.
        manifests: Its snapshots, oldest first, where not all can be read; else all are read here.
        is_holder: Whether the caller holds the VM's lock, and so may use its monitor.
    """
    manifests = tuple(store.manifests(record.id) if manifests is None else manifests)
    qemu = launch.is_running(store, record)
    opened, is_running = await _ask(store, record, qemu, is_holder=is_holder)
    claims = _claims(store, record)
    disks = tuple(_disks(record, manifests, opened, claims))
    return Catalogue(
        record=record,
        manifests=manifests,
        protected=frozenset(
            manifest.id
            for manifest in manifests
            if store.labels(record.id, manifest.id).is_protected
        ),
        disks=disks,
        identities=_identities(disks),
        state_bytes={
            manifest.id: _state_bytes(store.snapshot_folder(record.id, manifest.id))
            for manifest in manifests
        },
        is_running=is_running,
        faults=tuple(_faults(record, disks, opened)) if qemu else (),
    )


async def _ask(
    store: Store, record: VmRecord, qemu: Process | None, *, is_holder: bool
) -> tuple[Open, bool]:
    """What QEMU has open, and whether the guest runs."""
    if qemu is None:
        return _NOTHING_OPEN, False
    connected = launch.controlling if is_holder else launch.looking
    async with connected(store, record) as monitor:
        opened = await live_merge.look(monitor)
        return opened, (await monitor.execute("query-status"))["running"]


def _state_bytes(folder: Path) -> int:
    return sum(images.allocated_bytes(entry) for entry in folder.iterdir() if entry.is_file())


def _identities(disks: Sequence[DiskLayers]) -> dict[str, Identity]:
    return {
        layer.path: images.identify(Path(layer.path), layer.image.format)
        for disk in disks
        for layer in disk.layers.values()
        if layer.is_ours
    }


def _claims(store: Store, record: VmRecord) -> dict[str, str]:
    """Each image that another VM stands on, or a disk that was set aside, with words for it.

    What an image stands on is read from the image: a VM may stand on one that it does not name.
    """
    claims: dict[str, str] = {}
    records, _ = store.sound_records()  # one that cannot be read is in the way of its own VM alone
    others = [
        (other, store.sound_manifests(other.id)[0]) for other in records if other.id != record.id
    ]
    others += [(other, store.forgotten_manifests(other.id)) for other in store.forgotten()]
    for other, manifests in others:
        paths = {path for manifest in manifests for path in _named(manifest)}
        paths |= set(_stood_on(other.disks + other.set_aside))
        claims |= dict.fromkeys(paths, f"the VM {other.name!r} has it")
    aside = dict.fromkeys(_stood_on(record.set_aside), "a disk that was set aside has it")
    return claims | aside


def _stood_on(disks: Iterable[DiskRecord]) -> Iterator[str]:
    """Each image that a disk names or stands on."""
    for disk in disks:
        yield disk.origin.path
        yield disk.active.path
        yield from _chain(disk.active)


def _named(manifest: Manifest) -> Iterator[str]:
    for part in manifest.storage:
        if part.image:
            yield part.image.path
        for layer in part.layers:
            yield layer.path


# --- one disk ------------------------------------------------------------------------------------


def _disks(
    record: VmRecord, manifests: Sequence[Manifest], opened: Open, claims: Mapping[str, str]
) -> Iterator[DiskLayers]:
    """The disks of the VM, and those that only snapshots have any more."""
    present = {disk.origin.path: disk for disk in record.set_aside + record.disks}
    parts = [part for manifest in manifests for part in manifest.storage]
    names_of = {part.origin.path: (part.origin, part.disk) for part in parts}
    names_of |= {path: (disk.origin, disk.name) for path, disk in present.items()}
    for path, (origin, name) in names_of.items():
        known = {
            layer.path: Image(layer.path, layer.format)
            for part in parts
            if part.origin.path == path
            for layer in part.layers
        }
        known |= {
            part.image.path: part.image for part in parts if part.origin.path == path and part.image
        }
        yield _disk(origin, name, present.get(path), known, opened, claims)


def _disk(
    origin: Image,
    name: str,
    record: DiskRecord | None,
    known: dict[str, Image],
    opened: Open,
    claims: Mapping[str, str],
) -> DiskLayers:
    known = {**known, origin.path: origin}
    if record is not None:
        known |= {record.active.path: record.active}
        known |= _chain(record.active)
    found = {path: image for path, image in known.items() if Path(path).exists()}
    layers = {path: _layer(image, origin, opened, is_known=True) for path, image in found.items()}
    layers |= _strangers(layers, origin, opened)
    return DiskLayers(
        index=record.index if record else -1,
        disk=name,
        origin=origin,
        active=record.active if record else None,
        layers=_joined(layers),
        claimed={path: who for path, who in claims.items() if path in layers},
        free_bytes=images.free_bytes(Path(origin.path).parent),
    )


def _chain(active: Image) -> dict[str, Image]:
    """What the active image stands on."""
    if not Path(active.path).exists():
        return {}
    chain = images.backing_chain(Path(active.path), active.format)
    return {str(path): Image(str(path), format_) for path, format_ in chain}


def _layer(image: Image, origin: Image, opened: Open, *, is_known: bool) -> Layer:
    """One image as it is on disk."""
    path = Path(image.path)
    layer = Layer(
        image=image,
        backing=None,
        allocated_bytes=images.allocated_bytes(path),
        is_ours=_is_ours(image.path, origin.path),
        is_known=is_known,
        is_open=opened.has(image.path),
    )
    if image.format == "raw":
        size_bytes = images.identify(path, "raw").virtual_size_bytes
        return replace(layer, virtual_size_bytes=size_bytes)
    metadata = images.read_metadata(path)
    return replace(
        layer,
        backing=_backing(path, metadata.header),
        virtual_size_bytes=metadata.header.virtual_size_bytes,
        inside=tuple(Inside(each.id, each.name, each.digest) for each in metadata.snapshots),
        obstacle=_obstacle(metadata),
    )


def _is_ours(path: str, origin: str) -> bool:
    if path == origin:
        return True
    return Path(path).parent == Path(origin).parent and names.is_overlay_of(path, origin)


def _backing(path: Path, header: Header) -> Image | None:
    """What an image stands on, by its header."""
    if header.backing_file is None:
        return None
    format_: Format = "qcow2" if header.backing_format == "qcow2" else "raw"
    return Image(str(path.parent / header.backing_file), format_)


def _obstacle(metadata: Metadata) -> str:
    """Why an image cannot be merged, if its header says so."""
    header = metadata.header
    if header.encryption != "none":
        return "is encrypted"
    if header.data_file is not None:
        return "keeps its data in another file"
    if header.autoclear_features & _BITMAPS:
        return "holds dirty bitmaps, which a merge would lose"
    return ""


def _joined(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The images with their backing called by the path that is known, whatever links it is by."""
    known = {os.path.realpath(path): layer.image for path, layer in layers.items()}

    def join(layer: Layer) -> Layer:
        below = known.get(os.path.realpath(layer.backing.path)) if layer.backing else None
        return replace(layer, backing=below) if below else layer

    return {path: join(layer) for path, layer in layers.items()}


def _strangers(layers: Mapping[str, Layer], origin: Image, opened: Open) -> dict[str, Layer]:
    """Images beside ours that stand on one of them, and that no snapshot knows."""
    ours = {os.path.realpath(path): path for path in layers}
    found = {}
    for path in _beside(Path(origin.path)):
        if os.path.realpath(path) in ours:
            continue
        try:
            if images.probe_format(path) != "qcow2":
                continue
            layer = _layer(Image(str(path), "qcow2"), origin, opened, is_known=False)
        except CalotypeError:
            if _is_ours(str(path), origin.path):
                raise
            continue
        if layer.backing and os.path.realpath(layer.backing.path) in ours:
            found[str(path)] = layer
    return found


def _beside(origin: Path) -> Iterator[Path]:
    for entry in sorted(origin.parent.iterdir()):
        try:
            if stat.S_ISREG(entry.stat().st_mode):
                yield entry
        except OSError:
            continue


# --- the QEMU that runs --------------------------------------------------------------------------


def _faults(record: VmRecord, disks: Sequence[DiskLayers], opened: Open) -> Iterator[Blocker]:
    """What keeps a running QEMU from merging anything."""
    for words in opened.busy:
        yield Blocker(words, "wait for it or remove it")
    for disk in disks:
        if disk.active is None:
            continue
        chain = opened.chain(disk.active.path)
        on_disk = [os.path.realpath(path) for path in _chain(disk.active)]
        if [node.path for node in chain] != on_disk or not live_merge.is_plain(chain):
            yield Blocker(
                f"QEMU does not have disk {disk.disk!r} on {disk.active.path} as it is on disk",
                f"stop the VM (`calotype stop {shlex.quote(record.name)}`), then delete",
            )

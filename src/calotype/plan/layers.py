"""What stands on what, and what becomes of the images that nobody needs any more.

A disk's images are a tree: each stands on one other, and any number stand on it. An image is
*needed* if a snapshot that stays is its content, if it holds the newest content, or if somebody
else names it. What becomes of the others is decided one at a time, until nothing more can be done:

    nothing stands on it  -> it is removed
    one stands on it      -> that one is merged *down* into it and goes away; it takes its place
    several stand on it   -> it is merged *up* into each, and goes away, if that is cheap and closed
    it is the user's path -> it is never removed; the newest content gets back there in the end

The rules that make this safe:

* Merging down changes what every other image on that base reads, and QEMU knows no other than those
  it has open. So they are counted over all that is found on disk, strangers' overlays included.
* Content is what needs an image, or a snapshot inside it. A snapshot inside reads what its holder
  stands on: an image with one inside may be merged into, for then its own base stays the same, but
  it is never merged away, nor put onto another base.
* Where there is a doubt the image is kept, and the reason is said.

Nothing here touches a file. Sizes after a merge are the largest that are possible.
"""

from collections.abc import Iterator, Mapping

from msgspec import Struct
from msgspec.structs import replace

from calotype.model.vm import Image

UP_SHARE = 10
"""A merge up may write at most one tenth of the space that is free."""

_OVERHEAD_SHARE = 64
"""What an image takes beyond its disk's size, for its tables: less than a sixty-fourth."""


class Inside(Struct, frozen=True):
    """A snapshot inside an image."""

    id: str
    name: str
    digest: str = ""


class Layer(Struct, frozen=True):
    """One image, as it is on disk now."""

    image: Image
    backing: Image | None
    virtual_size_bytes: int = 0
    allocated_bytes: int = 0
    inside: tuple[Inside, ...] = ()
    is_ours: bool = True
    """Whether it is the user's first image, or an overlay of ours over that."""
    is_known: bool = True
    """Whether a snapshot or the record of the VM has it in a chain."""
    is_open: bool = False
    """Whether the VM's QEMU has it open."""
    obstacle: str = ""
    """Why it cannot be merged with another, in words."""

    @property
    def path(self) -> str:
        """Where it is."""
        return self.image.path


class DiskLayers(Struct, frozen=True):
    """All images of one disk, and who needs which."""

    index: int
    """The disk's index; -1 where the VM has the disk no longer."""
    disk: str
    origin: Image
    active: Image | None
    layers: Mapping[str, Layer]
    held: Mapping[str, tuple[str, ...]] = {}
    """Path -> the snapshots that stay and are this image's content."""
    claimed: Mapping[str, str] = {}
    """Path -> who else needs this image, in words."""
    free_bytes: int = 0

    def children(self, path: str) -> tuple[Layer, ...]:
        """What stands on an image."""
        return tuple(
            layer for layer in self.layers.values() if layer.backing and layer.backing.path == path
        )

    @property
    def active_path(self) -> str:
        """The image with the newest content; "" where there is none."""
        return self.active.path if self.active else ""


class Operation(Struct, frozen=True, tag=True):
    """One change to the tree."""


class Remove(Operation, frozen=True):
    """Remove an image that nothing stands on."""

    layer: Layer


class Down(Operation, frozen=True):
    """Merge the only image that stands on *base* into it."""

    top: Layer
    base: Layer
    children: tuple[Layer, ...]


class Up(Operation, frozen=True):
    """Merge *layer* into each image that stands on it; without a layer, just put them *onto*."""

    layer: Layer | None
    children: tuple[Layer, ...]
    onto: Image | None


class Replace(Operation, frozen=True):
    """Let a stand-alone copy with the newest content take the place of the user's first image."""

    copy: Layer
    origin: Layer


class Stay(Struct, frozen=True):
    """An image that stays, and why."""

    path: str
    reason: str
    is_needed: bool


_ORDER: tuple[type[Operation], ...] = (Remove, Down, Up, Replace)
"""What is done first: removing may leave one child where there were two."""


def settle(disk: DiskLayers) -> tuple[list[Operation], DiskLayers]:
    """Say all that is done to a disk's images, in order, and how they are afterwards."""
    operations: list[Operation] = []
    while operation := _next(disk):
        operations.append(operation)
        disk = after(disk, operation)
    return operations, disk


def stays(disk: DiskLayers) -> Iterator[Stay]:
    """Every image of ours on a settled disk, with the reason why it is there."""
    for layer in _bottom_up(disk):
        if layer.is_ours:
            reason = _need(disk, layer)
            yield Stay(layer.path, reason or str(_fate(disk, layer)), is_needed=bool(reason))


def closed(disk: DiskLayers) -> DiskLayers:
    """A disk's images as they are while the VM is off."""
    layers = {path: replace(layer, is_open=False) for path, layer in disk.layers.items()}
    return replace(disk, layers=layers)


def _next(disk: DiskLayers) -> Operation | None:
    fates = [_fate(disk, layer) for layer in _bottom_up(disk)]
    possible = [fate for fate in fates if isinstance(fate, Operation)]
    return min(possible, key=lambda fate: _ORDER.index(type(fate)), default=None)


def _bottom_up(disk: DiskLayers) -> list[Layer]:
    """The images, each after what it stands on, so that nothing is copied twice."""

    def depth(layer: Layer) -> int:
        steps = 0
        while layer.backing and layer.backing.path in disk.layers and steps < len(disk.layers):
            layer, steps = disk.layers[layer.backing.path], steps + 1
        return steps

    return sorted(disk.layers.values(), key=lambda layer: (depth(layer), layer.path))


# --- what becomes of one image -------------------------------------------------------------------


def _fate(disk: DiskLayers, layer: Layer) -> Operation | str:
    """What can be done with an image, or why nothing is."""
    if reason := _need(disk, layer):
        return reason
    on_it = disk.children(layer.path)
    if not on_it:
        return _alone(disk, layer)
    if len(on_it) == 1:
        return _down(disk, layer, on_it[0])
    return _up(disk, layer, on_it)


def _need(disk: DiskLayers, layer: Layer) -> str:
    """Who needs an image for its content, in words."""
    if not layer.is_ours:
        return "it is none of Calotype's"
    if not layer.is_known:
        return "no snapshot knows it"
    if layer.path == disk.active_path:
        return "it holds the newest content"
    if held := disk.held.get(layer.path):
        return f"it is the disk of {_listed(held)}"
    return disk.claimed.get(layer.path, "")


def _alone(disk: DiskLayers, layer: Layer) -> Operation | str:
    """Nothing stands on it."""
    if layer.inside:
        return f"it holds {_inside(layer)}"
    if layer.path == disk.origin.path:
        return _origin(disk, layer)
    if layer.is_open:
        return "QEMU has it open"
    return Remove(layer)


def _origin(disk: DiskLayers, origin: Layer) -> Operation | str:
    """The user's first image, empty of sense: the newest content may get back there."""
    copy = disk.layers.get(disk.active_path)
    if copy is None or copy.backing is not None or disk.children(copy.path):
        return "it is the path that the command line names"
    if disk.held.get(copy.path) or disk.claimed.get(copy.path):
        return "it is the path that the command line names, and the newest content is needed too"
    if copy.is_open or origin.is_open:
        return f"{copy.path} takes its place only while the VM is off"
    if copy.image.format == origin.image.format:
        return Replace(copy, origin)
    if copy.inside:
        return f"{copy.path} holds {_inside(copy)}, and a {origin.image.format} image cannot"
    return _mismatch(origin, copy) or Up(None, (copy,), origin.image)


def _down(disk: DiskLayers, base: Layer, top: Layer) -> Operation | str:
    """One image stands on it: that one's content may come down into it."""
    above = disk.children(top.path)
    for layer in (top, *above):
        if reason := _stranger(disk, layer):
            return f"{layer.path} stands on it, and {reason}"
    if top.inside:
        return f"{top.path} stands on it and holds {_inside(top)}"
    if base.is_open != top.is_open:
        return f"QEMU has {base.path if base.is_open else top.path} open, but not both"
    return _mismatch(base, top) or Down(top, base, above)


def _up(disk: DiskLayers, layer: Layer, on_it: tuple[Layer, ...]) -> Operation | str:
    """Several images stand on it: its content may go up into each."""
    reason = _against_up(disk, layer, on_it)
    if reason:
        return f"{len(on_it)} images stand on it, {reason}"
    return Up(layer, on_it, layer.backing)


def _against_up(disk: DiskLayers, layer: Layer, on_it: tuple[Layer, ...]) -> str:
    """Why the content of an image should not go up into what stands on it."""
    if layer.path == disk.origin.path:
        return "and it is the path that the command line names"
    if layer.inside:
        return f"and it holds {_inside(layer)}"
    for child in on_it:
        if reason := _stranger(disk, child) or _mismatch(layer, child):
            return f"among them {child.path}: {reason}"
        if child.inside:
            return f"among them {child.path}, which holds {_inside(child)}"
    if layer.is_open or any(child.is_open for child in on_it):
        return "and QEMU has it open"
    copied = layer.allocated_bytes * len(on_it)
    is_dear = copied * UP_SHARE > disk.free_bytes
    return f"and merging it into them would write {copied} bytes" if is_dear else ""


def _stranger(disk: DiskLayers, layer: Layer) -> str:
    """Why an image that stands on another may not be written to, or put onto another base."""
    if not layer.is_ours:
        return "it is none of Calotype's"
    if not layer.is_known:
        return "no snapshot knows it"
    return disk.claimed.get(layer.path, "")


def _mismatch(below: Layer, above: Layer) -> str:
    """Why the content of one cannot simply go into the other."""
    if below.virtual_size_bytes != above.virtual_size_bytes:
        return f"their sizes differ: {below.virtual_size_bytes} and {above.virtual_size_bytes}"
    for layer in (below, above):
        if layer.obstacle:
            return f"{layer.path} {layer.obstacle}"
    return ""


def _inside(layer: Layer) -> str:
    named = ", ".join(repr(entry.name) for entry in layer.inside)
    return f"the snapshot{'s' * (len(layer.inside) > 1)} inside {named}"


def _listed(snapshots: tuple[str, ...]) -> str:
    return f"snapshot{'s' * (len(snapshots) > 1)} {', '.join(snapshots)}"


# --- what an operation makes of the tree ---------------------------------------------------------


def after(disk: DiskLayers, operation: Operation) -> DiskLayers:
    """The disk as it is after *operation*."""
    match operation:
        case Remove(layer):
            return _without(disk, layer.path)
        case Down(top, base, children):
            base = replace(base, allocated_bytes=base.allocated_bytes + growth_bytes(top, base))
            moved = (base, *(replace(child, backing=base.image) for child in children))
            return _inherit(_with(_without(disk, top.path), *moved), top.path, base.image)
        case Up(layer, children, onto):
            grown = 0 if layer is None else layer.allocated_bytes
            moved = tuple(
                replace(child, backing=onto, allocated_bytes=child.allocated_bytes + grown)
                for child in children
            )
            return _with(_without(disk, layer.path) if layer else disk, *moved)
        case Replace(copy, origin):
            taken = replace(copy, image=origin.image)
            return _inherit(_with(_without(disk, copy.path), taken), copy.path, origin.image)
    raise TypeError(operation)


def growth_bytes(top: Layer, base: Layer) -> int:
    """By how much *base* grows at most when *top* is merged into it."""
    limit = base.virtual_size_bytes + base.virtual_size_bytes // _OVERHEAD_SHARE
    return min(top.allocated_bytes, max(0, limit - base.allocated_bytes))


def _without(disk: DiskLayers, path: str) -> DiskLayers:
    return replace(disk, layers={key: kept for key, kept in disk.layers.items() if key != path})


def _with(disk: DiskLayers, *layers: Layer) -> DiskLayers:
    return replace(disk, layers={**disk.layers, **{layer.path: layer for layer in layers}})


def _inherit(disk: DiskLayers, gone: str, heir: Image) -> DiskLayers:
    """Let *heir* stand for what the image *gone* stood for."""
    held = {path: who for path, who in disk.held.items() if path != gone}
    if gone in disk.held:
        held[heir.path] = disk.held[gone]
    return replace(disk, active=heir if disk.active_path == gone else disk.active, held=held)

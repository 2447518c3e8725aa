"""What a delete costs and frees, as far as can be told from the sizes of the images alone.

How much of two images lies at the same places of the disk is not known without reading them, so
what is freed is told as at least and at most, and the room that is needed as the most.
"""

from collections.abc import Iterator

from msgspec import Struct

from calotype.plan.layers import Down, Layer, Operation, Remove, Replace, Up, growth_bytes

MERGED_BYTES_PER_S = 300_000_000
"""What a merge writes in a second, for the estimate."""


class Merge(Struct, frozen=True):
    """One merge, for people."""

    direction: str
    """down: into the image below; up: into the images above."""
    source: str
    target: tuple[str, ...]
    bytes: int
    seconds: float


def merges(operations: list[Operation]) -> Iterator[Merge]:
    """The merges among the operations, for people."""
    for operation in operations:
        match operation:
            case Down(top, base, _):
                yield _merge("down", top.path, (base.path,), top.allocated_bytes)
            case Up(layer, children, onto):
                targets = tuple(child.path for child in children)
                if layer is not None:
                    copied = layer.allocated_bytes * len(children)
                    yield _merge("up", layer.path, targets, copied)
                elif onto is not None:
                    yield _merge("up", onto.path, targets, children[0].virtual_size_bytes)
            case _:
                pass


def _merge(direction: str, source: str, target: tuple[str, ...], size_bytes: int) -> Merge:
    seconds = round(size_bytes / MERGED_BYTES_PER_S, 1)
    return Merge(direction, source, target, size_bytes, seconds)


def freed_bytes(operations: list[Operation]) -> tuple[int, int]:
    """How many bytes the operations free: at least, and at most."""
    least = most = 0
    for operation in operations:
        match operation:
            case Remove(layer) | Replace(origin=layer):
                least, most = least + layer.allocated_bytes, most + layer.allocated_bytes
            case Down(top, base, _):
                least += top.allocated_bytes - growth_bytes(top, base)
                most += top.allocated_bytes  # where the base has room at the same places already
            case Up(Layer() as layer, children, _):
                least -= layer.allocated_bytes * (len(children) - 1)
                most += layer.allocated_bytes
            case _:
                pass
    return least, most


def peak_bytes(operations: list[Operation]) -> int:
    """The most that the merges take at any moment, beyond what is taken now."""
    taken = peak = 0
    for operation in operations:
        match operation:
            case Remove(layer):
                taken -= layer.allocated_bytes
            case Down(top, base, _):
                peak = max(peak, taken + growth_bytes(top, base))
                taken += growth_bytes(top, base) - top.allocated_bytes
            case Up(Layer() as layer, children, _):
                copied = layer.allocated_bytes * len(children)
                peak = max(peak, taken + copied)
                taken += copied - layer.allocated_bytes
            case _:
                pass
    return peak

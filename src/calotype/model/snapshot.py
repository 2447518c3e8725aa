"""A system snapshot: its manifest is the truth, everything else is an index or a picture of it.

The manifest names every part by identity (device, inode, times, digests), not by name, and holds
what a restore needs to refuse a machine that is not the one the snapshot was taken of. It is
written once, as canonical JSON, when every part is on disk; it never changes afterwards.
"""

from typing import Literal

from msgspec import Struct

from calotype.model.identity import Identity
from calotype.model.vm import Image, ImageFacts, ReadOnlyDisk, RunState, Topology

StorageKind = Literal["external", "internal", "skip"]
MachineStateKind = Literal["external", "none"]
Method = Literal["live", "paused", "storage-only", "left-behind"]
Consistency = Literal["machine", "filesystem", "crash"]
"""What a guest finds: itself as it was; file systems in order; what a power failure leaves."""


class StoragePart(Struct, frozen=True):
    """The storage snapshot of one disk."""

    index: int
    disk: str
    qdev: str
    kind: StorageKind
    reason: str
    origin: Image
    layers: tuple[ImageFacts, ...] = ()
    """External: the frozen image and what it stands on. Internal: what its holder stands on."""
    virtual_size_bytes: int = 0
    internal_id: str = ""
    internal_name: str = ""
    internal_digest: str = ""
    """Digest of the snapshot's entry and its L1 table (internal)."""
    image: Image | None = None
    """Where the content is: the frozen image (external), or the one that holds it (internal)."""


class MachineStatePart(Struct, frozen=True):
    """RAM and devices, outside of the VM's disks."""

    file: str
    """A file name inside the snapshot's folder."""
    identity: Identity
    digest: str
    """BLAKE3 of the whole file."""
    kind: Literal["external"] = "external"
    type: Literal["stream"] = "stream"


class Timings(Struct, frozen=True):
    """How long it took; the pause is STOP to RESUME by QEMU's own time stamps."""

    pause_ms: float | None
    total_ms: float
    phases_ms: dict[str, float]


class Quiesced(Struct, frozen=True):
    """The guest's file systems were frozen by its agent at the instant."""

    file_systems: int
    """How many."""
    frozen_ms: float
    agent: str
    """The agent's version."""


class Manifest(Struct, frozen=True):
    """All there is to say of a system snapshot."""

    id: str
    tag: str
    description: str
    parent: str | None
    vm_id: str
    vm_name: str
    instant: str
    """When the parts were of one instant, UTC, ISO 8601."""
    method: Method
    run_state: RunState
    """The VM's run state at the instant; never read out of the stream."""
    machine_state: MachineStatePart | None
    storage: tuple[StoragePart, ...]
    read_only: tuple[ReadOnlyDisk, ...]
    """Storage without information of its own instant; it must be there again all the same."""
    topology: Topology | None
    definition: tuple[tuple[str, str], ...]
    """The guest-visible part of the command line, in canonical form."""
    argv: tuple[str, ...]
    cwd: str
    qemu_version: tuple[int, int, int]
    timings: Timings
    quiesced: Quiesced | None = None
    format: int = 1

    @property
    def consistency(self) -> Consistency:
        """What the parts are worth to the guest that gets them."""
        if self.machine_state is not None:
            return "machine"
        return "crash" if self.quiesced is None else "filesystem"

    @property
    def bytes_written(self) -> int:
        """What the snapshot's own files hold."""
        return self.machine_state.identity.size_bytes if self.machine_state else 0

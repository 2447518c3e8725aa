"""A virtual machine as the store knows it, and as QEMU shows it.

`VmRecord` is what was defined: the command line, and for each disk the image that holds its newest
content. `Facts` is what one look at a running QEMU and its files found; facts age, so they are
passed by value from `observe` to `plan` and are compared once more before the guest is stopped.
"""

from typing import Literal

from msgspec import Struct

from calotype.model.identity import Format, Identity

RunState = Literal["running", "paused", "off"]
"""The three states that a user can ask for; QEMU knows some sixteen."""


class Image(Struct, frozen=True):
    """An image file and how it is to be read."""

    path: str
    format: Format


class DiskRecord(Struct, frozen=True):
    """A writable disk of the definition, in the order of the command line."""

    index: int
    """The place among all images that the command line names, read-only ones included."""
    name: str
    """The user's node name or id; else the drive name that QEMU gives; "" until QEMU ran once."""
    origin: Image
    """What the user's command line names. Never renamed, never replaced."""
    active: Image
    """The image with the newest content."""


class Topology(Struct, frozen=True):
    """What the guest can see of its machine and what a machine state depends on."""

    machine: str
    """The versioned machine type that an alias such as q35 resolved to."""
    memory_bytes: int
    cpus: tuple[str, ...]
    """The QOM type of each virtual CPU."""
    devices: tuple[str, ...]
    """`name=type` of each device that was added by the command line or plugged later."""
    media: tuple[str, ...] = ()
    """`device=file` of each read-only medium in a drive: a CD that was changed is another one."""


class Limit(Struct, frozen=True):
    """A command that does not work with an adopted VM, and why."""

    command: str
    problem: str
    remedy: str


class Dropped(Struct, frozen=True):
    """Words of an adopted VM's command line that it is not started with again, and why."""

    words: str
    reason: str


class Adopted(Struct, frozen=True):
    """How a VM was found that somebody else had started."""

    argv: tuple[str, ...]
    """The command line as it ran, by which it is known again."""
    qmp: str
    """The QMP socket that the user named."""
    uid: int
    """The user that it ran as."""
    dropped: tuple[Dropped, ...] = ()
    limits: tuple[Limit, ...] = ()


class VmRecord(Struct, frozen=True):
    """What the store keeps of one VM."""

    id: str
    name: str
    argv: tuple[str, ...]
    """QEMU's command line as the user wrote it."""
    cwd: str
    disks: tuple[DiskRecord, ...]
    created: str
    parent: str | None = None
    """The snapshot that the VM's present state descends from."""
    topology: Topology | None = None
    """As QEMU showed it when it last started."""
    set_aside: tuple[DiskRecord, ...] = ()
    """Disks that the VM once had and that its command line does not name now."""
    adopted: Adopted | None = None
    """How it was found, if it was adopted; then `argv` is what it is started with from now on."""
    format: int = 1


class Process(Struct, frozen=True):
    """A QEMU process; the start time tells it apart from a later one with its pid."""

    pid: int
    start_ticks: int
    monitor: str = ""
    """The QMP socket of one that was adopted; "" where it has those in the VM's folder."""


class Bitmap(Struct, frozen=True):
    """A dirty bitmap on a node."""

    node: str
    name: str


class Export(Struct, frozen=True):
    """A node that QEMU offers to others."""

    id: str
    kind: str
    node: str


class Stray(Struct, frozen=True):
    """Storage that the definition does not account for, or that cannot be frozen."""

    problem: str
    remedy: str = "take it out of the VM, or start the VM without it"
    node: str = ""
    """Which node it is, where it is one that could be accounted for."""


class LooseNode(Struct, frozen=True):
    """A writable node that no device is on."""

    node: str
    driver: str
    path: str
    backing: str = ""
    """What the image names as what it stands on, as a whole path; "" where it names nothing."""
    l2_tables: int = 0
    """How many tables for data a qcow2 has; none in one that was never written to."""


class DiskFacts(Struct, frozen=True):
    """A writable disk as QEMU shows it now."""

    index: int
    name: str
    qdev: str
    """The path of the device that the disk is plugged into; the identity across starts."""
    node: str
    """The node of the image, at the top of the chain: what an overlay is put over."""
    image: Image
    virtual_size_bytes: int
    chain: tuple["ImageFacts", ...]
    """The image and what it stands on, top first."""
    l2_tables: int
    cluster_bytes: int
    free_bytes: int
    """Room on the file system that the image is on."""
    origin: Image
    """What the user's command line names; overlays are named after it."""
    is_regular_file: bool
    """Whether the image is a file; a block device has no place beside it for an overlay."""
    mode: int
    """The image's permission bits, to be put back if a freeze is undone."""
    cache_direct: bool
    cache_no_flush: bool
    detect_zeroes: str
    may_hold_overlay: bool = True
    """Whether we may create an overlay beside the origin."""
    may_be_immutable: bool = True
    """Whether a freeze can stop root too: the file system has the flag, and we may set it."""
    internal_names: frozenset[str] = frozenset()
    """The names of the snapshots inside the image."""
    filters: tuple[str, ...] = ()
    """The filter nodes between the device and the image, the device's own first."""

    @property
    def root(self) -> str:
        """The node that the device is on."""
        return self.filters[0] if self.filters else self.node

    @property
    def labels(self) -> frozenset[str]:
        """All that a user may call this disk by."""
        return frozenset(filter(None, (self.name, self.qdev, self.node, *self.filters)))


class ImageFacts(Struct, frozen=True):
    """One image of a backing chain."""

    path: str
    format: Format
    identity: Identity


class ReadOnlyDisk(Struct, frozen=True):
    """Read-only storage: it carries no information of its own instant."""

    name: str
    path: str
    image: ImageFacts | None = None
    """Who it is, where it is a file or a device of this host."""


class MigrationFacts(Struct, frozen=True):
    """What QEMU's migration can do and how it is set."""

    capabilities: dict[str, bool]
    parameters: dict[str, int | str | bool]
    status: str
    blocked_reasons: tuple[str, ...]
    can_activate: bool
    """Whether it makes images active again, after a migration, without letting the guest run."""


class HostFacts(Struct, frozen=True):
    """What the host lets the QEMU process do."""

    write_tracking: bool
    """Whether the process may use userfaultfd write protection."""
    may_unprotect: bool
    """Whether we may take such protection off it from outside (pidfd_getfd)."""
    store_free_bytes: int
    resident_bytes: int
    """Resident memory of the QEMU process."""
    huge_bytes: int
    """How much of it is on transparent huge pages: cheap to protect."""


class AgentFacts(Struct, frozen=True):
    """The agent in the guest, as far as it was asked for; or why it cannot be reached."""

    socket: str
    """The path of the socket that leads to it; "" where the command line names none."""
    problem: str = ""
    """Why it cannot be asked; "" if it can."""
    remedy: str = ""
    version: str = ""
    commands: tuple[str, ...] = ()
    """The commands that it carries out."""
    is_frozen: bool = False
    """Whether file systems of the guest are frozen already."""


class Facts(Struct, frozen=True):
    """One look at a running VM; taken by `observe`, never changed."""

    version: tuple[int, int, int]
    run_state: str
    """As QEMU says it: running, paused, prelaunch, postmigrate, ..."""
    topology: Topology
    disks: tuple[DiskFacts, ...]
    read_only: tuple[ReadOnlyDisk, ...]
    strays: tuple[Stray, ...]
    block_jobs: tuple[str, ...]
    bitmaps: tuple[Bitmap, ...]
    memory_backends: tuple[str, ...]
    """Why each memory backend that cannot be write-tracked cannot, in words."""
    migration: MigrationFacts
    host: HostFacts
    graph_digest: str
    """Digest of the block graph; compared once more as the last act before `stop`."""
    loose: tuple[LooseNode, ...] = ()
    exports: tuple[Export, ...] = ()
    networks: tuple[str, ...] = ()
    """`name=type` of each end of a network, the guest's and the host's."""
    agent: AgentFacts | None = None
    """None where nobody needs it: then it is left alone."""

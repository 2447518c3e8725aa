"""What a check-up sees of host, store and VMs: facts, read without changing anything.

Each is passed by value from the look to the judgement (`diagnosis.py`), as the facts of a take are.
A look that fails is a fact as well: `Trouble` is an error that was met, with its own remedy.
"""

from msgspec import Struct

from calotype.model.vm import Image, VmRecord
from calotype.plan.restore_plan import Mismatch
from calotype.plan.take_plan import TakePlan


class Trouble(Struct, frozen=True):
    """What was in the way of a look, and what to do about it."""

    problem: str
    remedy: str


class QemuSight(Struct, frozen=True):
    """A QEMU that is installed, or that a VM names."""

    program: str
    version: tuple[int, int, int] | None
    abilities: tuple[str, ...] = ()
    """The migration capabilities and commands that it has, among those that make a difference."""
    fault: str = ""
    """Why it could not be asked."""


class HostSight(Struct, frozen=True):
    """The host, as the user of the command may use it."""

    kernel: str
    has_kvm: bool
    may_track_writes: bool
    missing_tools: tuple[str, ...]
    qemus: tuple[QemuSight, ...]
    shared_memory_free_bytes: int | None
    """Room on /dev/shm, where guest RAM is best kept; None where that is no tmpfs."""
    unseen_processes: int
    """Processes of other users, whose open files nobody tells us."""


class Space(Struct, frozen=True):
    """A folder that snapshots are written to."""

    path: str
    free_bytes: int
    is_in_memory: bool = False
    has_reflinks: bool | None = None
    """Whether files can share blocks; None where that could not be tried."""


class Opener(Struct, frozen=True):
    """A process that has a file open."""

    path: str
    pid: int
    command: str
    """The name of its program."""
    may_write: bool


class LooseFile(Struct, frozen=True):
    """A file or folder that looks like ours and that nothing refers to."""

    path: str
    kind: str
    """A key of `diagnosis.LOOSE`."""
    size_bytes: int
    vm: str = ""
    """The VM whose folder it is in, if it is in one."""


class ChainSight(Struct, frozen=True):
    """What the newest image of a disk stands on."""

    disk: str
    image: Image
    length: int
    trouble: Trouble | None = None


class SnapshotSight(Struct, frozen=True):
    """A snapshot, compared with what is there."""

    id: str
    mismatches: tuple[Mismatch, ...]
    writable: tuple[str, ...]
    """Images of it that should be frozen and are not."""


class VmSight(Struct, frozen=True):
    """One VM."""

    record: VmRecord
    pid: int | None
    """Its QEMU, if one runs."""
    is_changing: bool
    """Somebody was changing it during the look: what does not fit together is no fault then."""
    cut_off: tuple[str, ...]
    """Operations that nobody is carrying out any more."""
    snapshots: tuple[SnapshotSight, ...]
    frozen: frozenset[str]
    """The images that its snapshots stand on."""
    chains: tuple[ChainSight, ...]
    openers: tuple[Opener, ...]
    """Who has its newest images open."""
    has_program: bool
    has_folder: bool
    absent: tuple[str, ...]
    """Files that its command line names, besides its disks, and that are not there."""
    spaces: tuple[Space, ...]
    """The folders that its images are in."""
    has_secrets: bool
    """Whether a secret stands in its command line."""
    plan: TakePlan | None = None
    """What a snapshot would do now, if it runs and can be asked."""
    trouble: Trouble | None = None
    """Why it could not be asked, though it runs."""


class Sight(Struct, frozen=True):
    """All that was seen."""

    host: HostSight
    store: Space | None
    """None where there is no store yet."""
    store_path: str
    damage: tuple[Trouble, ...]
    index_fault: str
    loose: tuple[LooseFile, ...]
    frozen_openers: tuple[Opener, ...]
    """Who has frozen images open."""
    longest_chain: int
    """The longest chain of images that is followed."""
    vms: tuple[VmSight, ...]

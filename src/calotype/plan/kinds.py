"""What Calotype knows of QEMU's kinds of nodes, devices, networks, exports and memory: one table.

What is looked at (`qemu/observe.py`) and what is in the way (`plan/blockers.py`) read it, and
`docs/kinds.md` is drawn from it. Two rules stand behind the rows:

* **Storage** that is not in the table is in the way, by name: what a node of an unknown kind does
  with what is written to it cannot be told from outside. Read-only storage carries nothing.
* **Devices** that are not in the table are QEMU's matter: it saves what it knows, and says of the
  others that it cannot (`blocked-reasons` of `query-migrate`), which is passed on in its own words.
  The table names those that hold something that no machine state has: in another process, in
  hardware, in files of the host.

Source: BlockdevDriver in qapi/block-core.json, NetClientDriver in qapi/net.json, BlockExportType in
qapi/block-export.json, `-device help`, and the `unmigratable` and `migrate_add_blocker` in hw/.
"""

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

Sort = Literal["node", "device", "network", "export", "memory"]

Treatment = Literal[
    "image", "place", "filter", "empty", "job", "disk", "disk alone", "saved", "on tmpfs",
    "warned of", "saved with state", "blocks live", "blocks state", "needs state", "blocks",
]  # fmt: skip

MEANINGS: Mapping[Treatment, str] = {
    "image": "is snapshotted",
    "place": "is where an image is; by itself it is a raw image",
    "filter": "is passed through: the overlay goes below it",
    "empty": "holds nothing, and is left alone",
    "job": "is put there by a block job, which is in the way",
    "disk": "is a disk: its image is snapshotted",
    "disk alone": "is a disk: its image is snapshotted, but only with `--machine-state none`",
    "saved": "is saved by QEMU with the machine state",
    "on tmpfs": "is saved live where its file is on tmpfs; else only with `--method paused`",
    "warned of": "is no part of the snapshot, which says so",
    "saved with state": "is saved with the machine state; a snapshot without one warns",
    "blocks live": "is in the way of a live snapshot",
    "blocks state": "is in the way of a machine state; `--machine-state none` goes",
    "needs state": "is in the way of a snapshot without a machine state, which alone holds it",
    "blocks": "is in the way",
}


class Kind(Struct, frozen=True):
    """One row: some kinds that are treated alike, and why."""

    sort: Sort
    label: str
    names: tuple[str, ...]
    """Names of node drivers, networks and exports; of devices, what their QOM type begins with."""
    treatment: Treatment
    reason: str
    remedy: str = ""
    """What to do about one that is in the way."""


_ON_THIS_HOST = "use a raw or qcow2 image in a file"
_TAKE_OUT = "take the device out"

KINDS: tuple[Kind, ...] = (
    # --- nodes: formats and filters ---
    Kind("node", "qcow2", ("qcow2",), "image", "an overlay, or a snapshot inside it"),
    Kind("node", "raw", ("raw",), "image", "an overlay; its format is noted and never probed"),
    Kind("node", "file", ("file",), "place", "a regular file has room for an overlay beside it"),
    Kind(
        "node", "block device", ("host_device", "host_cdrom"), "place",
        "nothing can lie beside it: a snapshot inside its qcow2, or left out by choice",
    ),
    Kind("node", "throttle", ("throttle",), "filter", "limits stay those of the device"),
    Kind(
        "node", "copy-on-read", ("copy-on-read",), "filter",
        "what is read is copied into the newest overlay",
    ),
    Kind("node", "null", ("null-co", "null-aio"), "empty", "what is written to it is not kept"),
    Kind(
        "node", "job filter", ("commit_top", "mirror_top", "copy-before-write", "snapshot-access"),
        "job", "the job goes on writing to another image",
    ),
    # --- nodes: what cannot be frozen as one image ---
    Kind(
        "node", "other format",
        ("luks", "vmdk", "vdi", "vhdx", "vpc", "qed", "qcow", "parallels", "bochs", "cloop", "dmg"),
        "blocks", "its tables are unknown here: nobody could tell whether it was changed",
        "convert it (`qemu-img convert -O qcow2`)",
    ),
    Kind(
        "node", "folder as a disk", ("vvfat",), "blocks",
        "the files of a folder cannot be frozen as one image", _ON_THIS_HOST,
    ),
    Kind(
        "node", "network",
        ("nbd", "iscsi", "rbd", "ssh", "nfs", "gluster", "http", "https", "ftp", "ftps"),
        "blocks", "the image is on another host, where nothing of ours can keep it as it is",
        _ON_THIS_HOST,
    ),
    Kind(
        "node", "hardware",
        ("nvme", "io_uring", "nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-user",
         "virtio-blk-vhost-vdpa"),
        "blocks", "QEMU is past the host's kernel: there is no file or device to freeze",
        _ON_THIS_HOST,
    ),
    Kind(
        "node", "several images", ("quorum", "replication", "blkverify", "blklogwrites"),
        "blocks", "one disk in several images cannot be frozen as one", _ON_THIS_HOST,
    ),
    Kind(
        "node", "other filter", ("blkdebug", "blkreplay", "preallocate", "compress"),
        "blocks", "it changes what reaches the image, and an overlay would not pass below it",
        "leave the filter out",
    ),
    # --- disks, by the device ---
    Kind("device", "virtio disk", ("virtio-blk-",), "disk", "also on an iothread"),
    Kind("device", "SCSI disk", ("scsi-hd", "scsi-cd"), "disk", "also on an iothread"),
    Kind("device", "IDE disk", ("ide-hd", "ide-cd"), "disk", "-hda, -cdrom, SATA"),
    Kind("device", "USB disk", ("usb-storage", "usb-bot"), "disk", "-device usb-storage"),
    Kind("device", "floppy", ("floppy",), "disk", "-fda, or -device floppy"),
    Kind("device", "SD card", ("sd-card",), "disk", "-sd, or -device sd-card"),
    Kind(
        "device", "NVMe, UAS, UFS", ("nvme", "usb-uas", "ufs"), "disk alone",
        "QEMU cannot save the controller, and says so; use virtio-blk for both",
    ),
    # --- devices: state that no machine state holds ---
    Kind(
        "device", "disk of another process", ("vhost-user-blk", "vhost-user-scsi", "vhost-scsi"),
        "blocks", "its disk is in another process, and would be missing from the snapshot",
        "give QEMU the image itself (virtio-blk)",
    ),
    Kind(
        "device", "virtiofs", ("vhost-user-fs",), "blocks state",
        "which files are open is known to virtiofsd alone, another process", _TAKE_OUT,
    ),
    Kind(
        "device", "vhost-user", ("vhost-user-",), "blocks live",
        "the RAM behind it is written by another process, unnoticed", _TAKE_OUT,
    ),
    Kind(
        "device", "shared memory", ("ivshmem-",), "blocks live",
        "the RAM behind it is written by another process, unnoticed", _TAKE_OUT,
    ),
    Kind(
        "device", "hardware passed through", ("vfio-", "vhost-vdpa-"), "blocks state",
        "what it holds is in the hardware, which also writes to RAM unnoticed", _TAKE_OUT,
    ),
    Kind(
        "device", "persistent memory", ("nvdimm", "virtio-pmem"), "needs state",
        "its content is saved as RAM", "save the machine state too, or take the device out",
    ),
    Kind(
        "device", "TPM", ("tpm-",), "saved with state",
        "what swtpm holds is fetched by QEMU and given back by it: a swtpm must be there again",
    ),
    Kind(
        "device", "USB of the host", ("usb-host", "usb-redir"), "warned of",
        "what the device holds does not go back; the guest finds it plugged in anew",
    ),
    Kind(
        "device", "9p folder", ("virtio-9p-",), "warned of",
        "the host's files do not go back; while it is mounted QEMU cannot save the machine",
    ),
    # --- networks, exports, memory ---
    Kind(
        "network", "vhost-user", ("vhost-user",), "blocks live",
        "RAM is written by another process, unnoticed", "use another -netdev",
    ),
    Kind(
        "network", "vDPA", ("vhost-vdpa",), "blocks state",
        "what it holds is in the hardware, which also writes to RAM unnoticed",
        "use another -netdev",
    ),
    Kind(
        "export", "export", ("nbd", "vhost-user-blk", "fuse", "vduse-blk"), "blocks",
        "its clients read and write past the guest, and no restore makes it again",
        "end it (block-export-del) and begin anew after the snapshot",
    ),
    Kind(
        "memory", "anonymous", ("memory-backend-ram", "memory-backend-memfd"), "saved",
        "it can be protected while the guest runs",
    ),
    Kind(
        "memory", "file", ("memory-backend-file",), "on tmpfs",
        "what is on a disk cannot be protected (userfaultfd)",
    ),
)  # fmt: skip
"""Every kind that is known; of devices, the first row that fits counts."""

IMAGES = frozenset({"image", "place"})
"""The treatments of a node that holds a disk's content."""

_EXACT: Mapping[tuple[Sort, str], Kind] = {
    (kind.sort, name): kind for kind in KINDS if kind.sort != "device" for name in kind.names
}


def kind_of(sort: Sort, name: str) -> Kind | None:
    """The row of the table that speaks of *name*; None if there is none.

    Args:
        sort: What it is a name of.
        name: The driver of a node, the QOM type of a device, and so on.
    """
    if sort != "device":
        return _EXACT.get((sort, name))
    return next((kind for kind in _DEVICES if name.startswith(kind.names)), None)


_DEVICES = tuple(kind for kind in KINDS if kind.sort == "device")


def treatment(sort: Sort, name: str) -> Treatment:
    """How *name* is treated: what is unknown is in the way, but for devices and networks."""
    kind = kind_of(sort, name)
    if kind is not None:
        return kind.treatment
    return _UNKNOWN[sort]


_UNKNOWN: Mapping[Sort, Treatment] = {
    "node": "blocks",
    "device": "saved",
    "network": "saved",
    "export": "blocks",
    "memory": "blocks live",
}

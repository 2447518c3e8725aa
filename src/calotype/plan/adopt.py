"""Who may be adopted, and what can be done with him: from what /proc shows of a QEMU that runs.

A QEMU that a manager started is refused: two who move the same disks from image to image lose one
another's data, and the manager does not know of our overlays when it starts its VM the next time.
Managers are known by the traces that they leave in the command line, in the path of the monitor and
in the control group; the table is the whole of what is known of them.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from msgspec import Struct

from calotype.errors import CalotypeError, ConflictError, HostError, RequestError
from calotype.formats.secrets import redacted
from calotype.model.vm import Limit


class Stranger(Struct, frozen=True):
    """A process at the other end of a QMP socket, as /proc shows it."""

    pid: int
    start_ticks: int
    uid: int
    argv: tuple[str, ...]
    cwd: str
    """The folder that it was started in."""
    has_moved: bool
    """Whether it is in another folder now; a daemon leaves its own for the root folder."""
    program: str
    """The file that it executes."""
    cgroup: tuple[str, ...]
    vm_id: str
    """The id of the VM that some Calotype started it for; "" for none."""
    shares_files: bool
    """Whether paths mean the same files to it as to us: root folder and mount namespace."""


class Management(NamedTuple):
    """A program that manages QEMU, the traces that it leaves, and what to do instead."""

    name: str
    traces: tuple[str, ...]
    remedy: str


MANAGERS = (
    Management(
        "libvirt",
        (
            r"^guest=.*,debug-threads=",
            r"\bid=charmonitor\b",
            r"/(var/lib|run|cache)/libvirt/",
            r"/libvirt/qemu/",
            r"/machine-qemu\b",
        ),
        "`virsh snapshot-create` and `virsh domblklist` know its disks",
    ),
    Management(
        "Proxmox VE", (r"/run/qemu-server/", r"/etc/pve/", r"/qemu\.slice/"), "`qm snapshot`"
    ),
    Management("Incus", (r"/(lib|log|run|cache)/incus/",), "`incus snapshot create --stateful`"),
    Management("LXD", (r"/(lib|log|run|common)/lxd/",), "`lxc snapshot --stateful`"),
    Management("Kata Containers", (r"/run/vc/", r"\bsandbox-[0-9a-f]{64}\b"), "its own tools"),
    Management("podman machine", (r"/podman/machine\b", r"/podman-machine\b"), "its own tools"),
    Management("Lima", (r"/\.lima/",), "`limactl snapshot create`"),
    Management("Multipass", (r"/multipassd?/",), "`multipass snapshot`"),
    Management("minikube", (r"/\.minikube/machines/",), "its own tools"),
)
"""The managers that are known, by regular expressions for a word of the command line, a line of
/proc/PID/cgroup (cgroups(7)), or the path of the monitor."""


def manager_of(traces: Iterable[str]) -> tuple[Management, str] | None:
    """The manager that left one of these, and that trace."""
    for trace in traces:
        for manager in MANAGERS:
            if any(re.search(pattern, trace) for pattern in manager.traces):
                return manager, trace
    return None


def refusal(stranger: Stranger, monitor: str, own_uid: int) -> CalotypeError | None:
    """Why a process cannot be adopted, the gravest reason; None where it can.

    Args:
        stranger: The process.
        monitor: The path of its QMP socket.
        own_uid: The user that we are; 0 may do everything.
    """
    reasons = (check(stranger, monitor, own_uid) for check in _CHECKS)
    return next((reason for reason in reasons if reason is not None), None)


def _of_a_manager(stranger: Stranger, monitor: str, _: int) -> CalotypeError | None:
    found = manager_of((*stranger.argv, monitor, *stranger.cgroup))
    if found is None:
        return None
    manager, trace = found
    return ConflictError(
        f"process {stranger.pid} belongs to {manager.name}: {redacted([trace])[0][:100]!r}",
        f"two must not move its disks from image to image: use {manager.remedy}",
        pid=stranger.pid,
        manager=manager.name,
    )


def _no_qemu(stranger: Stranger, monitor: str, _: int) -> CalotypeError | None:
    names = (stranger.program, *stranger.argv[:1])
    if any(re.search(r"(^|/)(qemu|kvm)[^/]*$", name) for name in names):
        return None
    return RequestError(
        f"process {stranger.pid} listens on {monitor}, which is no QEMU: {stranger.program}",
        "name the socket of a QEMU's own QMP monitor",
        pid=stranger.pid,
    )


def _ours(stranger: Stranger, _: str, __: int) -> CalotypeError | None:
    if not stranger.vm_id:
        return None
    return ConflictError(
        f"process {stranger.pid} is run by Calotype already, as the VM {stranger.vm_id}",
        "`calotype ps` names it; if not, it is in another store (--store)",
        pid=stranger.pid,
        vm_id=stranger.vm_id,
    )


def _another_users(stranger: Stranger, _: str, own_uid: int) -> CalotypeError | None:
    if own_uid in (0, stranger.uid):
        return None
    return HostError(
        f"process {stranger.pid} is of another user ({stranger.uid})",
        "run calotype as that user or as root, always the same, and with a --store of its own",
        pid=stranger.pid,
    )


def _elsewhere(stranger: Stranger, _: str, __: int) -> CalotypeError | None:
    if stranger.shares_files:
        return None
    return HostError(
        f"process {stranger.pid} runs in a container or a chroot: its paths name other files",
        "run calotype in there, with a --store that is kept",
        pid=stranger.pid,
    )


_CHECKS: tuple[Callable[[Stranger, str, int], CalotypeError | None], ...] = (
    _of_a_manager,
    _no_qemu,
    _ours,
    _another_users,
    _elsewhere,
)
"""What is looked at, gravest first."""


def limits(
    stranger: Stranger,
    obstacles: Iterable[CalotypeError],
    relative: Iterable[str],
    own_uid: int,
) -> Iterator[Limit]:
    """The commands that will not work, with each reason.

    Args:
        stranger: The process.
        obstacles: What of its command line cannot be started again.
        relative: The images that QEMU knows by relative paths.
        own_uid: The user that we are.
    """
    for path in relative if stranger.has_moved else ():
        for command in REOPENING:
            yield Limit(
                command,
                f"QEMU has left the folder that {path!r} starts from, and cannot open it again",
                "start it with absolute paths",
            )
    reasons = [(error.problem, _DEFINE) for error in obstacles]
    if stranger.uid != own_uid:
        reasons.append((
            f"it was started by user {stranger.uid}, and would be started by {own_uid}",
            "let that user start it by hand, and adopt it again",
        ))  # fmt: skip
    for command in STARTING:
        for problem, remedy in reasons:
            yield Limit(command, problem, remedy)


STARTING = ("start", "restore")
"""The commands that start a QEMU."""
REOPENING = ("take", "delete")
"""The commands that have QEMU open an image again, by its path (block/file-posix.c)."""
_DEFINE = "`calotype run NAME -- ...`, with the VM off, defines it by a command line without that"

"""Who may be adopted, and what will not work with him."""

from typing import Any

import pytest

from calotype.errors import (
    CalotypeError,
    CommandLineError,
    ConflictError,
    HostError,
    RequestError,
)
from calotype.plan.adopt import MANAGERS, Stranger, limits, manager_of, refusal

SOCKET = "/run/vm/qmp.sock"
USER = 1000


def stranger(**changes: Any) -> Stranger:
    found: dict[str, Any] = {
        "pid": 7,
        "start_ticks": 1,
        "uid": USER,
        "argv": ("qemu-system-x86_64", "-m", "64"),
        "cwd": "/vm",
        "has_moved": False,
        "program": "/usr/bin/qemu-system-x86_64",
        "cgroup": ("0::/user.slice",),
        "vm_id": "",
        "shares_files": True,
    }
    return Stranger(**found | changes)


def test_who_runs_a_plain_qemu_is_not_refused() -> None:
    assert refusal(stranger(), SOCKET, USER) is None
    assert refusal(stranger(), SOCKET, 0) is None
    assert refusal(stranger(argv=("kvm",), program=""), SOCKET, USER) is None


REFUSED: list[tuple[dict[str, Any], type[CalotypeError], str]] = [
    ({"argv": ("qemu", "-name", "guest=a,debug-threads=on")}, ConflictError, "libvirt"),
    ({"program": "/usr/bin/socat", "argv": ("socat",)}, RequestError, "which is no QEMU"),
    ({"vm_id": "00aa"}, ConflictError, "run by Calotype already"),
    ({"uid": 1001}, HostError, "of another user"),
    ({"shares_files": False}, HostError, "container"),
]


@pytest.mark.parametrize(("changes", "kind", "words"), REFUSED)
def test_who_is_refused_is_told_why_and_what_to_do(
    changes: dict[str, Any], kind: type[CalotypeError], words: str
) -> None:
    error = refusal(stranger(**changes), SOCKET, USER)
    assert isinstance(error, kind)
    assert words in error.problem
    assert error.remedy
    assert error.data["pid"] == 7


TRACES = {
    "libvirt": [
        "guest=vm1,debug-threads=on",
        "socket,id=charmonitor,fd=25,server=on,wait=off",
        "/run/libvirt/qemu/1-vm1/monitor.sock",
        "0::/machine.slice/machine-qemu\\x2d1\\x2dvm1.scope/libvirt/emulator",
    ],
    "Proxmox VE": ["socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off"],
    "Incus": ["unix:/run/incus/vm1/qemu.monitor,server=on"],
    "LXD": ["/var/snap/lxd/common/lxd/logs/vm1/qemu.conf"],
    "Kata Containers": [f"sandbox-{'0a' * 32},debug-threads=on", "/run/vc/vm/x/qmp.sock"],
    "podman machine": ["unix:/run/user/1000/podman/machine/qmp.sock"],
    "Lima": ["/home/user/.lima/default/qmp.sock"],
    "Multipass": ["/var/snap/multipass/common/data/multipassd/vault/x.img"],
    "minikube": ["/home/user/.minikube/machines/minikube/monitor"],
}


def test_every_manager_has_its_traces_here() -> None:
    assert set(TRACES) == {manager.name for manager in MANAGERS}


@pytest.mark.parametrize(
    ("name", "trace"), [(name, trace) for name, found in TRACES.items() for trace in found]
)
def test_a_manager_is_known_by_each_of_its_traces(name: str, trace: str) -> None:
    found = manager_of(("-m", trace))
    assert found is not None
    assert found[0].name == name
    assert found[1] == trace


@pytest.mark.parametrize(
    "word", ["guest=a", "vm1,debug-threads=on", "/srv/libvirtual/a.qcow2", "sandbox-1", "/lxd.img"]
)
def test_what_only_looks_like_a_trace_is_none(word: str) -> None:
    assert manager_of((word,)) is None


def test_what_cannot_be_started_again_limits_what_starts_it() -> None:
    obstacles = [CommandLineError("-add-fd: why", "leave it out")]
    found = [(each.command, each.problem) for each in limits(stranger(), obstacles, (), USER)]
    assert found == [("start", "-add-fd: why"), ("restore", "-add-fd: why")]


def test_who_left_its_folder_cannot_open_relative_paths_again() -> None:
    moved = stranger(has_moved=True)
    assert [each.command for each in limits(moved, (), ("a.raw",), USER)] == ["take", "delete"]
    assert list(limits(stranger(), (), ("a.raw",), USER)) == []


def test_one_of_another_user_is_not_started_as_root() -> None:
    assert {each.command for each in limits(stranger(), (), (), 0)} == {"start", "restore"}
    assert list(limits(stranger(), (), (), USER)) == []

"""All that an operation may change on a VM, as one value: to be compared before and after.

Ids are replaced by one word and times are left out, so that two runs of the same operation give the
same value: it then is *whole*, and anything else is something between.
"""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from calotype.qemu import process
from calotype.store import images
from calotype.store.store import Store
from calotype.testing.machine import Machine

_ID = re.compile(r"[0-9a-f]{16}")
_NUMBER = re.compile(r"#block\d+")


def picture(vm: Machine) -> dict[str, Any]:
    """Files, images, record and catalogue; and what QEMU says, if one runs."""
    store = Store(vm.store)
    record = store.record(vm.home.name)
    entries = store.index.snapshots(record.id)
    lists: dict[str, Iterable[Any]] = {
        "files": vm.files(),
        "immutable": _immutable(vm.folder),
        "inside": _inside(vm.folder),
        "backing": _backing(vm.folder),
        "active": [disk.active.path for disk in record.disks],
        "snapshots": [
            (entry.id, entry.tag, entry.method, entry.machine_state) for entry in entries
        ],
        "nodes": _nodes(vm),
    }
    return {
        **{name: _plain(vm, values) for name, values in lists.items()},
        "descends": record.parent is not None,
        "unfinished": len(store.unfinished(record.id)),
        "processes": len(process.find("CALOTYPE_VM", record.id)),
        **_qemu(vm),
    }


def _plain(vm: Machine, values: Iterable[Any]) -> list[str]:
    """Values as text, sorted, without what is another in each run: ids, and where the VM is."""
    return sorted(_ID.sub("ID", repr(value).replace(str(vm.folder), "")) for value in values)


def is_on(vm: Machine) -> bool:
    """Whether its QEMU runs."""
    qemu = Store(vm.store).process(vm.home.name)
    return qemu is not None and process.is_alive(qemu)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".qcow2", ".raw"))


def _immutable(folder: Path) -> list[tuple[str, bool]]:
    return [(path.name, not images.before_freeze(path).immutable) for path in _images(folder)]


def _inside(folder: Path) -> list[tuple[str, str]]:
    """The internal snapshots of each image; qemu-img finds each image sound."""
    found = []
    for path in _images(folder):
        if path.suffix == ".qcow2":
            subprocess.run(["qemu-img", "check", "-q", "-U", "-f", "qcow2", path], check=True)
            found += [(path.name, entry.name) for entry in images.read_metadata(path).snapshots]
    return found


def _backing(folder: Path) -> list[tuple[str, list[str]]]:
    return [
        (path.name, [str(below) for below, _ in images.backing_chain(path, "qcow2")])
        for path in _images(folder)
        if path.suffix == ".qcow2"
    ]


def _nodes(vm: Machine) -> list[tuple[str, str, bool]]:
    """Each block node by its name, but for a number that is new at each start."""
    nodes = vm.qmp("query-named-block-nodes", flat=True) if is_on(vm) else []
    return [(_NUMBER.sub("#", node["node-name"]), node["drv"], node["ro"]) for node in nodes]


def _qemu(vm: Machine) -> dict[str, Any]:
    """What QEMU says; nothing where none runs."""
    if not is_on(vm):
        return {"run state": "off"}
    return {
        "run state": vm.qmp("query-status")["status"],
        "jobs": vm.qmp("query-jobs"),
        "fdsets": vm.qmp("query-fdsets"),
        "capabilities": vm.qmp("query-migrate-capabilities"),
        "bandwidth": vm.qmp("query-migrate-parameters")["max-bandwidth"],
    }

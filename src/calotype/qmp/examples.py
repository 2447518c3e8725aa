"""What the wire may look like: at least one example of each command, action and event, as data.

`docs/qmp.md` shows them, and each line is checked against the declaration that it is of. They are
about one VM, `demo`, with two disks; who plays them has that VM, and puts its own ids, paths, times
and figures in the place of those below.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from calotype.qmp.schema import Example, Line

FIRST_ID, SECOND_ID = "8d1f03c6a7b24e95", "51c09be2d84f7a36"
"""The ids of two snapshots, the second of which was taken after the first."""
FIRST_TAG, SECOND_TAG = "installed", "before upgrade"
DISKS = ("root", "data")
"""The labels of the VM's disks: qcow2 images, each with an overlay of the first snapshot."""
FOLDER, STORE = "/var/lib/demo", "/var/lib/calotype/vms/3e5b70d1c2a94f68/snapshots"
"""Where the images are, and where Calotype keeps the VM's snapshots."""

_ERROR_CLASS = "GenericError"
_STAMP = {"seconds": 1772366400, "microseconds": 271828}
_BEGUN: Line = ("<-", {"return": {}})


def examples() -> Iterator[Example]:
    """All examples, in the order in which the reference shows what they are of.

    The lines of one follow each other on one connection, after the capabilities negotiation; other
    events may come between them.
    """
    yield from _SAVING
    yield from _PLANNING
    yield from _LOADING
    yield from _DELETING
    yield from _LISTING
    yield from _ACTIONS
    yield from _EVENTS


def _sent(command: str, **arguments: Any) -> Line:
    spelled = {name.replace("_", "-"): value for name, value in arguments.items()}
    return "->", {"execute": command, **({"arguments": spelled} if spelled else {})}


def _refused(desc: str) -> Line:
    return "<-", {"error": {"class": _ERROR_CLASS, "desc": desc}}


def _happened(event: str, data: Mapping[str, Any]) -> Line:
    return "<-", {"event": event, "data": data, "timestamp": _STAMP}


_SAVING = (
    Example(
        "system-snapshot-save",
        "Machine state and disks, the guest running; each disk gets an overlay:",
        (
            _sent(
                "system-snapshot-save",
                job_id="save0",
                tag=SECOND_TAG,
                machine_state={"type": "external"},
            ),
            _BEGUN,
        ),
    ),
    Example(
        "system-snapshot-save",
        "No machine state, one disk inside its qcow2, one left out:",
        (
            _sent(
                "system-snapshot-save",
                job_id="save1",
                tag="nightly",
                description="disks alone",
                machine_state={"type": "none"},
                storage=[
                    {"node-name": DISKS[0], "kind": "internal"},
                    {"node-name": DISKS[1], "kind": "skip"},
                ],
                pause_limit_ms=250,
            ),
            _BEGUN,
        ),
    ),
    Example(
        "system-snapshot-save",
        "A destination that is not said is not guessed:",
        (
            _sent("system-snapshot-save", job_id="save2", tag=SECOND_TAG),
            _refused("Parameter 'machine-state' is missing"),
        ),
    ),
)

_PLANNING = (
    Example(
        "system-snapshot-plan",
        "",
        (
            _sent(
                "system-snapshot-plan",
                machine_state={"type": "external"},
                storage=[{"node-name": DISKS[1], "kind": "skip"}],
            ),
            (
                "<-",
                {
                    "return": {
                        "id": SECOND_ID,
                        "machine-state": {"type": "external"},
                        "method": "live",
                        "method-reason": "the guest runs on while its RAM is saved",
                        "disks": [
                            {
                                "disk": DISKS[0],
                                "kind": "external",
                                "reason": "default: an overlay is quick at any size",
                                "overlay": f"{FOLDER}/root.qcow2.{SECOND_ID}.qcow2",
                                "pause-ms": 5.0,
                            },
                            {
                                "disk": DISKS[1],
                                "kind": "skip",
                                "reason": "asked for: this disk is left alone",
                                "pause-ms": 0.0,
                            },
                        ],
                        "pause-ms": 32.0,
                        "bytes": 536870912,
                        "blockers": [],
                        "warnings": [
                            "disk 'data' is skipped: a restored guest finds it as it is then"
                        ],
                    }
                },
            ),
        ),
    ),
)

_LOADING = (
    Example(
        "system-snapshot-load",
        "By tag, keeping the state that the VM is taken from:",
        (
            _sent("system-snapshot-load", job_id="load0", tag=FIRST_TAG, keep_current=True),
            _BEGUN,
        ),
    ),
    Example(
        "system-snapshot-load",
        "By id, to be looked at before the guest runs:",
        (
            _sent("system-snapshot-load", job_id="load1", id=FIRST_ID, run_state="paused"),
            _BEGUN,
        ),
    ),
    Example(
        "system-snapshot-load",
        "An id is no tag, and is not tried as one where both are given:",
        (
            _sent("system-snapshot-load", job_id="load2", tag=FIRST_TAG, id=FIRST_ID),
            _refused("Need exactly one of 'tag' and 'id'"),
        ),
    ),
)

_DELETING = (
    Example(
        "system-snapshot-delete",
        "",
        (_sent("system-snapshot-delete", job_id="delete0", id=FIRST_ID), _BEGUN),
    ),
)

_LISTING = (
    Example(
        "query-system-snapshots",
        "",
        (
            _sent("query-system-snapshots", tag=FIRST_TAG),
            (
                "<-",
                {
                    "return": [
                        {
                            "id": FIRST_ID,
                            "tag": FIRST_TAG,
                            "description": "",
                            "instant": "2026-03-01T11:58:07.104210+00:00",
                            "run-state": "running",
                            "method": "live",
                            "machine-state": {
                                "type": "external",
                                "file": f"{STORE}/{FIRST_ID}/machine-state",
                                "bytes": 183500800,
                            },
                            "storage": [
                                {
                                    "disk": disk,
                                    "kind": "external",
                                    "image": f"{FOLDER}/{disk}.qcow2",
                                }
                                for disk in DISKS
                            ],
                            "is-foreign": False,
                            "is-whole": True,
                        }
                    ]
                },
            ),
        ),
    ),
)

_ACTIONS = (
    Example(
        "machine-state-save",
        "The machine state, and storage snapshots by an action of QEMU's own, all of one instant:",
        (
            _sent(
                "transaction",
                actions=[
                    {
                        "type": "machine-state-save",
                        "data": {
                            "job-id": "save3",
                            "tag": SECOND_TAG,
                            "destination": {"type": "external"},
                        },
                    },
                    *(
                        {
                            "type": "blockdev-snapshot-internal-sync",
                            "data": {"device": disk, "name": SECOND_TAG},
                        }
                        for disk in DISKS
                    ),
                ],
            ),
            _BEGUN,
        ),
    ),
)

_SAVED = {"job-id": "save0", "id": SECOND_ID, "tag": SECOND_TAG, "pause-ms": 31.4}

_EVENTS = (
    Example("SYSTEM_SNAPSHOT_SAVED", "", (_happened("SYSTEM_SNAPSHOT_SAVED", _SAVED),)),
    Example(
        "SYSTEM_SNAPSHOT_LOADED",
        "",
        (
            _happened(
                "SYSTEM_SNAPSHOT_LOADED",
                {"job-id": "load0", "id": FIRST_ID, "tag": FIRST_TAG, "pause-ms": 12.8},
            ),
        ),
    ),
    Example(
        "SYSTEM_SNAPSHOT_DELETED",
        "",
        (
            _happened(
                "SYSTEM_SNAPSHOT_DELETED", {"job-id": "delete0", "id": FIRST_ID, "tag": FIRST_TAG}
            ),
        ),
    ),
    Example(
        "SYSTEM_SNAPSHOT_FAILED",
        "",
        (
            _happened(
                "SYSTEM_SNAPSHOT_FAILED",
                {
                    "job-id": "save1",
                    "tag": SECOND_TAG,
                    "reason": "the pause reached its limit of 250 ms; all was undone: raise it",
                    "undone": True,
                },
            ),
        ),
    ),
)

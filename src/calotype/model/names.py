"""Every name that Calotype gives, derived from a snapshot's id by one function each.

A step names everything up front: what undoes it needs the id and nothing that doing it returned.
A tag, a VM's name and a path are data of the user; no name below holds one, but for the overlay's,
which stands beside the user's image and so begins with that image's own file name.

An id is 16 lower-case hex digits. QEMU allows 31 characters for a node name.
"""

import re
import unicodedata
from pathlib import Path

from calotype.errors import RequestError

ID_LENGTH = 16
OURS = "calotype-"
"""What the names of the nodes, chardevs and fd sets that we add to a QEMU begin with."""

LONGEST_TAG = 1024

_ID_PREFIX = re.compile(r"[0-9a-f]{1,16}")


def is_id_prefix(text: str) -> bool:
    """Whether *text* can be an id or the beginning of one."""
    return _ID_PREFIX.fullmatch(text) is not None


def overlay_node(snapshot_id: str, disk_index: int) -> str:
    """The node name of the overlay that a snapshot puts over disk *disk_index*."""
    return f"{OURS}{snapshot_id}-{disk_index}"


def overlay_path(origin: str, snapshot_id: str) -> str:
    """Where the overlay for the image *origin* goes: beside it, on a path of its own for ever.

    Named after the image that the user knows, not after the overlay below, so that names do not
    grow with the chain.
    """
    return f"{origin}.{snapshot_id}.qcow2"


def is_overlay_of(path: str, origin: str) -> bool:
    """Whether *path* is an overlay that Calotype made for the image *origin*."""
    name, stem = Path(path).name, Path(origin).name
    middle = name.removeprefix(f"{stem}.").removesuffix(".qcow2")
    return len(middle) == ID_LENGTH and name == f"{stem}.{middle}.qcow2" and is_id_prefix(middle)


def id_in_overlay(path: str) -> str:
    """The id that the overlay at *path* is named by."""
    return Path(path).name.removesuffix(".qcow2")[-ID_LENGTH:]


def internal_name(snapshot_id: str) -> str:
    """The name of an internal storage snapshot in a qcow2's snapshot table."""
    return f"{OURS}{snapshot_id}"


def merge_job(snapshot_id: str, disk_index: int) -> str:
    """The id of the job that merges an abandoned overlay back into what it stands on."""
    return f"{OURS}merge-{snapshot_id}-{disk_index}"


def state_descriptor(snapshot_id: str) -> str:
    """What QEMU calls the open file that a machine state goes through."""
    return f"{OURS}state-{snapshot_id}"


# --- names of the user, which are data ------------------------------------------------------------


def is_text(text: str) -> bool:
    """Whether *text* can be kept: an argument that is not UTF-8 reaches Python as surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def check_name(name: str) -> None:
    """Refuse what cannot name a VM.

    Raises:
        RequestError: It is empty, too long, not printable, or looks like an option.
    """
    if not name or not name.isprintable() or name.startswith("-"):
        raise RequestError(
            f"{name[:60]!r} cannot name a VM", "use printable characters, no '-' first"
        )
    if len(name) > LONGEST_TAG:
        raise RequestError(
            f"the name has {len(name)} characters", f"shorten it to {LONGEST_TAG} at most"
        )


def check_tag(tag: str) -> None:
    """Refuse a tag that could not be kept, or not be told in one line.

    Raises:
        RequestError: It is too long, is not UTF-8, or holds control characters.
    """
    if not is_text(tag):
        raise RequestError(f"the tag {tag[:60]!r} is not UTF-8", "give it in UTF-8")
    if any(unicodedata.category(letter) == "Cc" for letter in tag):
        raise RequestError(f"the tag {tag[:60]!r} holds control characters", "leave them out")
    if len(tag) > LONGEST_TAG:
        raise RequestError(
            f"the tag has {len(tag)} characters", f"shorten it to {LONGEST_TAG} at most"
        )


def check_description(description: str) -> None:
    """Refuse a description that could not be kept.

    Raises:
        RequestError: It is not UTF-8.
    """
    if not is_text(description):
        raise RequestError("the description is not UTF-8", "give it in UTF-8")

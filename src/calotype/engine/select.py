"""Which snapshot is meant: by id, by tag, or the latest; never one tried as the other."""

import shlex

from calotype.errors import NotFoundError, RequestError
from calotype.model import names
from calotype.model.vm import VmRecord
from calotype.store.index import SnapshotEntry
from calotype.store.store import Store


def select(
    store: Store,
    record: VmRecord,
    *,
    id_prefix: str | None = None,
    tag: str | None = None,
    latest: bool = False,
) -> SnapshotEntry:
    """The one snapshot of a VM that is meant.

    Args:
        store: Where it is kept.
        record: The VM.
        id_prefix: A whole id or the beginning of one.
        tag: A tag; compared whole.
        latest: The one with the latest instant, of those that were taken.

    Raises:
        RequestError: Not exactly one of the three is given, or the id can be none.
        NotFoundError: There is none such, or more than one.
    """
    if sum((id_prefix is not None, tag is not None, latest)) != 1:
        raise RequestError("which snapshot?", "give exactly one of --id, --tag and --latest")
    entries = store.index.snapshots(record.id)
    if id_prefix is not None:
        return _by_id(entries, id_prefix, record.name)
    if tag is not None:
        tagged = [entry for entry in entries if entry.tag == tag and tag]
        return _only(tagged, f"with the tag {tag!r}", record.name)
    taken = [entry for entry in entries if entry.method != "left-behind"]
    return _only(taken[-1:], "yet", record.name)


def _by_id(entries: list[SnapshotEntry], prefix: str, vm: str) -> SnapshotEntry:
    if not names.is_id_prefix(prefix):
        raise RequestError(
            f"{prefix!r} is no id", "an id is up to 16 hex digits; a tag is given with --tag"
        )
    matching = [entry for entry in entries if entry.id.startswith(prefix)]
    return _only(matching, f"with an id that begins with {prefix!r}", vm)


def _only(matching: list[SnapshotEntry], which: str, vm: str) -> SnapshotEntry:
    if not matching:
        raise NotFoundError(
            f"{vm!r} has no snapshot {which}", f"see `calotype list {shlex.quote(vm)}`"
        )
    if len(matching) > 1:
        ids = [entry.id for entry in matching]
        raise NotFoundError(
            f"{vm!r} has {len(ids)} snapshots {which}: {', '.join(ids)}",
            "name one of them with --id",
            ids=ids,
        )
    return matching[0]

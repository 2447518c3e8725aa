"""The user's words about a snapshot: a tag, a description, protection from being deleted."""

from msgspec.structs import replace

from calotype.model.labels import Labels, check_description, check_tag
from calotype.model.vm import VmRecord
from calotype.store.store import Store


def tag(store: Store, record: VmRecord, snapshot: str, text: str) -> None:
    """Give a snapshot another tag; an empty one takes its tag away.

    Raises:
        RequestError: The tag is too long, or no text.
        ConflictError: Somebody else is changing the VM.
    """
    _change(store, record, snapshot, tag=check_tag(text))


def describe(store: Store, record: VmRecord, snapshot: str, text: str) -> None:
    """Give a snapshot another description; an empty one takes it away.

    Raises:
        RequestError: The description is too long, or no text.
        ConflictError: Somebody else is changing the VM.
    """
    _change(store, record, snapshot, description=check_description(text))


def protect(store: Store, record: VmRecord, snapshot: str, *, is_protected: bool) -> None:
    """Keep a snapshot from being deleted, or let it be deleted again.

    Raises:
        ConflictError: Somebody else is changing the VM.
    """
    _change(store, record, snapshot, is_protected=is_protected)


def _change(store: Store, record: VmRecord, snapshot: str, **changes: str | bool) -> None:
    with store.locked(record):
        manifest = store.manifest(record.id, snapshot)
        labels: Labels = replace(store.labels(record.id, snapshot), **changes)
        store.save_labels(manifest, labels)

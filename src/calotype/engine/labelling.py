"""The user's words about a snapshot: a tag, a description, protection from being deleted."""

from msgspec.structs import replace

from calotype.engine.changing import changing
from calotype.model.labels import Labels
from calotype.model.names import check_description, check_tag
from calotype.store.store import Store


async def tag(store: Store, name: str, snapshot: str, text: str) -> None:
    """Give a snapshot of the VM *name* another tag; an empty one takes its tag away.

    Raises:
        RequestError: The tag is too long, or no text.
        ConflictError: Somebody else is changing the VM.
    """
    check_tag(text)
    await _change(store, name, "tag", snapshot, tag=text)


async def describe(store: Store, name: str, snapshot: str, text: str) -> None:
    """Give a snapshot another description; an empty one takes it away.

    Raises:
        RequestError: The description is no text.
        ConflictError: Somebody else is changing the VM.
    """
    check_description(text)
    await _change(store, name, "describe", snapshot, description=text)


async def protect(store: Store, name: str, snapshot: str, *, is_protected: bool) -> None:
    """Keep a snapshot from being deleted, or let it be deleted again.

    Raises:
        ConflictError: Somebody else is changing the VM.
    """
    word = "protect" if is_protected else "unprotect"
    await _change(store, name, word, snapshot, is_protected=is_protected)


async def _change(store: Store, name: str, word: str, snapshot: str, **changes: str | bool) -> None:
    async with changing(store, name, word) as record:
        manifest = store.manifest(record.id, snapshot)
        labels: Labels = replace(store.labels(record.id, snapshot), **changes)
        store.save_labels(manifest, labels)

"""What a shell offers at the tab key: the VMs by name, their snapshots by tag and by id.

The store is only looked at. Whatever is wrong with it is told by the command itself, once it runs;
here nothing is offered then.
"""

from collections.abc import Callable, Iterator

import click

from calotype.cli.place import named_store
from calotype.errors import CalotypeError

Completion = Callable[[click.Context, click.Parameter, str], list[str]]


def _offered(found: Callable[[click.Context], Iterator[str]]) -> Completion:
    """Offer of what is *found* that which begins like the word that is being typed."""

    def complete(context: click.Context, _: click.Parameter, begun: str) -> list[str]:
        try:
            return [word for word in found(context) if word.startswith(begun)]
        except (CalotypeError, OSError):
            return []

    return complete


@_offered
def vm_names(context: click.Context) -> Iterator[str]:
    """The VMs of the store that the line names so far, or would be taken."""
    from calotype.store.store import Store  # noqa: PLC0415

    records, _ = Store.looking(named_store(context)).sound_records()
    return (record.name for record in records)


@_offered
def tags(context: click.Context) -> Iterator[str]:
    """The tags of the snapshots of the VM that is named already, each once."""
    return iter(dict.fromkeys(tag for tag, _ in _snapshots(context) if tag))


@_offered
def ids(context: click.Context) -> Iterator[str]:
    """The ids of its snapshots."""
    return (identity for _, identity in _snapshots(context))


def _snapshots(context: click.Context) -> Iterator[tuple[str, str]]:
    from calotype.store.store import Store  # noqa: PLC0415

    store = Store.looking(named_store(context))
    # click parses nothing of a line whose last option has no value yet: NAME is in the rest then.
    name = context.params.get("name") or next(iter(context.args), "")
    entries = store.index.snapshots(store.find(name).id)
    return ((entry.tag, entry.id) for entry in entries)

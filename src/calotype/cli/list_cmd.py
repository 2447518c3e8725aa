"""`calotype list`: the snapshots of each VM as a tree, with where it stands now."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from calotype.cli.output import Settings, common, say_with_damage, size

if TYPE_CHECKING:
    from calotype.model.vm import VmRecord
    from calotype.store.index import SnapshotEntry
    from calotype.store.store import Store


@click.command("list")
@click.argument("name", required=False)
@click.option("-q", "--quiet", is_flag=True, help="Print the ids alone.")
@common
def command(settings: Settings, name: str | None, quiet: bool) -> None:
    """List the snapshots of the VM NAME, or of all: a tree of which descends from which."""
    import msgspec  # noqa: PLC0415

    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path)
    records, damage = ([store.find(name)], []) if name is not None else store.sound_records()
    for record in records:
        damage += store.sound_manifests(record.id)[1]
    entries = {record.id: store.index.snapshots(record.id) for record in records}
    places = {record.id: place(store, record) for record in records}
    told = {
        "vms": [
            {
                "name": record.name,
                "vm_id": record.id,
                "now": places[record.id].parent,
                "under_way": places[record.id].under_way,
                "snapshots": msgspec.to_builtins(entries[record.id]),
            }
            for record in records
        ]
    }
    lines = []
    for record in records:
        lines += (
            [entry.id for entry in entries[record.id]]
            if quiet
            else [record.name, *draw(places[record.id], entries[record.id])]
        )
    say_with_damage(settings, told, lines, store.damage + damage)


class Place(NamedTuple):
    """Where a VM stands now."""

    parent: str | None
    """The snapshot that it descends from, if that is complete."""
    under_way: str | None = None
    """The snapshot that is being taken: it is recorded ahead of its manifest."""


def place(store: "Store", record: "VmRecord") -> Place:
    """Where a VM stands now."""
    parent = record.parent
    if parent is not None and store.is_under_way(record.id, parent):
        return Place(None, parent)
    return Place(parent)


def draw(place: Place, entries: "Sequence[SnapshotEntry]") -> list[str]:
    """The tree of one VM's snapshots, a line each; a snapshot without a known parent is a root.

    While a snapshot is under way, what the VM stood on before it is recorded nowhere: `now` is no
    branch of the tree then.
    """
    known = {entry.id for entry in entries}
    children: dict[str | None, list[SnapshotEntry | None]] = {}
    for entry in entries:
        children.setdefault(entry.parent if entry.parent in known else None, []).append(entry)
    if place.under_way is not None:
        return [*_lines(children), f"now: a snapshot is under way ({place.under_way})"]
    children.setdefault(place.parent if place.parent in known else None, []).append(None)
    return list(_lines(children))


def _lines(children: "Mapping[str | None, Sequence[SnapshotEntry | None]]") -> Iterator[str]:
    """Draw depth first, without recursion: a chain of snapshots may be thousands long."""
    open_branches = [("", iter(_marked(children.get(None, []))))]
    while open_branches:
        indent, siblings = open_branches[-1]
        following = next(siblings, None)
        if following is None:
            open_branches.pop()
            continue
        entry, is_last = following
        yield f"{indent}{'└── ' if is_last else '├── '}{_label(entry)}"
        if entry is not None:
            deeper = indent + ("    " if is_last else "│   ")
            open_branches.append((deeper, iter(_marked(children.get(entry.id, [])))))


def _marked(
    siblings: "Sequence[SnapshotEntry | None]",
) -> "list[tuple[SnapshotEntry | None, bool]]":
    """Each sibling, and whether it is the last."""
    return [(entry, place == len(siblings) - 1) for place, entry in enumerate(siblings)]


def _label(entry: "SnapshotEntry | None") -> str:
    if entry is None:
        return "now"
    words = [entry.id, entry.instant[:19].replace("T", " ")]
    if entry.tag:
        words.append(repr(entry.tag))
    words.append(entry.method)
    if entry.machine_state != "none":
        words.append(size(entry.bytes))
    if entry.pause_ms is not None:
        words.append(f"pause {entry.pause_ms:.1f} ms")
    if entry.description:
        words.append(f"- {entry.description!r}")
    return "  ".join(words)

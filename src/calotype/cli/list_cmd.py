"""`calotype list`: the snapshots of each VM as a tree, with where it stands now."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from calotype.cli import completing
from calotype.cli.output import Settings, common, say_with_damage, size

if TYPE_CHECKING:
    from calotype.model.vm import VmRecord
    from calotype.store.index import SnapshotEntry
    from calotype.store.store import Store


@click.command("list")
@click.argument("name", required=False, shell_complete=completing.vm_names)
@click.option("-q", "--quiet", is_flag=True, help="Print the ids alone.")
@common
def command(settings: Settings, name: str | None, quiet: bool) -> None:
    """List the snapshots of the VM NAME, or of all: a tree of which descends from which."""
    import msgspec  # noqa: PLC0415

    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path, make=False)
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
    """The snapshot that it descends from: while another is being taken, as before that."""
    under_way: str | None = None
    """The snapshot that is being taken: it is recorded ahead of its manifest."""


def place(store: "Store", record: "VmRecord") -> Place:
    """Where a VM stands now."""
    parent = record.parent
    if parent is None or not store.is_under_way(record.id, parent):
        return Place(parent)
    return Place(_parent_before(store, record.id, parent), parent)


def _parent_before(store: "Store", vm_id: str, snapshot: str) -> str | None:
    """What a VM descended from before a snapshot was begun, as its journal has it; else None."""
    from calotype.errors import StoreError  # noqa: PLC0415
    from calotype.store import journal  # noqa: PLC0415

    for path in store.unfinished(vm_id):
        with contextlib.suppress(StoreError, OSError):  # it may just have ended
            match journal.read(path)[:1]:
                case (journal.Began(snapshot=about, record=record),) if about == snapshot:
                    return record.parent
    return None


def draw(place: Place, entries: "Sequence[SnapshotEntry]") -> list[str]:
    """The tree of one VM's snapshots, a line each; a snapshot without a known parent is a root.

    While one is under way, `now` is where it was before; where nobody knows, it is no branch.
    """
    known = {entry.id for entry in entries}
    children: dict[str | None, list[SnapshotEntry | None]] = {}
    for entry in entries:
        children.setdefault(entry.parent if entry.parent in known else None, []).append(entry)
    under_way = f"a snapshot is under way: {place.under_way}"
    if place.under_way is not None and place.parent is None:
        return [*_lines(children), under_way]
    children.setdefault(place.parent if place.parent in known else None, []).append(None)
    return [*_lines(children), *([under_way] if place.under_way is not None else [])]


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
    words += [entry.method, f"{entry.consistency}-consistent"]
    if entry.machine_state != "none":
        words.append(size(entry.bytes))
    if entry.pause_ms is not None:
        words.append(f"pause {entry.pause_ms:.1f} ms")
    if entry.is_protected:
        words.append("protected")
    if entry.description:
        words.append(f"- {entry.description!r}")
    return "  ".join(words)

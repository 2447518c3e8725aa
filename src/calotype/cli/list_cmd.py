"""`calotype list`: the snapshots of each VM as a tree, with where it stands now."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from calotype.cli.output import Settings, common, say, size

if TYPE_CHECKING:
    from calotype.model.vm import VmRecord
    from calotype.store.index import SnapshotEntry


@click.command("list")
@click.argument("name", required=False)
@click.option("-q", "--quiet", is_flag=True, help="Print the ids alone.")
@common
def command(settings: Settings, name: str | None, quiet: bool) -> None:
    """List the snapshots of the VM NAME, or of all: a tree of which descends from which."""
    import msgspec  # noqa: PLC0415

    from calotype.store.store import Store  # noqa: PLC0415

    store = Store(settings.store_path)
    records = [store.find(name)] if name is not None else store.records()
    entries = {record.id: store.index.snapshots(record.id) for record in records}
    told = {
        "vms": [
            {
                "name": record.name,
                "vm_id": record.id,
                "now": record.parent,
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
            else [record.name, *draw(record, entries[record.id])]
        )
    say(settings, told, lines)


def draw(record: "VmRecord", entries: "Sequence[SnapshotEntry]") -> list[str]:
    """The tree of one VM's snapshots, a line each; a snapshot without a known parent is a root."""
    known = {entry.id for entry in entries}
    children: dict[str | None, list[SnapshotEntry | None]] = {}
    for entry in entries:
        children.setdefault(entry.parent if entry.parent in known else None, []).append(entry)
    children.setdefault(record.parent if record.parent in known else None, []).append(None)
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
    if entry.is_protected:
        words.append("protected")
    if entry.description:
        words.append(f"- {entry.description!r}")
    return "  ".join(words)

"""What was done to a VM, told from the journals that have ended and from those that have not."""

from datetime import datetime
from pathlib import Path

from msgspec import Struct

from calotype.errors import StoreError
from calotype.model.vm import VmRecord
from calotype.store import journal as journals
from calotype.store.journal import Began, Did, Doing, Ended, Undoing, Unfinished
from calotype.store.store import Store


class Past(Struct, frozen=True):
    """One operation."""

    operation: str
    id: str
    snapshot: str
    at: str
    outcome: str
    """`done`, `undone` or `unfinished`; `unknown` where a full disk kept it from being told."""
    error: str
    total_ms: float | None
    plan: tuple[str, ...]
    """The kinds of its steps, in order."""
    phases_ms: dict[str, float]
    """How long each kind of step took that was done."""


def history(store: Store, record: VmRecord) -> list[Past]:
    """Every operation on a VM, oldest first; waits for nobody.

    Raises:
        StoreError: A journal was altered.
    """
    listed = [*store.unfinished(record.id), *store.history(record.id)]  # those that end meanwhile
    paths = {path.name: path for path in listed}  # are in both
    return sorted(map(_tell, paths.values()), key=lambda past: past.at)


def _tell(path: Path) -> Past:
    try:
        entries = journals.read(path)
    except StoreError:
        ended = path.parent.parent / "history" / path.name
        if path.exists() or not ended.exists():
            raise
        path, entries = ended, journals.read(ended)
    began = entries[0]
    assert isinstance(began, Began)
    names = [type(step).__name__ for step in began.steps]
    phases: dict[str, float] = {}
    for entry in entries:
        if isinstance(entry, Did):
            name = names[entry.step]
            phases[name] = round(phases.get(name, 0.0) + entry.spent_ms, 3)
    end = next((entry for entry in entries if isinstance(entry, Ended)), None)
    return Past(
        operation=began.operation,
        id=began.id,
        snapshot=began.snapshot,
        at=began.at,
        outcome=end.outcome if end else _without_end(path),
        error=_error(entries),
        total_ms=_spent_ms(began.at, end.at) if end else None,
        plan=tuple(names),
        phases_ms=phases,
    )


def _without_end(path: Path) -> str:
    return "unfinished" if path.parent.name == "journal" else "unknown"


def _error(entries: tuple[journals.Entry, ...]) -> str:
    """What went wrong last, if anything did."""
    for entry in reversed(entries):
        match entry:
            case Ended(error=error) if error:
                return error
            case Unfinished(reasons=reasons):
                return "; ".join(reasons)
            case Undoing(error=error):
                return error
            case Doing() | Did() | Began() | Ended():
                continue
    return ""


def _spent_ms(began: str, ended: str) -> float:
    spent = datetime.fromisoformat(ended) - datetime.fromisoformat(began)
    return round(spent.total_seconds() * 1000, 3)

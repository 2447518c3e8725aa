"""What a client asks for as the operations take it, and what they say as a client is told of it.

No I/O, and no decision but those that the definition of a command leaves to whoever serves it: the
range of a limit, a disk that is named twice, what is declared and not served yet.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from calotype.errors import CalotypeError
from calotype.model import names
from calotype.model.snapshot import Manifest
from calotype.plan.take_plan import TakePlan, TakeRequest, Transaction
from calotype.qmp import commands, vocabulary
from calotype.qmp.server import Refusal
from calotype.qmp.visiting import ParameterError, expected, refuse_unexpected, required
from calotype.service.jobs import CANCELLED
from calotype.service.work import Cancelled

LEAST_PAUSE_LIMIT_MS = 1.0


def split(arguments: Mapping[str, Any]) -> tuple[int, Transaction]:
    """The place of our action in a transaction, and all the others, as they were given.

    Args:
        arguments: Of `transaction`; `actions` is a list with one of ours in it.

    Raises:
        ParameterError: What is there beside is none that QEMU would take.
        Refusal: There are two of ours.
    """
    refuse_unexpected(arguments, {"actions", "properties"}, "")
    properties = expected(dict, "object", arguments.get("properties", {}), "properties")
    for place, action in enumerate(arguments["actions"]):
        _check_action(action, f"actions[{place}]")
    kinds = [action["type"] in commands.ACTIONS for action in arguments["actions"]]
    if sum(kinds) > 1:
        raise Refusal("a transaction has one machine state: machine-state-save is there twice")
    pairs = zip(arguments["actions"], kinds, strict=True)
    others = tuple(action for action, is_ours in pairs if not is_ours)
    return kinds.index(True), Transaction(others, properties)


def _check_action(action: Any, at: str) -> None:
    """Refuse an action that is no object of a type and its data."""
    given = expected(dict, "object", action, at)
    expected(str, "string", required(given, "type", at), f"{at}.type")
    expected(dict, "object", required(given, "data", at), f"{at}.data")


def take_request(
    asked: commands.SystemSnapshotRequest | commands.MachineStateSave,
    destination: vocabulary.MachineStateDestination,
    storage: Sequence[vocabulary.StorageSnapshotSpec],
) -> TakeRequest:
    """What a save, or a plan of one, is asked for.

    Raises:
        Refusal: It cannot be kept, or is none that can be carried out.
        CalotypeError: The tag or the description cannot be kept.
    """
    names.check_tag(asked.tag or "")
    names.check_description(asked.description or "")
    if asked.on_conflict == "replace":
        raise unserved("replace")
    if isinstance(destination, vocabulary.MachineStateInternal):
        raise unserved("internal")
    if isinstance(destination, vocabulary.MachineStateImage):
        raise unserved("image")
    if not LEAST_PAUSE_LIMIT_MS <= asked.pause_limit_ms < float("inf"):
        raise Refusal("Parameter 'pause-limit-ms' is to be at least 1, and finite")
    kinds: dict[str, Any] = {}
    for spec in storage:
        if spec.node_name in kinds:
            raise Refusal(f"Parameter 'storage' names '{spec.node_name}' twice")
        kinds[spec.node_name] = spec.kind
    return TakeRequest(
        "none" if isinstance(destination, vocabulary.MachineStateNone) else "external",
        asked.method,
        asked.pause_limit_ms,
        kinds,
    )


def planned(
    destination: vocabulary.MachineStateDestination, plan: TakePlan
) -> vocabulary.SystemSnapshotPlan:
    """A plan, as a client is told of it, with the destination that was asked for."""
    return vocabulary.SystemSnapshotPlan(
        id=plan.snapshot,
        machine_state=destination,
        method="live" if plan.method == "live-storage-first" else plan.method,
        method_reason=plan.method_reason,
        disks=tuple(
            vocabulary.DiskPlan(
                disk=disk.disk,
                kind=disk.kind,
                reason=disk.reason,
                overlay=disk.overlay or None,
                pause_ms=disk.pause_ms,
            )
            for disk in plan.disks
        ),
        pause_ms=plan.estimate.pause_ms,
        bytes=plan.estimate.bytes,
        blockers=tuple(
            vocabulary.SnapshotBlocker(problem=each.problem, remedy=each.remedy)
            for each in plan.blockers
        ),
        warnings=plan.warnings,
    )


def info(manifest: Manifest, folder: str) -> vocabulary.SystemSnapshotInfo:
    """A snapshot, as a client is told of it.

    Args:
        manifest: The snapshot.
        folder: Where its own files are.
    """
    state = manifest.machine_state
    return vocabulary.SystemSnapshotInfo(
        id=manifest.id,
        tag=manifest.tag,
        description=manifest.description,
        instant=manifest.instant,
        parent=manifest.parent,
        run_state=manifest.run_state,
        method=manifest.method,
        machine_state=None
        if state is None
        else vocabulary.MachineStateInfo(
            type="external", file=f"{folder}/{state.file}", bytes=state.identity.size_bytes
        ),
        storage=tuple(
            vocabulary.StorageSnapshotInfo(
                disk=part.disk, kind=part.kind, image=part.image.path if part.image else None
            )
            for part in manifest.storage
        ),
        is_foreign=False,
        is_whole=state is not None and all(part.kind != "skip" for part in manifest.storage),
    )


def unserved(name: str) -> Refusal:
    """Why something that is declared is not carried out."""
    return Refusal(f"'{name}' is not served yet: {commands.UNSERVED[name]}")


def words(error: BaseException) -> str:
    """An error in one line: what is wrong, what could not be undone, what to do.

    Of arguments it is QEMU's own text, and no more.
    """
    match error:
        case ParameterError():
            return error.problem
        case CalotypeError():
            return "; ".join(_parts(error))
        case Cancelled():
            return "; ".join((CANCELLED, *getattr(error, "__notes__", ())))
        case _:
            return f"a fault in Calotype itself: {type(error).__name__}: {error}"


def _parts(error: CalotypeError) -> Iterator[str]:
    yield error.problem
    yield from getattr(error, "__notes__", ())
    if error.remedy:
        yield error.remedy

"""Our commands: arguments checked, an operation begun, and its job looked after.

What is known beforehand to be in the way is the command's own error: so a command that begins a job
is answered when the operation has begun its first step, which is after its plan was found free of
blockers. From then on the job tells.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from calotype.engine import operations, select
from calotype.engine.changing import BEGUN
from calotype.engine.deletion import delete
from calotype.engine.progress import Progress
from calotype.engine.take_effects import INSTANT
from calotype.errors import CalotypeError
from calotype.model import names
from calotype.model.snapshot import Manifest
from calotype.plan.delete import DeleteRequest
from calotype.plan.restore_plan import RestoreRequest
from calotype.plan.take_plan import TakePlan, TakeRequest, Transaction
from calotype.qmp import commands, vocabulary
from calotype.qmp.server import Command, Refusal
from calotype.qmp.visiting import ParameterError, visit
from calotype.service.jobs import CANCELLED, Job, Jobs
from calotype.service.work import Cancelled, Work
from calotype.store.index import SnapshotEntry
from calotype.store.store import Store

LEAST_PAUSE_LIMIT_MS = 1.0


TRANSACTION = "transaction"


def is_ours(command: Command) -> bool:
    """Whether a command is one of ours, or has an action of ours in it."""
    if command.name == TRANSACTION:
        actions = command.arguments.get("actions")
        given = actions if isinstance(actions, list) else []
        return any(isinstance(each, dict) and each.get("type") in _OUR_ACTIONS for each in given)
    return command.name in commands.COMMANDS


_OUR_ACTIONS = tuple(commands.ACTIONS)


class Done(NamedTuple):
    """What an operation came to."""

    snapshot: str
    tag: str
    pause_ms: float | None = None


class _Begun(NamedTuple):
    """An operation that begins as a job, and what is told of it."""

    job: str
    kind: str
    event: str
    tag: str
    answered_at: str = BEGUN
    snapshot: str = ""


_Operation = Callable[[Progress], Coroutine[Any, Any, Done]]


class Own:
    """The commands of ours, for one VM.

    Args:
        store: Where the VM is kept.
        name: The VM.
        work: Where operations run.
        jobs: Their jobs.
        tell: Tells all clients of an event.
        others_jobs: Asks for the names of the jobs that QEMU has.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        work: Work,
        jobs: Jobs,
        tell: Callable[[str, Mapping[str, Any]], None],
        others_jobs: Callable[[], Awaitable[Collection[str]]],
    ) -> None:
        self._store = store
        self._name = name
        self._work = work
        self._jobs = jobs
        self._tell = tell
        self._others_jobs = others_jobs
        self._commands: Mapping[str, Callable[[Any], Awaitable[Any]]] = {
            "system-snapshot-save": self._save,
            "system-snapshot-plan": self._plan,
            "system-snapshot-load": self._load,
            "system-snapshot-delete": self._delete,
            "query-system-snapshots": self._query,
        }

    async def carry_out(self, command: Command) -> Any:
        """Carry out one of our commands; what it returns.

        Raises:
            Refusal: It cannot be carried out.
        """
        if command.is_out_of_band:
            raise Refusal(f"The command {command.name} does not support OOB")
        try:
            if command.name == TRANSACTION:
                return await self._transact(command.arguments)
            declared = commands.COMMANDS[command.name].arguments
            arguments = visit(declared, command.arguments)
            return await self._commands[command.name](arguments)
        except ParameterError as error:  # in QEMU's words, and no others
            raise Refusal(error.problem) from error
        except CalotypeError as error:
            raise Refusal(_words(error)) from error

    # --- the transaction ---------------------------------------------------------------------

    async def _transact(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a transaction with an action of ours; answered when the instant has passed."""
        place, others = split(arguments)
        data = arguments["actions"][place].get("data")
        asked = visit(commands.MachineStateSave, data, f"actions[{place}].data")
        request = replace(
            take_request(asked, asked.destination, ()),
            transaction=Transaction(others, arguments.get("properties", {})),
        )
        return await self._take(asked, request, answered_at=INSTANT)

    # --- the commands --------------------------------------------------------------------------

    async def _save(self, asked: commands.SaveArguments) -> dict[str, Any]:
        request = take_request(asked, asked.machine_state, asked.storage)
        return await self._take(asked, request, answered_at=BEGUN)

    async def _take(
        self,
        asked: commands.SaveArguments | commands.MachineStateSave,
        request: TakeRequest,
        answered_at: str,
    ) -> dict[str, Any]:
        names.check_tag(asked.tag or "")
        self._refuse_taken(asked.tag)

        async def save(progress: Progress) -> Done:
            manifest = await operations.take(
                self._store,
                self._name,
                request,
                tag=asked.tag or "",
                description=asked.description or "",
                progress=progress,
            )
            return Done(manifest.id, manifest.tag, manifest.timings.pause_ms)

        tag = asked.tag or ""
        begun = _Begun(asked.job_id, "system-snapshot-save", "SAVED", tag, answered_at)
        return await self._begin(begun, save)

    async def _load(self, asked: commands.LoadArguments) -> dict[str, Any]:
        entry = self._selected(asked.tag, asked.id)
        request = RestoreRequest(run_state=asked.run_state, keep_current=asked.keep_current)

        async def load(progress: Progress) -> Done:
            done = await operations.restore(
                self._store, self._name, entry.id, request, progress=progress
            )
            return Done(entry.id, entry.tag, done.pause_ms)

        begun = _Begun(asked.job_id, "system-snapshot-load", "LOADED", entry.tag, snapshot=entry.id)
        return await self._begin(begun, load)

    async def _delete(self, asked: commands.DeleteArguments) -> dict[str, Any]:
        entry = self._selected(asked.tag, asked.id)

        async def remove(progress: Progress) -> Done:
            request = DeleteRequest(frozenset({entry.id}))
            await delete(self._store, self._name, request, progress=progress)
            return Done(entry.id, entry.tag)

        kind = "system-snapshot-delete"
        begun = _Begun(asked.job_id, kind, "DELETED", entry.tag, snapshot=entry.id)
        return await self._begin(begun, remove)

    async def _plan(self, asked: commands.PlanArguments) -> vocabulary.SystemSnapshotPlan:
        request = take_request(asked, asked.machine_state, asked.storage)
        return planned(
            asked.machine_state,
            await self._work.begin(operations.plan_only(self._store, self._name, request)).ended,
        )

    async def _query(
        self, asked: commands.QueryArguments
    ) -> tuple[vocabulary.SystemSnapshotInfo, ...]:
        record = self._store.find(self._name)
        manifests, _ = self._store.sound_manifests(record.id)
        return tuple(
            info(manifest, str(self._store.snapshot_folder(record.id, manifest.id)))
            for manifest in sorted(manifests, key=lambda each: each.instant)
            if asked.tag in (None, manifest.tag) and asked.id in (None, manifest.id)
        )

    def _refuse_taken(self, tag: str | None) -> None:
        record = self._store.find(self._name)
        taken = [each.id for each in self._store.index.snapshots(record.id) if each.tag == tag]
        if tag and taken:
            raise Refusal(f"the snapshot {taken[0]} has the tag '{tag}': name another")

    def _selected(self, tag: str | None, whole_id: str | None) -> SnapshotEntry:
        if whole_id is not None and len(whole_id) != names.ID_LENGTH:
            raise Refusal(f"'{whole_id}' is no whole id: it has {names.ID_LENGTH} hex digits")
        return select.select(self._store, self._store.find(self._name), id_prefix=whole_id, tag=tag)

    # --- jobs ----------------------------------------------------------------------------------

    async def _begin(self, what: "_Begun", operation: _Operation) -> dict[str, Any]:
        """Begin an operation as a job; returns when the phase has begun that it is answered at.

        Raises:
            Refusal: The name of the job is taken.
            CalotypeError: It was refused before it began; there is no job.
        """
        loop = asyncio.get_running_loop()
        begun = loop.create_future()

        def progress(phase: str, done_bytes: int, expected_bytes: int) -> None:
            loop.call_soon_threadsafe(note, phase, done_bytes, expected_bytes)

        def note(phase: str, done_bytes: int, expected_bytes: int) -> None:
            if phase == what.answered_at and not begun.done():
                begun.set_result(None)
            job.done_bytes = max(job.done_bytes, done_bytes)
            job.expected_bytes = max(job.expected_bytes, expected_bytes)

        with self._jobs.reserved(what.job):
            if what.job in await self._others_jobs():
                raise Refusal(f"Job ID '{what.job}' already in use")
            work = self._work.begin(operation(progress))
            can_be_undone = what.event != "DELETED"
            job = Job(what.job, what.kind, work.cancel if can_be_undone else None)
            await asyncio.wait({work.ended, begun}, return_when=asyncio.FIRST_COMPLETED)
        if not begun.done():
            await work.ended  # which says why
        self._jobs.add(job)
        work.ended.add_done_callback(lambda ended: self._ended(job, what, ended))
        return {}

    def _ended(self, job: Job, what: "_Begun", work: "asyncio.Future[Done]") -> None:
        error = work.exception()
        if error is None:
            done = work.result()
            told: dict[str, Any] = {"job-id": job.name, "id": done.snapshot, "tag": done.tag}
            if done.pause_ms is not None:
                told["pause-ms"] = done.pause_ms
            self._jobs.conclude(job)
            self._tell(f"SYSTEM_SNAPSHOT_{what.event}", told)
            return
        reason = _words(error)
        is_undone = not getattr(error, "__notes__", ())
        self._jobs.conclude(job, reason)
        failed = {"job-id": job.name, "tag": what.tag, "reason": reason, "undone": is_undone}
        failed |= {"id": what.snapshot} if what.snapshot else {}
        self._tell("SYSTEM_SNAPSHOT_FAILED", failed)


# --- what is asked, and what is told --------------------------------------------------------------


def split(arguments: Mapping[str, Any]) -> tuple[int, tuple[dict[str, Any], ...]]:
    """The place of our action in a transaction, and all others, as they were given.

    Raises:
        Refusal: There are two of ours, or what is there beside is none that QEMU would take.
    """
    for unexpected in sorted(arguments.keys() - {"actions", "properties"}):
        raise Refusal(f"Parameter '{unexpected}' is unexpected")
    if not isinstance(arguments.get("properties", {}), dict):
        raise Refusal("Invalid parameter type for 'properties', expected: object")
    actions = arguments["actions"]
    for place, action in enumerate(actions):
        _check_action(f"actions[{place}]", action)
    places = [place for place, each in enumerate(actions) if each["type"] in commands.ACTIONS]
    if len(places) > 1:
        raise Refusal("a transaction has one machine state: machine-state-save is there twice")
    return places[0], tuple(each for each in actions if each["type"] not in commands.ACTIONS)


def _check_action(at: str, action: Any) -> None:
    """Refuse an action that is no object of a type and its data, in QEMU's words."""
    if not isinstance(action, dict):
        raise Refusal(f"Invalid parameter type for '{at}', expected: object")
    if "type" not in action:
        raise Refusal(f"Parameter '{at}.type' is missing")
    if not isinstance(action["type"], str):
        raise Refusal(f"Invalid parameter type for '{at}.type', expected: string")
    if "data" not in action:
        raise Refusal(f"Parameter '{at}.data' is missing")
    if not isinstance(action["data"], dict):
        raise Refusal(f"Invalid parameter type for '{at}.data', expected: object")


def take_request(
    asked: commands.SaveOptions,
    destination: vocabulary.MachineStateDestination,
    storage: Sequence[vocabulary.StorageSnapshotSpec],
) -> TakeRequest:
    """What a save, or a plan of one, is asked for.

    Raises:
        Refusal: It cannot be kept, or is none that can be carried out.
        CalotypeError: The tag or the description cannot be kept.
    """
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


def _words(error: BaseException) -> str:
    """An error in one line: what is wrong, what could not be undone, what to do."""
    if isinstance(error, Cancelled):
        return "; ".join((CANCELLED, *getattr(error, "__notes__", ())))
    if not isinstance(error, CalotypeError):
        return f"a fault in Calotype itself: {type(error).__name__}: {error}"
    return "; ".join(_parts(error))


def _parts(error: CalotypeError) -> Iterator[str]:
    yield error.problem
    yield from getattr(error, "__notes__", ())
    if error.remedy:
        yield error.remedy

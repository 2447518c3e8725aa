"""Our commands: arguments checked, an operation begun, and its job looked after.

What is known beforehand to be in the way is the command's own error: so a command that begins a job
is answered when the operation has begun its first step, which is after its plan was found free of
blockers. From then on the job tells.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any, NamedTuple

from msgspec.structs import replace

from calotype.engine import operations, select
from calotype.engine.changing import BEGUN
from calotype.engine.deletion import delete
from calotype.engine.progress import Progress
from calotype.engine.take_effects import INSTANT
from calotype.model import names
from calotype.plan.delete import DeleteRequest
from calotype.plan.restore_plan import RestoreRequest
from calotype.plan.take_plan import TakeRequest
from calotype.qmp import commands, vocabulary
from calotype.qmp.server import Command, Refusal
from calotype.qmp.visiting import visit
from calotype.service.jobs import Job, Jobs, in_use
from calotype.service.translating import info, planned, split, take_request, words
from calotype.service.work import Work
from calotype.store.index import SnapshotEntry
from calotype.store.store import Store

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


class _Kind(NamedTuple):
    """A kind of job."""

    type: str
    event: str
    """What is told when it has succeeded."""
    can_be_undone: bool
    """Whether what it has begun can be taken back, so that it can be cancelled."""


_SAVE = _Kind("system-snapshot-save", "SYSTEM_SNAPSHOT_SAVED", can_be_undone=True)
_LOAD = _Kind("system-snapshot-load", "SYSTEM_SNAPSHOT_LOADED", can_be_undone=True)
_DELETE = _Kind("system-snapshot-delete", "SYSTEM_SNAPSHOT_DELETED", can_be_undone=False)


class _Asked(NamedTuple):
    """A job that is asked for, and what is told of it."""

    job: str
    kind: _Kind
    tag: str
    snapshot: str = ""
    """Its id, where there is one by then."""
    answered_at: str = BEGUN


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
            CalotypeError: Likewise; arguments that are not what was declared included.
        """
        if command.is_out_of_band:
            raise Refusal(f"The command {command.name} does not support OOB")
        if command.name == TRANSACTION:
            return await self._transact(command.arguments)
        arguments = visit(commands.COMMANDS[command.name].arguments, command.arguments)
        return await self._commands[command.name](arguments)

    # --- the transaction ---------------------------------------------------------------------

    async def _transact(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a transaction with an action of ours; answered when the instant has passed."""
        place, transaction = split(arguments)
        data = arguments["actions"][place]["data"]
        asked = visit(commands.MachineStateSave, data, f"actions[{place}].data")
        request = replace(take_request(asked, asked.destination, ()), transaction=transaction)
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
        tag = asked.tag or ""

        async def save(progress: Progress) -> Done:
            self._refuse_taken(tag)
            manifest = await operations.take(
                self._store,
                self._name,
                request,
                tag=tag,
                description=asked.description or "",
                progress=progress,
            )
            return Done(manifest.id, manifest.tag, manifest.timings.pause_ms)

        return await self._begin(_Asked(asked.job_id, _SAVE, tag, answered_at=answered_at), save)

    async def _load(self, asked: commands.LoadArguments) -> dict[str, Any]:
        entry = await self._selected(asked.tag, asked.id)
        request = RestoreRequest(run_state=asked.run_state, keep_current=asked.keep_current)

        async def load(progress: Progress) -> Done:
            done = await operations.restore(
                self._store, self._name, entry.id, request, progress=progress
            )
            return Done(entry.id, entry.tag, done.pause_ms)

        return await self._begin(_Asked(asked.job_id, _LOAD, entry.tag, entry.id), load)

    async def _delete(self, asked: commands.DeleteArguments) -> dict[str, Any]:
        entry = await self._selected(asked.tag, asked.id)

        async def remove(progress: Progress) -> Done:
            request = DeleteRequest(frozenset({entry.id}))
            await delete(self._store, self._name, request, progress=progress)
            return Done(entry.id, entry.tag)

        return await self._begin(_Asked(asked.job_id, _DELETE, entry.tag, entry.id), remove)

    async def _plan(self, asked: commands.PlanArguments) -> vocabulary.SystemSnapshotPlan:
        request = take_request(asked, asked.machine_state, asked.storage)
        planning = self._work.begin(operations.plan_only(self._store, self._name, request))
        return planned(asked.machine_state, await planning.ended)

    async def _query(
        self, asked: commands.QueryArguments
    ) -> tuple[vocabulary.SystemSnapshotInfo, ...]:
        async def look() -> tuple[vocabulary.SystemSnapshotInfo, ...]:
            record = self._store.find(self._name)
            manifests, _ = self._store.sound_manifests(record.id)
            return tuple(
                info(manifest, str(self._store.snapshot_folder(record.id, manifest.id)))
                for manifest in sorted(manifests, key=lambda each: each.instant)
                if asked.tag in (None, manifest.tag) and asked.id in (None, manifest.id)
            )

        return await self._work.begin(look()).ended

    def _refuse_taken(self, tag: str) -> None:
        """Refuse a tag that a snapshot has; called where files may be waited for."""
        record = self._store.find(self._name)
        taken = [each.id for each in self._store.index.snapshots(record.id) if each.tag == tag]
        if tag and taken:
            raise Refusal(f"the snapshot {taken[0]} has the tag '{tag}': name another")

    async def _selected(self, tag: str | None, whole_id: str | None) -> SnapshotEntry:
        if whole_id is not None and len(whole_id) != names.ID_LENGTH:
            raise Refusal(f"'{whole_id}' is no whole id: it has {names.ID_LENGTH} hex digits")

        async def look() -> SnapshotEntry:
            record = self._store.find(self._name)
            return select.select(self._store, record, id_prefix=whole_id, tag=tag)

        return await self._work.begin(look()).ended

    # --- jobs ----------------------------------------------------------------------------------

    async def _begin(self, asked: _Asked, operation: _Operation) -> dict[str, Any]:
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
            if phase == asked.answered_at and not begun.done():
                begun.set_result(None)
            job.done_bytes = max(job.done_bytes, done_bytes)
            job.expected_bytes = max(job.expected_bytes, expected_bytes)

        with self._jobs.reserved(asked.job):
            if asked.job in await self._others_jobs():
                raise in_use(asked.job)
            work = self._work.begin(operation(progress))
            cancel = work.cancel if asked.kind.can_be_undone else None
            job = Job(asked.job, asked.kind.type, cancel)
            await asyncio.wait({work.ended, begun}, return_when=asyncio.FIRST_COMPLETED)
        if not begun.done():
            await work.ended  # which says why
        self._jobs.add(job)
        work.ended.add_done_callback(lambda ended: self._ended(job, asked, ended))
        return {}

    def _ended(self, job: Job, asked: _Asked, work: "asyncio.Future[Done]") -> None:
        error = work.exception()
        if error is None:
            done = work.result()
            told: dict[str, Any] = {"job-id": job.name, "id": done.snapshot, "tag": done.tag}
            if done.pause_ms is not None:
                told["pause-ms"] = done.pause_ms
            self._jobs.conclude(job)
            self._tell(asked.kind.event, told)
            return
        reason = words(error)
        is_undone = not getattr(error, "__notes__", ())
        self._jobs.conclude(job, reason)
        known = {"id": asked.snapshot, "tag": asked.tag}
        named = {name: value for name, value in known.items() if value}
        failed = {"job-id": job.name, **named, "reason": reason, "undone": is_undone}
        self._tell("SYSTEM_SNAPSHOT_FAILED", failed)

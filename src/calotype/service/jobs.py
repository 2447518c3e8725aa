"""Our jobs, as QEMU's own are: what `query-jobs` tells, which command a state accepts, its events.

A job is `created`, then `running`, `aborting` if it fails or is cancelled, and `concluded` until it
is dismissed (qapi/job.json, JobStatus). It is never dismissed by itself, like those of
`snapshot-save`: who asks later must find out how it ended. The words for a command that comes too
early or too late are QEMU's (job.c, job_apply_verb_locked).
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

from calotype.qmp.schema import QmpStruct
from calotype.qmp.server import Refusal

Status = Literal["created", "running", "aborting", "concluded", "null"]

CANCELLED = "Operation canceled"
"""What QEMU says of a job that was cancelled (job.c, job_update_rc_locked)."""

_VERBS: Mapping[str, str] = {
    "job-pause": "pause",
    "job-resume": "resume",
    "job-cancel": "cancel",
    "job-complete": "complete",
    "job-finalize": "finalize",
    "job-dismiss": "dismiss",
}
"""Command -> what it is called in QEMU's refusal (qapi/job.json, JobVerb)."""

_ACCEPTED: Collection[tuple[str, Status]] = (("cancel", "running"), ("dismiss", "concluded"))
"""Which command a job takes in which state."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
"""What QEMU takes for the name of a job (util/id.c, id_wellformed)."""

Tell = Callable[[str, Mapping[str, Any]], None]


class OneJob(QmpStruct, frozen=True, kw_only=True):
    """The arguments of a command that is about a job (qapi/job.json)."""

    id: str


class Job:
    """One job.

    Args:
        name: What the client calls it.
        kind: Such as `system-snapshot-save`.
        cancel: Has it be cancelled, as soon as can be; None where nothing of it could be undone.
    """

    def __init__(self, name: str, kind: str, cancel: Callable[[], object] | None) -> None:
        self.name = name
        self.kind = kind
        self.cancel = cancel
        self.status: Status = "created"
        self.done_bytes = 0
        self.expected_bytes = 0
        self.error = ""

    def info(self) -> dict[str, Any]:
        """A JobInfo (qapi/job.json)."""
        told: dict[str, Any] = {
            "id": self.name,
            "type": self.kind,
            "status": self.status,
            "current-progress": self.done_bytes,
            "total-progress": max(self.expected_bytes, self.done_bytes, 1),
        }
        return told | ({"error": self.error} if self.error else {})


class Jobs:
    """All of our jobs.

    Args:
        tell: Tells clients of an event.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._jobs: dict[str, Job] = {}
        self._reserved: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._jobs

    def infos(self) -> list[dict[str, Any]]:
        """What `query-jobs` tells of them."""
        return [job.info() for job in self._jobs.values()]

    def require_free(self, name: str) -> None:
        """Refuse a name that no job can be given.

        Raises:
            Refusal: It is no name, or there is a job of that name.
        """
        if not _NAME.fullmatch(name):
            raise Refusal(f"Invalid job ID '{name}'")
        if name in self._jobs or name in self._reserved:
            raise in_use(name)

    @contextlib.contextmanager
    def reserved(self, name: str) -> Iterator[None]:
        """Keep a name while it is found out whether there will be a job.

        Raises:
            Refusal: It is no name, or there is a job of that name.
        """
        self.require_free(name)
        self._reserved.add(name)
        try:
            yield
        finally:
            self._reserved.remove(name)

    def add(self, job: Job) -> None:
        """Begin a job, whose name was reserved."""
        self._jobs[job.name] = job
        self._changed(job)
        self._move(job, "running")

    def conclude(self, job: Job, error: str = "") -> None:
        """A job has ended; *error* says why, if it has failed."""
        job.error = error
        if error and job.status != "aborting":
            self._move(job, "aborting")
        if not error:
            job.done_bytes = max(job.done_bytes, job.expected_bytes, 1)
        self._move(job, "concluded")

    def apply(self, command: str, name: str) -> None:
        """Carry out a command that is about a job of ours.

        Raises:
            Refusal: Its state does not accept that.
        """
        job, verb = self._jobs[name], _VERBS[command]
        if (verb, job.status) not in _ACCEPTED or (verb == "cancel" and job.cancel is None):
            raise Refusal(
                f"Job '{name}' in state '{job.status}' cannot accept command verb '{verb}'"
            )
        if verb == "cancel" and job.cancel is not None:
            self._move(job, "aborting")
            job.cancel()
        else:
            del self._jobs[name]
            self._move(job, "null")

    def _move(self, job: Job, status: Status) -> None:
        job.status = status
        self._changed(job)

    def _changed(self, job: Job) -> None:
        self._tell("JOB_STATUS_CHANGE", {"id": job.name, "status": job.status})


def in_use(name: str) -> Refusal:
    """Why a name is not given to a job (job.c, job_create)."""
    return Refusal(f"Job ID '{name}' already in use")


def named_job(command: str, arguments: Mapping[str, Any]) -> str | None:
    """The job that a command is about; None if it is about none."""
    name = arguments.get("id") if command in _VERBS else None
    return name if isinstance(name, str) else None

"""The paused window: a state machine without I/O that says when all parts are of one instant.

Theory
------
A system snapshot is sound if the guest did not run between the instant of its RAM and the instant
of its disks. Inside the window nothing can be planned ahead, because what to do next depends on
what QEMU says: so it is a machine that is *fed* what arrives, in the order of the wire, and that
answers with commands to send, until it is `Accepted` or `Failed`. It owns no clock and no socket.

RAM's instant is not what one would think. A background snapshot reports `active` before it has
saved the devices and protected RAM (migration/migration.c, bg_migration_thread); only a page count
above zero proves that the protection stands. Whose instant comes first depends on QEMU:

live
    QEMU 9.0 and newer give the VM back in the run state that they found. `stop`, `migrate`, wait
    until pages are saved, `transaction`, `cont`. Storage last: its failure needs no undoing.
live-storage-first
    Older QEMU starts the VM itself as soon as RAM is protected, so the storage must come before
    `migrate`. There the one RESUME is QEMU's own. A second STOP means that the guest had been
    running when QEMU stopped it, hence that RAM is younger than the disks.
paused
    An ordinary migration; the guest stands still until everything is written.
storage-only
    No machine state: one `transaction` is one point in time by itself, the guest runs on.

Rules that keep it sound, whatever else happens:

* Nothing is accepted that the method's table does not spell out, row by row.
* A RESUME that is not the table's own means that somebody ran the guest inside the window.
* Any error, any surprise, and the deadline lead to the *retreat*: cancel the save, let the guest
  run, ask until QEMU confirms both. It ends as `Failed`, which says whether QEMU did. What follows
  then is not this module's business.
"""

from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Any, Literal, NamedTuple

WindowMethod = Literal["live", "live-storage-first", "paused", "storage-only"]


class State(Enum):
    """Where the window is; a name says what we wait for."""

    BEGIN = auto()
    STOPPING = auto()
    """`stop` was sent; the STOP event has not come."""
    DRAINING = auto()
    """The guest stands still; QEMU drains and flushes its images."""
    STARTING = auto()
    """`migrate` was sent."""
    STARTING_RESUMED = auto()
    WATCHING = auto()
    """`query-migrate` was sent."""
    WATCHING_RESUMED = auto()
    WAITING = auto()
    """Until the next tick, before `query-migrate` is sent again."""
    WAITING_RESUMED = auto()
    STORING = auto()
    """`transaction` was sent."""
    RESUMING = auto()
    """The RESUME event has not come."""
    RESUMED = auto()
    """The guest runs; the reply to `cont` has not come."""
    RETREATING = auto()
    ACCEPTED = auto()
    FAILED = auto()


class Event(NamedTuple):
    """A QMP event; *at_us* is QEMU's own time stamp in microseconds."""

    name: str
    at_us: int


class Reply(NamedTuple):
    """The value that QEMU returned for *command*."""

    command: str
    value: Any


class Failure(NamedTuple):
    """The error that QEMU returned for *command*."""

    command: str
    text: str


class Tick(NamedTuple):
    """Time passes; *elapsed_ms* since the window began."""

    elapsed_ms: float


class Lost(NamedTuple):
    """The connection is gone."""

    text: str


class Command(NamedTuple):
    """A QMP command to send now."""

    execute: str
    arguments: Mapping[str, Any]


class Interrupt(NamedTuple):
    """The user wants it to end."""


class Accepted(NamedTuple):
    """All parts are of one instant. The stamps are QEMU's; None where the guest was not stopped."""

    stop_us: int | None
    resume_us: int | None


class Failed(NamedTuple):
    """Nothing is accepted.

    *reason* is what went wrong first, *limit* whether it was the pause limit, *settled* whether
    QEMU confirmed that the VM is in the run state that it had before and saves nothing any more.
    """

    reason: str
    limit: bool
    settled: bool


Input = Event | Reply | Failure | Tick | Lost | Interrupt
Output = Command | Accepted | Failed
Row = tuple[State, str | None]
Table = Mapping[tuple[State, str], Row]

S = State

_STOP: Table = {
    (S.BEGIN, "begin"): (S.STOPPING, "stop"),
    (S.STOPPING, "STOP"): (S.DRAINING, None),
}
_RESUME: Table = {
    (S.RESUMING, "RESUME"): (S.RESUMED, None),
    (S.RESUMED, "ok cont"): (S.ACCEPTED, None),
}
_LIVE: Table = {
    (S.STARTING, "ok migrate"): (S.WATCHING, "query-migrate"),
    (S.WATCHING, "unprotected"): (S.WAITING, None),
    (S.WAITING, "tick"): (S.WATCHING, "query-migrate"),
    (S.WATCHING, "protected"): (S.STORING, "transaction"),
    (S.WATCHING, "saved"): (S.STORING, "transaction"),
}
_PAUSED: Table = {
    (S.STORING, "ok transaction"): (S.STARTING, "migrate"),
    (S.STARTING, "ok migrate"): (S.WATCHING, "query-migrate"),
    (S.WATCHING, "unprotected"): (S.WAITING, None),
    (S.WATCHING, "protected"): (S.WAITING, None),
    (S.WAITING, "tick"): (S.WATCHING, "query-migrate"),
}

TABLES: Mapping[tuple[WindowMethod, bool], Table] = {
    ("live", True): {
        **_STOP,
        (S.DRAINING, "ok stop"): (S.STARTING, "migrate"),
        **_LIVE,
        (S.STORING, "ok transaction"): (S.RESUMING, "cont"),
        **_RESUME,
    },
    ("live", False): {
        (S.BEGIN, "begin"): (S.STARTING, "migrate"),
        **_LIVE,
        (S.STORING, "ok transaction"): (S.ACCEPTED, None),
    },
    ("live-storage-first", True): {
        **_STOP,
        (S.DRAINING, "ok stop"): (S.STORING, "transaction"),
        (S.STORING, "ok transaction"): (S.STARTING, "migrate"),
        (S.STARTING, "ok migrate"): (S.WATCHING, "query-migrate"),
        (S.STARTING, "RESUME"): (S.STARTING_RESUMED, None),
        (S.STARTING_RESUMED, "ok migrate"): (S.WATCHING_RESUMED, "query-migrate"),
        (S.WATCHING, "unprotected"): (S.WAITING, None),
        (S.WATCHING, "RESUME"): (S.WATCHING_RESUMED, None),
        (S.WATCHING, "protected"): (S.RESUMING, None),
        (S.WATCHING, "saved"): (S.RESUMING, None),
        (S.WAITING, "tick"): (S.WATCHING, "query-migrate"),
        (S.WAITING, "RESUME"): (S.WAITING_RESUMED, None),
        (S.WAITING_RESUMED, "tick"): (S.WATCHING_RESUMED, "query-migrate"),
        (S.WATCHING_RESUMED, "unprotected"): (S.WAITING_RESUMED, None),
        (S.WATCHING_RESUMED, "protected"): (S.ACCEPTED, None),
        (S.WATCHING_RESUMED, "saved"): (S.ACCEPTED, None),
        (S.RESUMING, "RESUME"): (S.ACCEPTED, None),
    },
    ("paused", True): {
        **_STOP,
        (S.DRAINING, "ok stop"): (S.STORING, "transaction"),
        **_PAUSED,
        (S.WATCHING, "saved"): (S.RESUMING, "cont"),
        **_RESUME,
    },
    ("storage-only", True): {
        (S.BEGIN, "begin"): (S.STORING, "transaction"),
        (S.STORING, "ok transaction"): (S.ACCEPTED, None),
    },
    ("storage-only", False): {
        (S.BEGIN, "begin"): (S.STORING, "transaction"),
        (S.STORING, "ok transaction"): (S.ACCEPTED, None),
    },
}
"""What is sound, by method and by whether the VM was running: (state, trigger) -> (state, command).

A command of None sends nothing. A trigger that is missing is ignored if it is *quiet*, and leads
to the retreat if it is not.
"""

_QUIET = frozenset({"tick", "event"})
_RUN_STATE_EVENTS = frozenset({"STOP", "RESUME"})
_STORAGE_ONLY_QUIET = _QUIET | _RUN_STATE_EVENTS
_ENDED = frozenset({"none", "completed", "failed", "cancelled"})

GRACE_MS = 10_000.0
"""How long a retreat may take before the window gives up on QEMU's confirmation."""


class Window:
    """One pass through the paused window.

    Args:
        method: Which of the tables applies.
        was_running: Whether the VM runs now; if not, it is neither stopped nor continued.
        migrate: The arguments of `migrate`; unused where the method has no machine state.
        actions: The actions of the storage `transaction`; may be empty.
        properties: Of the transaction, where it has any.
        limit_ms: After how many milliseconds the window is given up.
    """

    def __init__(
        self,
        method: WindowMethod,
        *,
        was_running: bool,
        migrate: Mapping[str, Any],
        actions: Sequence[Mapping[str, Any]],
        limit_ms: float,
        properties: Mapping[str, Any] | None = None,
    ) -> None:
        self.state = State.BEGIN
        self._table = TABLES[method, was_running]
        self._quiet = _STORAGE_ONLY_QUIET if method == "storage-only" else _QUIET
        self._limit_ms = limit_ms
        self._arguments: dict[str, Mapping[str, Any]] = {
            "migrate": migrate,
            "transaction": {
                "actions": list(actions),
                **({"properties": properties} if properties else {}),
            },
        }
        self._sent: set[str] = set()
        self._stop_us: int | None = None
        self._resume_us: int | None = None
        self._elapsed_ms = 0.0
        self._retreat: _Retreat | None = None

    def begin(self) -> list[Output]:
        """Open the window: the first commands to send."""
        return self._move("begin")

    def feed(self, arrived: Input) -> list[Output]:
        """Take in what arrived next on the wire, or that time passed; say what to do now."""
        if self.state in (State.ACCEPTED, State.FAILED):
            return []
        if isinstance(arrived, Tick):
            self._elapsed_ms = arrived.elapsed_ms
        if isinstance(arrived, Lost):
            return self._fail(arrived.text, settled=False)
        if isinstance(arrived, Event):
            self._note_time(arrived)
        if self._retreat is not None:
            return self._retreat_on(self._retreat, arrived)
        if isinstance(arrived, Interrupt):
            return self._turn_back("interrupted")
        if isinstance(arrived, Tick) and self._is_late():
            return self._turn_back(
                f"the pause reached its limit of {self._limit_ms:g} ms", late=True
            )
        return self._move(_trigger(arrived), arrived)

    def _note_time(self, event: Event) -> None:
        if event.name == "STOP":
            self._stop_us = event.at_us
        elif event.name == "RESUME":
            self._resume_us = event.at_us

    def _is_late(self) -> bool:
        return self._elapsed_ms > self._limit_ms

    def _move(self, trigger: str, arrived: Input | None = None) -> list[Output]:
        row = self._table.get((self.state, trigger))
        if row is None:
            return [] if trigger in self._quiet else self._turn_back(_complaint(trigger, arrived))
        self.state, command = row
        if self.state is State.ACCEPTED:
            return [Accepted(self._stop_us, self._resume_us)]
        return [self._send(command)] if command else []

    def _send(self, command: str) -> Command:
        self._sent.add(command)
        return Command(command, self._arguments.get(command, {}))

    def _turn_back(self, reason: str, *, late: bool = False) -> list[Output]:
        """Begin the retreat; *reason* is the error that the caller will see."""
        self.state = State.RETREATING
        self._retreat = _Retreat(reason, late, self._elapsed_ms + GRACE_MS)
        return [*([self._send("cont")] if self._must_run() else []), *self._cancel()]

    def _must_run(self) -> bool:
        """Whether the guest stands still because of our `stop`, as far as is known.

        Without a STOP event somebody else had paused it before, and it stays so. In a retreat that
        began before `stop` was answered, the event may come yet.
        """
        return "stop" in self._sent and self._stop_us is not None

    def _cancel(self) -> list[Output]:
        """Cancel the save, if there may be one, and ask how far that is."""
        commands = ["migrate_cancel", "query-migrate"]
        return [self._send(command) for command in commands["migrate" not in self._sent :]]

    def _retreat_on(self, retreat: "_Retreat", arrived: Input) -> list[Output]:
        """Cancel and let run were sent: ask until QEMU confirms that both happened."""
        match arrived:
            case Tick(elapsed_ms) if elapsed_ms > retreat.until_ms:
                return self._fail("QEMU did not confirm in time", settled=False)
            case Tick() if retreat.waiting:
                retreat.waiting = False
                return self._cancel()
            case Reply("query-migrate", value) if _status(value) not in _ENDED:
                retreat.waiting = True
            case Reply("query-migrate", _):
                return [self._send("query-status")]
            case Reply("query-status", value) if value["running"] or not self._must_run():
                return self._fail("", settled=True)
            case Reply("query-status", _):
                retreat.waiting = True
                return [self._send("cont")]
            case Failure("query-migrate" | "query-status", _):
                retreat.waiting = True
        return []

    def _fail(self, text: str, *, settled: bool) -> list[Output]:
        self.state = State.FAILED
        first = self._retreat.reason if self._retreat else text
        late = self._retreat is not None and self._retreat.late
        return [Failed(first, late, settled)]


class _Retreat:
    """What a retreat remembers: why, until when, and whether the next tick asks again."""

    def __init__(self, reason: str, late: bool, until_ms: float) -> None:
        self.reason = reason
        self.late = late
        self.until_ms = until_ms
        self.waiting = False


def _status(reply: Mapping[str, Any]) -> str:
    return str(reply.get("status", "none"))


def _trigger(arrived: Input) -> str:
    """Name what arrived as the tables name it."""
    match arrived:
        case Event(name, _):
            return name if name in _RUN_STATE_EVENTS else "event"
        case Reply("query-migrate", value):
            return _progress(value)
        case Reply(command, _):
            return f"ok {command}"
        case Failure(command, _):
            return f"error {command}"
        case Lost() | Interrupt():
            return "lost"
        case Tick():
            return "tick"


def _progress(reply: Mapping[str, Any]) -> str:
    """How far a save is: unprotected, protected, saved, or ended without being saved."""
    status = _status(reply)
    if status == "completed":
        return "saved"
    if status in ("failed", "cancelled", "cancelling", "none"):
        return "save-failed"
    ram = reply.get("ram", {})
    return "protected" if ram.get("normal", 0) + ram.get("duplicate", 0) > 0 else "unprotected"


_COMPLAINTS: Mapping[str, str] = {
    "RESUME": "the guest was resumed by somebody else inside the pause",
    "STOP": "the guest was stopped by somebody else inside the pause",
    "ok stop": "the guest was already stopped when the pause was to begin",
}


def _complaint(trigger: str, arrived: Input | None) -> str:
    """Why a trigger that no table spells out ends the window; QEMU's own text where it gave one."""
    match arrived:
        case Failure(command, text):
            return f"QEMU refused {command}: {text}"
        case Reply("query-migrate", value):
            return f"the save ended: {value.get('error-desc', _status(value))}"
    return _COMPLAINTS.get(trigger, f"unexpected {trigger}")

"""Whatever disturbs the window, it accepts nothing of two instants, and gives the guest back.

The window is played against a model of QEMU, on a calm schedule in which it is always accepted,
with disturbances put into it: a thread that sleeps, a command that is refused, a stranger who stops
or continues the VM, a cut connection, a hang, an interrupt. One disturbance is tried at each
moment, and Hypothesis puts in several. `faults` is the judge of how a play ended.

A judge that never rules proves nothing. So each table is broken in every way that makes it accept
what is unsound, and the search must find that; and a share of the plays must be accepted at all.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings, target

from calotype.plan.window import (
    GRACE_MS,
    TABLES,
    Accepted,
    Command,
    Event,
    Failed,
    Failure,
    Input,
    Interrupt,
    Lost,
    Output,
    Reply,
    State,
    Table,
    Tick,
    Window,
    WindowMethod,
)
from qemu_model import ALL_PAGES, BUSY, QemuModel

Case = tuple[WindowMethod, bool]
CASES = sorted(TABLES)
by_case = pytest.mark.parametrize("case", CASES, ids=str)

LIMIT_MS = 60.0
LONG_TICK_MS = 500.0
CALM = ("main", "main", "wire", "wire", "thread", "tick")
CALM_MOVES, MOVES = 25 * len(CALM), 60 * len(CALM)
"""After the calm moves only the clock hurries: what is not over by then ends by the limit."""
NAP = 2 * len(CALM) + 1

Disturbance = tuple[int, str]
"""What comes before which move."""

STRANGERS = ("stranger-cont", "stranger-stop", "stranger-cancel")
HARMLESS = (
    "main-naps", "wire-naps", "thread-naps", "thread-hurries", "reply-lags", "overtake", "noise",
    "tick",
)  # fmt: skip
ENDINGS = ("refuse", "save-fails", "late", "interrupt", "hang", "lost")
RISKS = (
    *STRANGERS, "thread-hurries", "thread-naps", "wire-naps", "reply-lags", "overtake", "refuse",
    "save-fails",
)  # fmt: skip
"""What brings a broken table to light."""
REFUSALS = ("refuse", "overtake", "thread-naps", "stranger-cont")
"""What brings an overlooked refusal to light."""
BEFORE = ("found-paused", "saved-before")
"""What was so when the window began, whenever it is said to come."""
MOMENTARY = (*HARMLESS, *STRANGERS, *ENDINGS)
RARE = 0.2

FROM_OUTSIDE: Mapping[str, Input] = {
    "noise": Event("RTC_CHANGE", 1),
    "interrupt": Interrupt(),
    "lost": Lost("QEMU went away"),
}


# --- a play --------------------------------------------------------------------------------------


class Play:
    """A window and a QEMU, a schedule, and what came of it."""

    def __init__(
        self,
        case: Case,
        disturbances: Sequence[Disturbance] = (),
        *,
        table: Table | None = None,
        gives_back: bool | None = None,
    ) -> None:
        self.method, self.was_running = case
        self.kinds = {kind for _, kind in disturbances}
        self.is_old = self.method == "live-storage-first"
        self.qemu = QemuModel(
            is_background=self.method != "paused",
            gives_back=not self.is_old if gives_back is None else gives_back,
            running=self.was_running and "found-paused" not in self.kinds,
        )
        if "saved-before" in self.kinds:
            self.qemu.status, self.qemu.pages = "completed", ALL_PAGES
        self.window = open_window(case, limit_ms=LIMIT_MS)
        if table is not None:
            self.window._table = table
        self.sent: list[str] = []
        self.fed: list[Input] = []
        self.ends: list[Accepted | Failed] = []
        self.moves = 0
        self.elapsed_ms = 0.0
        self.retreated_ms: float | None = None
        self._asleep: dict[str, float] = {}
        self._run(disturbances)

    def _run(self, disturbances: Sequence[Disturbance]) -> None:
        self._obey(self.window.begin())
        at: dict[int, list[str]] = {}
        for move, kind in disturbances:
            at.setdefault(move, []).append(kind)
        for move in range(MOVES):
            for kind in at.get(move, ()):
                self._disturb(kind, move)
            if self.ends:
                break
            self.moves += 1
            actor = CALM[move % len(CALM)]
            if self._asleep.get(actor, 0) <= move:
                self._move(actor, 1.0 if move < CALM_MOVES else LONG_TICK_MS)

    def _move(self, actor: str, tick_ms: float) -> None:
        self.qemu.move(actor)
        if actor == "wire" and self.qemu.wire:
            self._feed(self.qemu.wire.popleft())
        elif actor == "tick":
            self._tick(tick_ms)

    def _disturb(self, kind: str, move: int) -> None:
        match kind.split("-"):
            case [("main" | "wire" | "thread") as sleeper, "naps"]:
                self._asleep[sleeper] = move + NAP
            case ["hang"]:
                self._asleep["main"] = float("inf")
            case ["late"]:
                self._tick(LIMIT_MS)
            case ["tick"]:
                self._tick(1.0)
            case _:
                self._disturb_qemu(kind)

    def _disturb_qemu(self, kind: str) -> None:
        qemu = self.qemu
        match kind:
            case "refuse" | "overtake" | "reply-lags" | "save-fails":
                setattr(qemu, kind.replace("-", "_"), True)
            case "stranger-cont":
                qemu.resume()
            case "stranger-stop":
                qemu.pause()
            case "stranger-cancel":
                qemu.cancel()
            case "thread-hurries":
                qemu.move("thread", steps=ALL_PAGES + 4)
            case "noise" | "interrupt" | "lost":
                self._feed(FROM_OUTSIDE[kind])

    def _tick(self, tick_ms: float) -> None:
        self.elapsed_ms += tick_ms
        self._feed(Tick(self.elapsed_ms))

    def _feed(self, arrived: Input) -> None:
        if not self.ends:
            self.fed.append(arrived)
            self._obey(self.window.feed(arrived))

    def _obey(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            if isinstance(output, Command):
                self.sent.append(output.execute)
                self.qemu.commands.append(output.execute)
            else:
                self.ends.append(output)
        if self.window.state is State.RETREATING and self.retreated_ms is None:
            self.retreated_ms = self.elapsed_ms

    def last_told(self, command: str) -> Mapping[str, Any]:
        """The newest value that the window was told for a command."""
        return next((each.value for each in reversed(self.fed)
                     if isinstance(each, Reply) and each.command == command), {})  # fmt: skip


def open_window(case: Case, *, limit_ms: float = 1000.0) -> Window:
    method, was_running = case
    actions = [{"type": "blockdev-snapshot"}]
    return Window(
        method,
        was_running=was_running,
        migrate={"uri": "file:x"},
        actions=actions,
        limit_ms=limit_ms,
    )


LAST_MOVES = {case: Play(case).moves + 2 for case in CASES}
"""When a calm play is over, and a little more."""


def several(
    case: Case, number: int, kinds: Sequence[str] = MOMENTARY
) -> Iterator[list[Disturbance]]:
    """No disturbance, each of *kinds* at each moment, then several at once: the same each time."""
    last = LAST_MOVES[case]
    yield []
    yield from ([(move, kind)] for kind in kinds for move in range(last))
    chance = random.Random(1839)
    for _ in range(number):
        before = [(0, kind) for kind in BEFORE if chance.random() < RARE]
        moves = sorted(chance.choices(range(last), k=chance.randint(1, 4)))
        yield [*before, *((move, chance.choice(kinds)) for move in moves)]


# --- the judge -----------------------------------------------------------------------------------

ENDED_BADLY = ("none", "failed", "cancelled")


class Faults(NamedTuple):
    """What is wrong with how a play ended; empty where nothing is."""

    unsound: tuple[str, ...]
    other: tuple[str, ...]


def faults(play: Play) -> Faults:
    if len(play.ends) != 1:
        return Faults((), (f"{len(play.ends)} ends",))
    (end,) = play.ends
    if isinstance(end, Accepted):
        other = [*of_commands(play), *of_accepted(play, end)]
        return Faults(tuple(of_instants(play)), tuple(other))
    return Faults((), (*of_commands(play), *of_failed(play, end)))


def of_instants(play: Play) -> Iterator[str]:
    if play.qemu.disks is None:
        yield "no disks were taken"
    if play.method == "storage-only":
        return
    if play.qemu.ram is None:
        yield "no RAM was taken"
    elif play.qemu.ram != play.qemu.disks:
        yield f"the guest ran from {play.qemu.ram} to {play.qemu.disks}"
    if (told := play.last_told("query-migrate").get("status")) in ("cancelling", *ENDED_BADLY):
        yield f"the save was known to be {told}"


def of_commands(play: Play) -> Iterator[str]:
    """The guest is continued only if it was stopped for the window."""
    if not play.was_running and {"stop", "cont"} & set(play.sent):
        yield "a VM that was paused was stopped or continued"
    if "cont" in play.sent and "stop" not in play.sent:
        yield "a guest was continued that was not stopped"
    if not play.qemu.ran_before and play.qemu.continued_by_command and no_stranger(play):
        yield "a VM that its user had paused was continued"


def of_accepted(play: Play, end: Accepted) -> Iterator[str]:
    if no_stranger(play) and play.qemu.running is not play.qemu.ran_before:
        yield "the guest was not given back as it was"
    if play.method == "storage-only":
        return
    if not play.was_running:
        if end != (None, None):
            yield "a VM that stood still has times of a pause"
    elif end.stop_us is None or end.resume_us is None:
        yield "a pause has no times"
    elif not all(end.stop_us <= taken_us <= end.resume_us for taken_us in play.qemu.taken_us):
        yield "a part is not of the time of the pause"


def of_failed(play: Play, end: Failed) -> Iterator[str]:
    if end.limit is not end.reason.startswith("the pause reached its limit"):
        yield f"limit is {end.limit}: {end.reason}"
    if play.retreated_ms is not None:
        late_ms = play.elapsed_ms - play.retreated_ms - GRACE_MS
        if late_ms > LONG_TICK_MS:
            yield f"the retreat took {late_ms} ms longer than its grace"
    if end.settled:
        yield from of_settled(play)
    elif not play.kinds & {"hang", "lost"}:
        yield "a QEMU that answers was not asked to the end"


def of_settled(play: Play) -> Iterator[str]:
    told = play.fed[-1]
    if not (isinstance(told, Reply) and told.command == "query-status"):
        yield "settled, and QEMU had not confirmed it"
    if play.qemu.status in BUSY:
        yield f"settled, and a save is {play.qemu.status}"
    if no_stranger(play) and play.qemu.running is not play.qemu.ran_before:
        yield "settled, and the run state is another"
    if play.qemu.stopped_by_command and not play.last_told("query-status")["running"]:
        yield "settled, and the guest was not known to run"


def no_stranger(play: Play) -> bool:
    return not play.kinds & {"stranger-cont", "stranger-stop"}


# --- what is accepted ----------------------------------------------------------------------------


@by_case
def test_a_calm_window_is_accepted(case: Case) -> None:
    play = Play(case)
    assert [type(end) for end in play.ends] == [Accepted]
    assert play.window.state is State.ACCEPTED
    assert faults(play) == ((), ())
    assert play.window.feed(Event("STOP", 1)) == []


@by_case
@pytest.mark.parametrize("kind", [*HARMLESS, "saved-before"])
def test_what_is_harmless_changes_nothing(case: Case, kind: str) -> None:
    for move in range(LAST_MOVES[case]):
        play = Play(case, [(move, kind)])
        assert [type(end) for end in play.ends] == [Accepted], move
        assert faults(play) == ((), ()), move


@by_case
@pytest.mark.parametrize("kind", [*STRANGERS, *ENDINGS])
@pytest.mark.parametrize("before", [[], *([each] for each in BEFORE)], ids=str)
def test_one_disturbance_does_no_harm_whenever_it_comes(
    case: Case, kind: str, before: Sequence[str]
) -> None:
    for move in range(LAST_MOVES[case]):
        play = Play(case, [*((0, each) for each in before), (move, kind)])
        assert faults(play) == ((), ()), move


SHARE = 0.2
"""How many of the plays that Hypothesis tries are accepted, at the least, in each case."""


@by_case
def test_several_disturbances_do_no_harm(case: Case) -> None:
    ends: Counter[str] = Counter()
    moments = st.integers(0, LAST_MOVES[case])
    kinds = st.sampled_from(HARMLESS) | st.sampled_from((*STRANGERS, *ENDINGS, *BEFORE))

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.tuples(moments, kinds), max_size=4))
    def search(disturbances: list[Disturbance]) -> None:
        play = Play(case, disturbances)
        assert faults(play) == ((), ())
        (end,) = play.ends
        ends[type(end).__name__] += 1
        target(float(len(disturbances) if isinstance(end, Accepted) else 0))

    search()
    assert ends["Accepted"] >= SHARE * ends.total(), ends
    assert ends["Failed"] > 0


@by_case
def test_strangers_and_delays_do_no_harm(case: Case) -> None:
    """What a broken table is caught by, the sound one withstands."""
    for disturbances in several(case, 2000, RISKS):
        assert faults(Play(case, disturbances)) == ((), ()), disturbances


@by_case
@pytest.mark.parametrize("gives_back", [True, False])
def test_on_a_qemu_of_another_age_nothing_unsound_is_accepted(case: Case, gives_back: bool) -> None:
    for disturbances in several(case, 300):
        play = Play(case, disturbances, gives_back=gives_back)
        assert faults(play).unsound == (), disturbances


# --- twins ---------------------------------------------------------------------------------------

S = State
ENOUGH = 20_000


def overlooking(table: Table, *triggers: str) -> Table:
    """Make a table ignore *triggers* wherever it does not spell them out."""
    states = {state for state, _ in table}
    return {(state, trigger): (state, None) for state in states for trigger in triggers} | {**table}


def broken(case: Case) -> Iterator[tuple[str, Table]]:
    """Each way to break a case's table, with a name."""
    table = TABLES[case]
    for (state, trigger), row in table.items():
        if trigger == "ok transaction" and row[0] is S.ACCEPTED:
            yield f"{trigger} not waited for", {**table, (state, "tick"): row}
        if trigger in ("ok migrate", "ok transaction"):
            refused = trigger.replace("ok", "error")
            yield f"{refused} overlooked in {state.name}", {**table, (state, refused): row}
        if trigger == "saved":
            for other in ("unprotected", "protected", "save-failed", "error query-migrate"):
                if table.get((state, other)) != row:
                    yield f"{other} is enough in {state.name}", {**table, (state, other): row}
            yield f"migrate is enough in {state.name}", {**table, (S.STARTING, "ok migrate"): row}
    if case[0] != "storage-only":
        yield "strangers overlooked", overlooking(table, "STOP", "RESUME")
    for name, rows in BROKEN.get(case, {}).items():
        yield name, {**table, **rows}
    if case == ("live-storage-first", True):
        yield "STOP overlooked", overlooking(table, "STOP")


BROKEN: Mapping[Case, Mapping[str, Table]] = {
    ("live", True): {
        "storage after cont": {
            (S.WATCHING, "protected"): (S.RESUMING, "cont"),
            (S.WATCHING, "saved"): (S.RESUMING, "cont"),
            (S.RESUMED, "ok cont"): (S.STORING, "transaction"),
            (S.STORING, "ok transaction"): (S.ACCEPTED, None),
        },
        "RESUME overlooked": {
            (S.STARTING, "RESUME"): (S.STARTING, None),
            (S.WATCHING, "RESUME"): (S.WATCHING, None),
            (S.WAITING, "RESUME"): (S.WAITING, None),
            (S.STORING, "RESUME"): (S.STORING, None),
            (S.RESUMING, "ok cont"): (S.ACCEPTED, None),
        },
        "never stopped": overlooking(TABLES["live", False], "STOP", "RESUME"),
    },
    ("live-storage-first", True): {
        "storage after migrate": {
            (S.DRAINING, "ok stop"): (S.STARTING, "migrate"),
            (S.WATCHING, "protected"): (S.STORING, "transaction"),
            (S.WATCHING_RESUMED, "protected"): (S.STORING, "transaction"),
            (S.STORING, "RESUME"): (S.STORING, None),
            (S.STORING, "ok transaction"): (S.ACCEPTED, None),
        },
    },
    ("paused", True): {
        "storage after cont": {
            (S.DRAINING, "ok stop"): (S.STARTING, "migrate"),
            (S.RESUMED, "ok cont"): (S.STORING, "transaction"),
            (S.STORING, "ok transaction"): (S.ACCEPTED, None),
        },
    },
}


TWINS = [
    pytest.param(
        case,
        table,
        REFUSALS if name.startswith("error") else RISKS,
        id=f"{case[0]}-{case[1]}-{name}",
    )
    for case in CASES
    for name, table in broken(case)
]


@pytest.mark.parametrize(("case", "table", "kinds"), TWINS)
def test_a_broken_table_is_caught_with_parts_of_two_instants(
    case: Case, table: Table, kinds: Sequence[str]
) -> None:
    plays = (Play(case, each, table=table) for each in several(case, ENOUGH, kinds))
    assert any(faults(play).unsound for play in plays)


ROWS = [
    pytest.param(case, key, id=f"{case[0]}-{case[1]}-{key[0].name}-{key[1]}")
    for case in CASES
    for key, (state, _) in TABLES[case].items()
    if state is not S.ACCEPTED
    and key != (S.RESUMING, "RESUME")  # the reply to `cont` is waited for, and changes nothing
]


@pytest.mark.parametrize(("case", "key"), ROWS)
def test_to_accept_a_row_earlier_is_caught(case: Case, key: tuple[State, str]) -> None:
    table = {**TABLES[case], key: (S.ACCEPTED, None)}
    plays = (Play(case, each, table=table) for each in several(case, ENOUGH, RISKS))
    assert any(faults(play) != ((), ()) for play in plays)


@by_case
def test_each_row_is_needed(case: Case) -> None:
    """Without it some play that is merely slow is not accepted."""
    for key in TABLES[case].keys() - {(S.BEGIN, "begin")}:
        table = {each: row for each, row in TABLES[case].items() if each != key}
        plays = (Play(case, each, table=table) for each in several(case, ENOUGH, HARMLESS))
        assert any(isinstance(play.ends[0], Failed) for play in plays), key


# --- the retreat ---------------------------------------------------------------------------------


def fed(case: Case, *inputs: Input, limit_ms: float = 1000.0) -> tuple[Window, list[Output]]:
    """A window that was fed with *inputs*, and what it said to the last of them."""
    window = open_window(case, limit_ms=limit_ms)
    outputs = window.begin()
    for each in inputs:
        outputs = window.feed(each)
    return window, outputs


STOPPED: tuple[Input, ...] = (Event("STOP", 1), Reply("stop", {}))
STARTED: tuple[Input, ...] = (*STOPPED, Reply("migrate", {}))
RETREAT = [Command("cont", {}), Command("migrate_cancel", {}), Command("query-migrate", {})]


def saving(status: str, **ram: int) -> Reply:
    return Reply("query-migrate", {"status": status, "ram": {"normal": 0, "duplicate": 0} | ram})


@pytest.mark.parametrize("ram", [{"normal": 1}, {"duplicate": 1}])
def test_a_page_of_either_kind_proves_the_protection(ram: dict[str, int]) -> None:
    _, outputs = fed(("live", True), *STARTED, saving("active", **ram))
    assert [each.execute for each in outputs if isinstance(each, Command)] == ["transaction"]


@pytest.mark.parametrize("status", ["cancelling", "cancelled", "failed", "none"])
@pytest.mark.parametrize("pages", [0, 7])
def test_a_save_that_is_given_up_is_no_success(status: str, pages: int) -> None:
    window, outputs = fed(("live", True), *STARTED, saving(status, normal=pages))
    assert window.state is State.RETREATING
    assert outputs == RETREAT


def test_a_save_that_is_being_cancelled_is_waited_for() -> None:
    window, _ = fed(("live", True), *STARTED, Interrupt())
    for _ in range(3):
        assert window.feed(saving("cancelling")) == []
        assert window.feed(Tick(1.0)) == RETREAT[1:]
        assert window.feed(Tick(1.0)) == []
    assert window.feed(saving("cancelled")) == [Command("query-status", {})]
    assert window.feed(Reply("query-status", {"running": True})) == [
        Failed("interrupted", limit=False, settled=True)
    ]


@by_case
@pytest.mark.parametrize("before", [[], [(0, "found-paused")]], ids=str)
def test_a_hang_and_an_interrupt_end_within_the_grace(
    case: Case, before: list[Disturbance]
) -> None:
    for move in range(LAST_MOVES[case] - 2):
        play = Play(case, [*before, (move, "hang"), (move, "interrupt")])
        assert faults(play) == ((), ())
        (end,) = play.ends
        assert isinstance(end, Failed)
        assert end.reason == "interrupted" or before
        assert play.elapsed_ms >= GRACE_MS or end.settled


@by_case
def test_a_lost_connection_settles_nothing(case: Case) -> None:
    for move in range(LAST_MOVES[case] - 2):
        for first in ([], [(move, "interrupt")]):
            (end,) = Play(case, [*first, (move, "lost")]).ends
            reason = "interrupted" if first else "QEMU went away"
            assert end == Failed(reason, limit=False, settled=False)


def test_the_pause_limit_leads_to_the_retreat_and_names_itself() -> None:
    (end,) = Play(("live", True), [(4, "late"), (5, "late")]).ends
    assert end == Failed("the pause reached its limit of 60 ms", limit=True, settled=True)


def test_a_refused_transaction_ends_with_qemus_own_words() -> None:
    case: Case = ("live", True)
    window, outputs = fed(case, *STARTED, saving("active", normal=1))
    assert outputs == [Command("transaction", {"actions": [{"type": "blockdev-snapshot"}]})]
    assert window.feed(Failure("transaction", "No space left on device")) == RETREAT
    window.feed(Reply("query-migrate", {"status": "cancelled"}))
    assert window.feed(Reply("query-status", {"running": True})) == [
        Failed("QEMU refused transaction: No space left on device", limit=False, settled=True)
    ]


def test_a_user_who_had_paused_the_vm_is_not_overruled() -> None:
    window, outputs = fed(("live", True), Reply("stop", {}))
    assert outputs == [Command("query-migrate", {})]
    window.feed(Reply("query-migrate", {}))
    assert window.feed(Reply("query-status", {"running": False})) == [
        Failed("the guest was already stopped when the pause was to begin", False, True)
    ]

"""Steps are run in order; what was begun is undone, newest first, whatever happens meanwhile."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from calotype.engine.execute import execute, finish, undo
from calotype.engine.world import Effect, Effects
from calotype.errors import HostError, QemuError
from calotype.plan.steps import DropSnapshot, Step


class One(Step, frozen=True):
    """A step that can be undone, as all below."""

    name: str = "one"


class Two(Step, frozen=True):
    name: str = "two"


class Three(Step, frozen=True):
    name: str = "three"


class Final(Step, frozen=True):
    """A step that nothing undoes."""

    name: str = "final"


ALL = (One(), Two(), Three())


class World:
    """Notes what was done to it; a name in *failing* raises what stands there."""

    def __init__(self, **failing: BaseException) -> None:
        self.phases_ms: dict[str, float] = {}
        self.said: list[str] = []
        self.failing = failing
        self.during: dict[str, Callable[[], Awaitable[None]]] = {}

    async def apply(self, step: Step) -> None:
        await self._do(f"do_{name_of(step)}")

    async def revert(self, step: Step) -> None:
        await self._do(f"undo_{name_of(step)}")

    async def _do(self, word: str) -> None:
        self.said.append(f"{word} begins")
        await asyncio.sleep(0)
        if word in self.during:
            await self.during[word]()
        if word in self.failing:
            raise self.failing[word]
        self.said.append(word)

    def done(self) -> list[str]:
        return [word for word in self.said if not word.endswith("begins")]


class Notebook:
    """A journal in memory: an entry each, as words; what is in *refused* finds the disk full."""

    def __init__(self, *refused: str, said: list[str] | None = None) -> None:
        self.entries: list[tuple[object, ...]] = []
        self.refused = refused
        self.said = [] if said is None else said

    def note_doing(self, step: int) -> None:
        self._note("doing", step)

    def note_done(self, step: int, spent_ms: float) -> None:
        assert spent_ms >= 0
        self._note("done", step)

    def note_undoing(self, error: str) -> None:
        self._note("undoing", error)

    def note_unfinished(self, reasons: tuple[str, ...]) -> None:
        self._note("unfinished", *reasons)

    def end(self, outcome: str, error: str = "") -> None:
        self._note("end", outcome, error)

    def _note(self, *words: object) -> None:
        self.said.append(" ".join(map(str, words)))
        if words[0] in self.refused or self.said[-1] in self.refused:
            raise HostError("no space")
        self.entries.append(words)


def name_of(step: Step) -> str:
    return type(step).__name__.lower()


EFFECTS: Effects = {
    **dict.fromkeys((One, Two, Three), Effect(World.apply, World.revert)),
    Final: Effect(World.apply),
}


async def test_steps_run_in_order_and_nothing_is_undone() -> None:
    world = World()
    await execute(ALL, EFFECTS, world, Notebook())
    assert world.done() == ["do_one", "do_two", "do_three"]


async def test_no_steps_are_no_error() -> None:
    await execute((), EFFECTS, World(), Notebook())


async def test_each_phase_is_timed_and_repeated_ones_are_added_up() -> None:
    world = World()

    async def take_time() -> None:
        await asyncio.sleep(0.01)

    world.during["do_one"] = take_time
    await execute((One(), Two(), One("again")), EFFECTS, world, Notebook())
    assert list(world.phases_ms) == ["One", "Two"]
    assert world.phases_ms["One"] >= 18.0


@pytest.mark.parametrize(
    ("failing", "undone"),
    [
        ("do_one", ["undo_one"]),
        ("do_two", ["undo_two", "undo_one"]),
        ("do_three", ["undo_three", "undo_two", "undo_one"]),
    ],
)
async def test_what_was_begun_is_undone_newest_first_the_half_done_step_too(
    failing: str, undone: list[str]
) -> None:
    error = QemuError("it broke")
    world = World(**{failing: error})
    with pytest.raises(QemuError) as caught:
        await execute(ALL, EFFECTS, world, Notebook())
    assert caught.value is error
    assert [word for word in world.done() if word.startswith("undo")] == undone
    assert not hasattr(error, "__notes__")


async def test_a_step_that_nothing_undoes_is_passed_over() -> None:
    world = World(do_two=QemuError("it broke"))
    with pytest.raises(QemuError):
        await execute((One(), Final(), Two()), EFFECTS, world, Notebook())
    assert world.done() == ["do_one", "do_final", "undo_two", "undo_one"]


async def test_a_step_is_undone_with_its_own_values() -> None:
    reverted: list[Step] = []

    async def note(_: World, step: Step) -> None:
        reverted.append(step)

    steps = (One("first"), One("second"), Two())
    world = World(do_two=QemuError("it broke"))
    with pytest.raises(QemuError):
        await execute(steps, {**EFFECTS, One: Effect(World.apply, note)}, world, Notebook())
    assert reverted == [One("second"), One("first")]


async def test_the_first_error_is_the_error_and_failures_of_undoing_are_notes_on_it() -> None:
    error = QemuError("it broke")
    world = World(do_three=error, undo_three=HostError("no space"), undo_one=RuntimeError("a bug"))
    with pytest.raises(QemuError) as caught:
        await execute(ALL, EFFECTS, world, Notebook())
    assert caught.value is error
    assert error.__notes__ == ["undoing Three failed: no space", "undoing One failed: a bug"]
    assert "undo_two" in world.done()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), RuntimeError("a bug")])
async def test_whatever_ends_the_work_it_is_undone(error: BaseException) -> None:
    world = World(do_two=error)
    with pytest.raises(type(error)) as caught:
        await execute(ALL, EFFECTS, world, Notebook())
    assert caught.value is error
    assert world.done() == ["do_one", "undo_two", "undo_one"]


# --- cancellation --------------------------------------------------------------------------------


class Gate:
    """A place where a step waits until it is let through."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await self.opened.wait()


async def test_a_cancelled_step_is_undone_and_stays_cancelled() -> None:
    world, gate = World(), Gate()
    world.during["do_two"] = gate
    task = asyncio.create_task(execute(ALL, EFFECTS, world, Notebook()))
    await gate.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert world.done() == ["do_one", "undo_two", "undo_one"]


@pytest.mark.parametrize("times", [1, 3])
async def test_undoing_is_not_cut_off_by_being_cancelled_again(times: int) -> None:
    world, doing, undoing = World(), Gate(), Gate()
    world.during |= {"do_three": doing, "undo_two": undoing}
    task = asyncio.create_task(execute(ALL, EFFECTS, world, Notebook()))
    await doing.reached.wait()
    task.cancel()
    await undoing.reached.wait()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.001)
        assert not task.done()
    undoing.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.done() == ["do_one", "do_two", "undo_three", "undo_two", "undo_one"]


async def test_undoing_after_a_failure_is_not_cut_off_either() -> None:
    error, undoing = QemuError("it broke"), Gate()
    world = World(do_three=error)
    world.during["undo_three"] = undoing
    task = asyncio.create_task(execute(ALL, EFFECTS, world, Notebook()))
    await undoing.reached.wait()
    task.cancel()
    await asyncio.sleep(0.001)
    undoing.opened.set()
    with pytest.raises(QemuError) as caught:
        await task
    assert caught.value is error
    assert world.done()[-3:] == ["undo_three", "undo_two", "undo_one"]


async def test_failures_of_undoing_after_a_cancellation_are_notes_on_it() -> None:
    world, gate = World(undo_one=HostError("no space")), Gate()
    world.during["do_two"] = gate
    task = asyncio.create_task(execute(ALL, EFFECTS, world, Notebook()))
    await gate.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.__notes__ == ["undoing One failed: no space"]


async def test_a_cancellation_raised_by_undoing_does_not_stop_the_rest() -> None:
    world = World(do_three=QemuError("it broke"), undo_three=asyncio.CancelledError())
    with pytest.raises(QemuError):
        await execute(ALL, EFFECTS, world, Notebook())
    assert world.done()[-2:] == ["undo_two", "undo_one"]


# --- notes ---------------------------------------------------------------------------------------


async def test_what_is_about_to_happen_is_noted_before_it_does_and_the_end_last() -> None:
    world = World()
    await execute((One(), Two()), EFFECTS, world, Notebook(said=world.said))
    assert world.said == [
        "doing 0", "do_one begins", "do_one", "done 0",
        "doing 1", "do_two begins", "do_two", "done 1",
        "end done ",
    ]  # fmt: skip


async def test_an_undo_is_noted_before_it_begins_and_its_end_last() -> None:
    world = World(do_two=QemuError("it broke"))
    with pytest.raises(QemuError):
        await execute(ALL, EFFECTS, world, Notebook(said=world.said))
    assert world.said[world.said.index("do_two begins") :] == [
        "do_two begins",
        "undoing it broke", "undo_two begins", "undo_two", "undo_one begins", "undo_one",
        "end undone it broke",
    ]  # fmt: skip


async def test_what_cannot_all_be_undone_is_noted_and_has_no_end() -> None:
    world, notes = World(do_two=QemuError("it broke"), undo_one=HostError("no space")), Notebook()
    with pytest.raises(QemuError):
        await execute(ALL, EFFECTS, world, notes)
    assert notes.entries[-2:] == [
        ("undoing", "it broke"),
        ("unfinished", "undoing One failed: no space"),
    ]


async def test_an_error_without_words_is_noted_by_its_kind() -> None:
    notes = Notebook()
    with pytest.raises(KeyboardInterrupt):
        await execute(ALL, EFFECTS, World(do_one=KeyboardInterrupt()), notes)
    assert ("undoing", "KeyboardInterrupt") in notes.entries


async def test_what_cannot_be_noted_does_not_happen() -> None:
    world = World()
    with pytest.raises(HostError):
        await execute(ALL, EFFECTS, world, Notebook("doing 1"))
    assert world.done() == ["do_one", "undo_one"]


async def test_a_step_that_cannot_be_noted_as_done_is_undone() -> None:
    world = World()
    with pytest.raises(HostError):
        await execute(ALL, EFFECTS, world, Notebook("done"))
    assert world.done() == ["do_one", "undo_one"]


FULL = [("undoing",), ("unfinished",), ("end",), ("undoing", "unfinished", "end")]


@pytest.mark.parametrize("refused", FULL)
async def test_a_full_disk_keeps_nothing_from_being_undone(refused: tuple[str, ...]) -> None:
    error = QemuError("it broke")
    world, notes = World(do_three=error), Notebook(*refused)
    with pytest.raises(QemuError) as caught:
        await execute(ALL, EFFECTS, world, notes)
    assert caught.value is error
    assert world.done()[-3:] == ["undo_three", "undo_two", "undo_one"]
    has_end = ("end", "undone", "it broke") in notes.entries
    assert has_end == ("end" not in refused)
    assert getattr(error, "__notes__", []) == (
        [] if has_end else ["ending the journal failed: no space"]
    )


@pytest.mark.parametrize("refused", FULL)
async def test_a_full_disk_hides_no_failure_of_undoing(refused: tuple[str, ...]) -> None:
    world = World(undo_two=RuntimeError("a bug"))
    reasons = await undo(ALL, EFFECTS, world, Notebook(*refused), "it broke")
    assert reasons == ["undoing Two failed: a bug"]
    assert world.done() == ["undo_three", "undo_one"]


# --- the point of no return ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failing", "no_return", "is_undone"),
    [
        ("do_one", 0, False),
        ("do_one", 1, True),
        ("do_two", 1, False),
        ("do_two", 2, True),
        ("do_three", 2, False),
        ("do_three", 3, True),
        ("do_three", None, True),
    ],
)
async def test_from_the_point_of_no_return_on_nothing_is_undone(
    failing: str, no_return: int | None, is_undone: bool
) -> None:
    error = QemuError("it broke")
    world, notes = World(**{failing: error}), Notebook()
    with pytest.raises(QemuError) as caught:
        await execute(ALL, EFFECTS, world, notes, no_return)
    assert caught.value is error
    assert any(word.startswith("undo") for word in world.said) == is_undone
    if is_undone:
        assert notes.entries[-1] == ("end", "undone", "it broke")
    else:
        assert notes.entries[-1] == ("unfinished", "it broke")
        assert "`calotype recover` finishes it" in error.__notes__[0]


async def test_what_is_deleted_already_is_said_of_a_delete_that_fails() -> None:
    drops = (DropSnapshot("a"), DropSnapshot("b"))
    effects: dict[type[Step], Effect] = dict(EFFECTS)
    effects[DropSnapshot] = Effect(lambda *_: asyncio.sleep(0))
    error = QemuError("it broke")
    with pytest.raises(QemuError) as caught:
        await execute((*drops, One()), effects, World(do_one=error), Notebook(), 0)
    assert caught.value.__notes__ == [
        "deleted already: a, b; `calotype recover` finishes the rest, nothing is undone"
    ]


async def test_past_the_point_of_no_return_a_full_disk_does_not_hide_the_error() -> None:
    error = QemuError("it broke")
    with pytest.raises(QemuError) as caught:
        await execute(ALL, EFFECTS, World(do_one=error), Notebook("unfinished"), 0)
    assert caught.value is error


async def test_past_the_point_of_no_return_an_interrupted_step_is_left_to_be_finished() -> None:
    world, notes, gate = World(), Notebook(), Gate()
    world.during["do_two"] = gate
    task = asyncio.create_task(execute(ALL, EFFECTS, world, notes, 1))
    await gate.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.done() == ["do_one"]
    assert notes.entries[-1][0] == "unfinished"


# --- finish --------------------------------------------------------------------------------------


async def test_what_is_left_is_finished_in_order_and_ended() -> None:
    world, notes = World(), Notebook()
    await finish((Two(), Final()), EFFECTS, world, notes)
    assert world.done() == ["do_two", "do_final"]
    assert notes.entries == [("end", "done", "")]


async def test_a_step_that_cannot_be_finished_stays_unfinished_and_nothing_is_undone() -> None:
    error = QemuError("it broke")
    world, notes = World(do_two=error), Notebook()
    with pytest.raises(QemuError) as caught:
        await finish(ALL, EFFECTS, world, notes)
    assert caught.value is error
    assert world.done() == ["do_one"]
    assert notes.entries == [("unfinished", "it broke")]


async def test_a_full_disk_does_not_hide_why_a_step_cannot_be_finished() -> None:
    error = QemuError("it broke")
    with pytest.raises(QemuError) as caught:
        await finish(ALL, EFFECTS, World(do_one=error), Notebook("unfinished"))
    assert caught.value is error

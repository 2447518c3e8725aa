"""What the witness said, as facts, and what follows from them.

A console is a poor channel: a snapshot cuts a line in two, a kernel may speak in between, and what
has just been written may end anywhere. So a fact is believed only if its whole line is there; but
the words INCONSISTENT, FAILED and "Kernel panic" count wherever they stand and however little
of their line is left: noise may hide a good sign, never a bad one.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Boot:
    """The guest's kernel has started; another id means another start, not a restore."""

    id: str


@dataclass(frozen=True)
class Ready:
    """Rings and pool are made, the first round follows."""

    n: int
    disks: int
    pages: int


@dataclass(frozen=True)
class Tick:
    """A sign of life, about every 20 ms: *bad* differences since the start, in *n* rounds."""

    n: int
    mono_us: int
    bad: int


@dataclass(frozen=True)
class Check:
    """The whole pool and all rings were compared: *bad* differences since the start."""

    n: int
    pages: int
    bad: int


@dataclass(frozen=True)
class Reply:
    """An order was understood: PAUSED, GOING or DIRTY."""

    word: str
    n: int


@dataclass(frozen=True)
class Inconsistency:
    """RAM and a disk, or a page and its making, differ; None is what could not be read.

    Attributes:
        line: The line as it came.
        n: The round.
        disk: The number of the disk, in the order of the command line; None for a page.
        slot: The first slot of its ring that differs.
        slots: How many do.
        expected: The round in which memory wrote that slot.
        found: The round that the disk says; None if the slot holds no sector of the witness.
        page: The number of the page in the pool; None for a disk.
    """

    line: str
    n: int | None = None
    disk: int | None = None
    slot: int | None = None
    slots: int | None = None
    expected: int | None = None
    found: int | None = None
    page: int | None = None


@dataclass(frozen=True)
class Failure:
    """A transfer failed in the guest, or its kernel gave up."""

    line: str


Fact = Boot | Ready | Tick | Check | Reply | Inconsistency | Failure

_NUMBER = "([0-9]{1,20})"
_NUMBERS: dict[type[Ready | Tick | Check], re.Pattern[str]] = {
    Ready: re.compile(f"READY n={_NUMBER} disks={_NUMBER} pages={_NUMBER}"),
    Tick: re.compile(f"TICK n={_NUMBER} mono_us={_NUMBER} bad={_NUMBER}"),
    Check: re.compile(f"CHECKED n={_NUMBER} pages={_NUMBER} bad={_NUMBER}"),
}
_BOOT = re.compile("BOOT id=([0-9a-f-]{36})")
_REPLY = re.compile(f"(PAUSED|GOING|DIRTY) n={_NUMBER}(?: pages={_NUMBER})?")
_INCONSISTENCY = re.compile("INCONSISTENT.*")
_DETAIL = re.compile(rf"\b(n|disk|slot|slots|expected|found|page)={_NUMBER}\b")
_FAILURE = re.compile("(?:FAILED|Kernel panic).*")


def read(text: str) -> list[Fact]:
    """The facts in a console's text, in its order; whatever else it holds is passed over."""
    *lines, unfinished = text.replace("\r", "").split("\n")
    facts = [fact for line in lines for fact in _facts_of(line)]
    return facts + list(_bad_signs_of(unfinished))


def _facts_of(line: str) -> Iterator[Fact]:
    for kind, pattern in _NUMBERS.items():
        if match := pattern.fullmatch(line):
            yield kind(*map(int, match.groups()))
    if match := _BOOT.fullmatch(line):
        yield Boot(match[1])
    if match := _REPLY.fullmatch(line):
        yield Reply(match[1], int(match[2]))
    yield from _bad_signs_of(line)


def _bad_signs_of(line: str) -> Iterator[Fact]:
    if match := _INCONSISTENCY.search(line):
        details = {name: int(number) for name, number in _DETAIL.findall(match[0])}
        yield Inconsistency(match[0], **details)
    if match := _FAILURE.search(line):
        yield Failure(match[0])


@dataclass(frozen=True)
class Verdict:
    """What a stretch of console proves.

    Attributes:
        n: The last round that was told; 0 if none was.
        ticks: How many ticks there were.
        checks: How many full checks.
        bad: The most differences that the witness counted.
        inconsistencies: How many it told.
        failures: How many transfers failed or kernels gave up.
        boots: How many different starts of the kernel were told.
    """

    n: int
    ticks: int
    checks: int
    bad: int
    inconsistencies: int
    failures: int
    boots: int

    @property
    def has_testified(self) -> bool:
        """Whether a whole round was surely played: one tick may be the end of an older one."""
        return self.ticks > 1 or self.checks > 0

    @property
    def is_consistent(self) -> bool:
        """Whether the witness has testified, and to nothing bad."""
        return self.has_testified and not (self.bad or self.inconsistencies or self.failures)


def verdict(facts: Iterable[Fact]) -> Verdict:
    """Judge *facts*, which should begin where the doubt does: at a restore, say."""
    facts = list(facts)
    return Verdict(
        n=next((fact.n for fact in reversed(facts) if isinstance(fact, Tick | Check | Reply)), 0),
        ticks=sum(isinstance(fact, Tick) for fact in facts),
        checks=sum(isinstance(fact, Check) for fact in facts),
        bad=max((fact.bad for fact in facts if isinstance(fact, Tick | Check)), default=0),
        inconsistencies=sum(isinstance(fact, Inconsistency) for fact in facts),
        failures=sum(isinstance(fact, Failure) for fact in facts),
        boots=len({fact.id for fact in facts if isinstance(fact, Boot)}),
    )

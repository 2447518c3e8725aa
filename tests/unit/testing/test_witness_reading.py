"""What the console of a witness is read as, noise and torn lines included."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calotype.testing.witness.reading import (
    Boot,
    Check,
    Failure,
    Inconsistency,
    Ready,
    Reply,
    Tick,
    read,
    verdict,
)

BOOT_ID = "a4f536cf-1409-4ea9-bdcd-22dc4b602844"
HONEST = f"""BOOT id={BOOT_ID}
READY n=0 disks=2 pages=8192
TICK n=1 mono_us=2154214 bad=0
TICK n=22 mono_us=2174301 bad=0
PAUSED n=23
GOING n=23
DIRTY n=24 pages=100
CHECKED n=30 pages=8192 bad=0
"""
FACTS = [
    Boot(BOOT_ID),
    Ready(n=0, disks=2, pages=8192),
    Tick(n=1, mono_us=2154214, bad=0),
    Tick(n=22, mono_us=2174301, bad=0),
    Reply("PAUSED", n=23),
    Reply("GOING", n=23),
    Reply("DIRTY", n=24),
    Check(n=30, pages=8192, bad=0),
]


def test_every_line_of_the_witness_is_a_fact() -> None:
    assert read(HONEST) == FACTS


def test_carriage_returns_and_other_voices_do_not_matter() -> None:
    noisy = "".join(f"[    1.0] a kernel speaks\r\n{line}\r\n" for line in HONEST.splitlines())
    assert read("\x1bc\x00SeaBIOS\n" + noisy) == FACTS


def test_a_disk_that_differs_is_read_in_full() -> None:
    line = "INCONSISTENT n=9 disk=1 slot=8 expected=8 found=3 slots=5"
    assert read(line + "\n") == [
        Inconsistency(line, n=9, disk=1, slot=8, slots=5, expected=8, found=3)
    ]


def test_a_sector_of_someone_else_has_no_number() -> None:
    line = "INCONSISTENT n=9 disk=0 slot=8 expected=8 found=? slots=1"
    assert read(line + "\n") == [Inconsistency(line, n=9, disk=0, slot=8, slots=1, expected=8)]


def test_a_page_that_differs_is_read_in_full() -> None:
    assert read("INCONSISTENT n=9 page=77\n") == [
        Inconsistency("INCONSISTENT n=9 page=77", n=9, page=77)
    ]


@pytest.mark.parametrize("cut", range(1, len("TICK n=22 mono_us=2174301 bad=12")))
def test_a_torn_tick_is_no_fact(cut: int) -> None:
    line = "TICK n=22 mono_us=2174301 bad=12"
    assert read(line[cut:] + "\n") == []
    assert read(line[:cut]) == []


def test_a_number_that_may_go_on_is_no_fact() -> None:
    assert read("CHECKED n=30 pages=8192 bad=0") == []


@pytest.mark.parametrize(
    "text",
    [
        "INCONSISTENT",
        "TICK n=5 mono_INCONSISTENT n=6 disk=0",
        "x INCONSISTENT n=\x00\n",
        "a\nINCONSISTENT",
    ],
)
def test_noise_does_not_hide_an_inconsistency(text: str) -> None:
    assert [type(fact) for fact in read(text)] == [Inconsistency]


@pytest.mark.parametrize(
    "line", ["FAILED n=3 disk=0 errno=5", "Kernel panic - not syncing: Attempted to kill init!"]
)
def test_a_failure_is_told(line: str) -> None:
    assert read(f"[    3.1] {line}\n") == [Failure(line)]
    assert not verdict(read(HONEST + line)).is_consistent


@given(st.text(), st.text())
def test_any_text_is_read_and_judged(before: str, after: str) -> None:
    facts = read(f"{before}\n{HONEST}{after}")
    assert [fact for fact in facts if fact in FACTS] == FACTS
    verdict(facts)


@given(st.integers(min_value=0, max_value=len(HONEST)))
def test_nothing_is_read_in_a_prefix_that_is_not_in_the_whole(cut: int) -> None:
    facts = read(HONEST[:cut])
    assert facts == FACTS[: len(facts)]


def test_the_verdict_counts() -> None:
    found = verdict(read(HONEST))
    assert (found.n, found.ticks, found.checks, found.bad, found.boots) == (30, 2, 1, 0, 1)
    assert found.is_consistent


@pytest.mark.parametrize(
    "text",
    [
        "",
        "READY n=0 disks=2 pages=8192\n",
        "TICK n=22 mono_us=2174301 bad=0\n",
        "TICK n=22 mono_us=1 bad=0\nTICK n=23 mono_us=2 bad=1\n",
        "CHECKED n=30 pages=8192 bad=1\n",
        "CHECKED n=30 pages=8192 bad=0\nINCONSISTENT n=31 page=1\n",
    ],
)
def test_silence_and_differences_are_not_consistency(text: str) -> None:
    assert not verdict(read(text)).is_consistent


def test_one_full_check_testifies() -> None:
    assert verdict(read("CHECKED n=30 pages=8192 bad=0\n")).is_consistent


def test_two_boots_are_counted() -> None:
    assert verdict([Boot("a"), Boot("b"), Boot("a")]).boots == 2

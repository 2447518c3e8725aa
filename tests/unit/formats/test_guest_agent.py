"""What the agent says is cut into answers, whatever it says."""

import json

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from calotype.formats.guest_agent import LONGEST_LINE, Answer, Answers, request, sync


def answers(*heard: bytes, sync_with: int | None = None) -> list[Answer]:
    reader = Answers()
    if sync_with is not None:
        reader.await_sync(sync_with)
    return [answer for each in heard for answer in reader.feed(each)]


def test_a_request_is_one_line() -> None:
    assert request("guest-ping") == b'{"execute":"guest-ping"}\n'
    assert json.loads(request("guest-x", a_b=1)) == {"execute": "guest-x", "arguments": {"a-b": 1}}


def test_the_sync_is_delimited() -> None:
    said = sync(7)
    assert said.startswith(b"\xff")
    assert json.loads(said[1:]) == {"execute": "guest-sync-delimited", "arguments": {"id": 7}}


@given(st.lists(st.integers(1, 30), max_size=8))
def test_lines_are_put_together_from_any_pieces(cuts: list[int]) -> None:
    said = b'{"return": {}}\n{"error": {"class": "x", "desc": "no"}}\n{"return": 3}\n'
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(said[at : at + cut])
        at += cut
    assert answers(*pieces, said[at:]) == [Answer({}), Answer(None, "no"), Answer(3)]


@pytest.mark.parametrize(
    "past",
    [
        b'{"return": 5}\n',
        b'{"return": "frozen"}\n{"return": 2}\n',
        b'{"retu',
        b'\xff{"return": 4}\n',
        b"\xff\xff\xff",
        b'{"error": {"desc": "JSON parse error"}}\n',
    ],
)
def test_what_is_of_the_past_is_passed_over(past: bytes) -> None:
    said = past + b'\xff{"return": 5}\n{"return": "now"}\n'
    assert answers(said, sync_with=5) == [Answer(5), Answer("now")]


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[]", b"null", b"{}", b'{"error": {}}', b'{"error": 1}', b'{"event": "x"}',
     b"\x00\x01\xfe", b'{"return": "\x80"}', b"[" * 100_000, b'{"return":' * 50_000],
)  # fmt: skip
def test_what_is_no_answer_is_passed_over(line: bytes) -> None:
    assert answers(line + b'\n{"return": 1}\n') == [Answer(1)]


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_noise_is_never_an_error(noise: list[bytes]) -> None:
    heard = answers(*noise, b'\n\xff{"return": 123456789}\n', sync_with=123456789)
    assert Answer(123456789) in heard


def test_a_line_that_does_not_end_is_not_kept() -> None:
    reader = Answers()
    for _ in range(3 * LONGEST_LINE // 1000):
        assert reader.feed(b"x" * 1000) == []
        assert len(reader._line) <= LONGEST_LINE
    assert reader.feed(b'\n{"return": 1}\n') == [Answer(1)]


def test_an_error_without_words_is_one_still() -> None:
    (answer,) = answers(msgspec.json.encode({"error": {"desc": ""}}) + b"\n")
    assert answer.error

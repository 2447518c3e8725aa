"""However a stream is cut and whatever is in it, the same documents come out, and nothing else."""

import json
import math
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from calotype.qmp.client import Client, Returned
from calotype.qmp.decoder import QEMU_LIMITS, Decoder, Document, Limits, Malformed
from calotype.qmp.parser import UNDECIDED, parse, strict
from calotype.qmp.server import Answer, Command, Server
from calotype.qmp.unicode import NO_CHARACTER, decoded, encoded, shown
from calotype.qmp.writer import echoed, written
from qmp_corpus import CASES

QUICK = settings(max_examples=300, deadline=None)
SMALL = Limits(document_bytes=200, tokens=40, nesting=6)

TEXTS = st.text(st.characters(exclude_categories=["Cs"])).map(
    lambda text: NO_CHARACTER.sub("", text)
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)
"""What QEMU can hold: no surrogates, no noncharacters, no NaN, integers of 64 bits."""

PARTS = [
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"'", b"\\", b"\n", b"\t", b" ", b"\r", b"\0"),
    *(b"\xff", b"\xfe", b"\xc0\x80", b"\xc3\xa9", b"\xed\xa0\x80", b"\xef\xbf\xbf", b"\x80", b"@"),
    *(b"1", b"0", b"-", b".", b"e", b"0e1", b"1.5e3", b"true", b"nul", b"NaN", b"\\u", b"\\uD83D"),
    *(
        b"\\uDE00",
        b"\\u0000",
        b"\\uFFFE",
        b"\\'",
        b"execute",
        b'"a"',
        b'"a":1',
        b"18446744073709551616",
    ),
    *(b'{"execute": "x"}', b"{'a': [1, {}]}", b'{"a": 1, "a": 2}\n', b"x" * 90),
]
STREAMS = st.lists(st.sampled_from(PARTS), max_size=30).map(b"".join) | st.binary(max_size=60)


def found_in(pieces: list[bytes], limits: Limits = QEMU_LIMITS) -> list[str | bytes]:
    """What a decoder finds: complaints as str, values as they are written, however deep."""
    decoder = Decoder(limits)
    return [
        found.desc if isinstance(found, Malformed) else written(found.value)
        for piece in pieces
        for found in decoder.feed(piece)
    ]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[begin:end] for begin, end in pairwise(ends)]


@QUICK
@given(
    STREAMS, st.lists(st.integers(0, 1 << 16), max_size=8), st.sampled_from([QEMU_LIMITS, SMALL])
)
def test_it_does_not_matter_where_a_stream_is_cut(
    data: bytes, places: list[int], limits: Limits
) -> None:
    whole = found_in([data], limits)
    assert found_in(cut(data, places), limits) == whole
    assert found_in([bytes([byte]) for byte in data], limits) == whole


def test_it_does_not_matter_for_anything_in_the_corpus_either() -> None:
    for case in CASES.values():
        data = b"".join(case.chunks)
        assert found_in([bytes([byte]) for byte in data]) == found_in([data])


@QUICK
@given(st.lists(STREAMS, max_size=5))
def test_no_bytes_are_an_accident_and_little_is_kept(pieces: list[bytes]) -> None:
    decoder, server, client = Decoder(SMALL), Server({"QMP": {"capabilities": []}}), Client()
    for piece in pieces:
        decoder.feed(piece)
        assert decoder.held_bytes <= SMALL.document_bytes + len(piece)
        client.receive(piece)
        for request in server.receive(piece):
            line = request.line if isinstance(request, Answer) else server.answer(request, {})
            assert json.loads(line)
            assert line.endswith(b"\r\n")


@settings(max_examples=1000, deadline=None)
@given(STREAMS.map(lambda data: b"{" + data + b"}") | VALUES.map(written))
@example(b'{"a": 0e1}')
@example(b'{"a": "\\ud800"}')
@example('{"a": "\ufffe"}'.encode())
def test_what_is_read_quickly_is_read_the_same(document: bytes) -> None:
    quickly = strict(document)
    if quickly is UNDECIDED:
        return
    decoder = Decoder()
    decoder.feed(b" [")
    slowly = decoder.feed(document + b"]")
    assert repr(slowly) == repr([Document([quickly])])
    assert repr(parse(document)) == repr(quickly)


@QUICK
@given(STREAMS)
def test_a_decoder_without_the_quick_path_finds_the_same(data: bytes) -> None:
    quickly = found_in([data])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calotype.qmp.decoder.strict", lambda _document: UNDECIDED)
        assert found_in([data]) == quickly


@QUICK
@given(VALUES)
def test_what_is_written_is_read_again_by_us_and_by_python(value: Any) -> None:
    assert repr(parse(written(value))) == repr(value)
    for line in (written(value), echoed(value)):
        assert line.isascii()
        assert b"\n" not in line
        assert json.loads(line) == value


@QUICK
@given(st.dictionaries(TEXTS, VALUES), VALUES)
def test_a_command_and_its_answer_arrive_as_they_were_sent(
    arguments: dict[str, Any], value: Any
) -> None:
    client, server = Client(), Server({"QMP": {"capabilities": []}})
    server.receive(client.send("qmp_capabilities")[1])
    number, line = client.send("x", arguments)
    (command,) = server.receive(line)
    assert isinstance(command, Command)
    assert repr(command.arguments) == repr(arguments)
    (returned,) = client.receive(server.answer(command, value))
    assert isinstance(returned, Returned)
    assert returned.id == number
    assert json.loads(returned.raw) == value


@QUICK
@given(st.integers())
def test_integers_are_as_wide_as_qemus(number: int) -> None:
    fits = -(1 << 63) <= number < 1 << 64
    assert repr(parse(str(number).encode())) == repr(number if fits else float(number))


@QUICK
@given(st.binary(max_size=12).map(lambda text: text.replace(b"\0", b"")))
def test_bytes_are_text_exactly_if_they_are_shown_as_they_are(text: bytes) -> None:
    characters = decoded(text)
    if characters is None:
        assert "\ufffd" in shown(text)
    else:
        assert shown(text) == characters
        assert encoded(characters) == text


@QUICK
@given(STREAMS)
def test_a_document_is_read_or_complained_about(data: bytes) -> None:
    for found in Decoder().feed(data + b"\xff"):
        assert isinstance(found, Document | Malformed)
        if isinstance(found, Document) and isinstance(found.value, float):
            assert not math.isnan(found.value)

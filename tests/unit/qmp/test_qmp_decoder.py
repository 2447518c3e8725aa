"""Where a document ends, what one may be, and what is kept of one that does not end."""

import sys
import tracemalloc

import pytest

from calotype.qmp.decoder import Decoder, Document, Limits, Malformed

TOO_LARGE = Malformed("JSON token size limit exceeded")
TOO_MANY = Malformed("JSON token count limit exceeded")
TOO_DEEP = Malformed("JSON nesting depth limit exceeded")
SMALL = Limits(document_bytes=64, tokens=20, nesting=4)
NEXT = b'\n{"a": 1}\n'


def fed(data: bytes, limits: Limits = SMALL, piece_bytes: int = 1 << 30) -> list[object]:
    decoder = Decoder(limits)
    pieces = (data[at : at + piece_bytes] for at in range(0, len(data), piece_bytes))
    return [found for piece in pieces for found in decoder.feed(piece)]


@pytest.mark.parametrize("piece_bytes", [1, 7, 1000])
@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'{"a": "' + b"x" * 55 + b'"}', Document({"a": "x" * 55})),
        (b'{"a": "' + b"x" * 56 + b'"}', TOO_LARGE),
        (b'{"a": "' + b"x" * 1000, TOO_LARGE),
        (b"[1," + b" " * 1000 + b"2]", TOO_LARGE),
        (b"1" * 64, TOO_LARGE),
        (b" " * 1000 + b"[1]", Document([1])),
        (b"{" + b" " * 62 + b"}", Document({})),
        (b"{" + b" " * 63 + b"}", TOO_LARGE),
        (b"[" + b"1," * 9 + b"1", None),
        (b"[" + b"1," * 9 + b"]", Malformed("JSON parse error, expecting value")),
        (b"[" + b"1," * 9 + b"1]", TOO_MANY),
        (b"[[[[]]]]", Document([[[[]]]])),
        (b"[[[[[", TOO_DEEP),
        (b'{"a":[{"b":[{', TOO_DEEP),
    ],
)
def test_limits_are_kept_however_it_comes(
    data: bytes, found: Document | Malformed | None, piece_bytes: int
) -> None:
    assert fed(data + b"\xff", piece_bytes=piece_bytes)[0] == (
        found or Malformed("JSON parse error, stray '\ufffd'")
    )
    assert fed(data + b"\xff" + NEXT, piece_bytes=piece_bytes)[-1] == Document({"a": 1})


def test_an_object_that_is_one_line_has_the_same_limits() -> None:
    assert fed(b'{"a": [[[[1]]]]}\n') == [TOO_DEEP, *fed(b"1]]]]}\n")]
    assert fed(b'{"a": [' + b"1," * 12 + b"1]}\n")[0] == TOO_MANY


def test_many_brackets_are_not_deep_ones() -> None:
    assert fed(b'{"a": [{}, {}, [], [{}]]}\n') == [Document({"a": [{}, {}, [], [{}]]})]


def test_what_is_too_large_is_passed_over_up_to_what_may_be_a_beginning() -> None:
    assert fed(b'"' + b"x" * 500 + NEXT) == [TOO_LARGE, Document({"a": 1})]


@pytest.mark.parametrize("begin", [b"", b'"', b"'", b"[", b'{"a": "', b"@"])
@pytest.mark.parametrize("endless", [b"x", b" ", b"[ ", b"{'a':", b"[1,", b"1", b"\\", b"\n"])
def test_what_has_no_end_is_not_kept(begin: bytes, endless: bytes) -> None:
    limits = Limits(document_bytes=1 << 14)
    decoder = Decoder(limits)
    chunk = (endless * (1 << 12))[: 1 << 12]
    decoder.feed(begin)
    tracemalloc.start()
    try:
        for _ in range(12):
            decoder.feed(chunk)
            assert decoder.held_bytes <= limits.document_bytes
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bracket", [b"[", b'{"a":', b"{", b"[{"])
def test_a_hundred_thousand_brackets_do_not_recurse(bracket: bytes) -> None:
    found = Decoder().feed(b"{" + bracket * 100_000 + b"\n")
    assert len(found) > 90
    assert isinstance(found[0], Malformed)


def test_nesting_to_qemus_limit_whatever_pythons_is() -> None:
    assert sys.getrecursionlimit() < 1024
    nested = b'{"a":' * 1024 + b"1" + b"}" * 1024
    (found,) = Decoder().feed(nested)
    assert isinstance(found, Document)


def test_a_megabyte_in_small_pieces() -> None:
    data = b'{"a": "' + b"x" * 1_000_000 + b'", "b": [' + b"1, " * 10_000 + b"1]}"
    assert fed(data, Limits(), 1000) == [Document({"a": "x" * 1_000_000, "b": [1] * 10_001})]

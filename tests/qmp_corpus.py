r"""What a client may write to a monitor, hostile things included, and who is asked what it says.

A *case* is what is written after the greeting, in chunks that are written one at a time, and the
mode in which it is written. After it comes `END`: FF makes a monitor forget what had begun, and the
command behind it is answered in every mode, so that everything before it has been answered too.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from calotype.qmp.decoder import QEMU_LIMITS, Limits
from calotype.qmp.server import Answer, Command, Server

Mode = Literal["negotiating", "ready", "oob"]

END_MARK = b"the end of the case"
END = b'\xff\n{"execute": "qmp_capabilities", "id": "%s"}\n' % END_MARK
NEGOTIATION: Mapping[Mode, bytes] = {
    "negotiating": b"",
    "ready": b'{"execute": "qmp_capabilities"}\n',
    "oob": b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}\n',
}


class Case(NamedTuple):
    """What is written, and in which mode."""

    chunks: tuple[bytes, ...]
    mode: Mode = "ready"


def _ready(*chunks: bytes) -> Case:
    return Case(chunks)


def _negotiating(*chunks: bytes) -> Case:
    return Case(chunks, "negotiating")


def _oob(*chunks: bytes) -> Case:
    return Case(chunks, "oob")


def _with_id(told: bytes) -> Case:
    """Ask for an answer that repeats a value: what was read of it, and how it is written."""
    return _ready(b'{"execute": "query-name", "id": ' + told + b"}\n")


NAME = b'{"execute": "query-name"}'

_REQUESTS = {
    "a command": _ready(NAME + b"\n"),
    "without a newline": _ready(NAME),
    "carriage return": _ready(NAME + b"\r\n"),
    "two in one line": _ready(NAME + NAME),
    "two lines at once": _ready(NAME + b"\n" + NAME + b"\n"),
    "over lines": _ready(b'{\n"execute":\n\t"query-name"\r\n}\n'),
    "cut in a key": _ready(b'{"exec', b'ute": "query-name"}'),
    "byte by byte": _ready(*(bytes([byte]) for byte in NAME + b"\n")),
    "after a broken one": _ready(b'{"execute": }\n' + NAME + b"\n"),
    "single quotes": _ready(b"{'execute': 'query-name', 'id': 'it\\'s'}"),
    "mixed quotes": _ready(b"""{'execute': "query-name", "id": '"', 'arguments': {}}"""),
    "unknown": _ready(b'{"execute": "no-such-command", "id": 7}'),
    "empty name": _ready(b'{"execute": ""}'),
    "name with percent": _ready(b'{"execute": "%s%n"}'),
    "name with zero": _ready(b'{"execute": "a\\u0000b"}'),
    "name beyond ASCII": _ready('{"execute": "é😀\x7f"}'.encode()),
    "no execute": _ready(b'{"id": 1}'),
    "no members": _ready(b"{}"),
    "execute is a number": _ready(b'{"execute": 1, "id": "x"}'),
    "execute is null": _ready(b'{"execute": null}'),
    "arguments are a list": _ready(b'{"execute": "query-name", "arguments": []}'),
    "arguments are null": _ready(b'{"execute": "query-name", "arguments": null, "id": []}'),
    "an unexpected member": _ready(b'{"execute": "query-name", "foo": 1, "id": 1}'),
    "unexpected and wrong": _ready(b'{"execute": 1, "foo": 1, "arguments": 2, "bar": 3}'),
    "wrong and unexpected": _ready(b'{"z": 1, "arguments": 2, "execute": 3, "a": 4}'),
    "many unexpected": _ready(b'{"a":1,"b":1,"c":1,"d":1,"e":1,"f":1,"g":1,"h":1,"i":1}'),
    "unexpected beyond ASCII": _ready('{"ü": 1, "\\u0000": 2}'.encode()),
    "same bucket": _ready(b'{"k183": 1, "k245": 1, "k4": 2}'),
    "an array": _ready(b'["execute", "query-name"]\n'),
    "a string": _ready(b'"query-name"\n'),
    "a number": _ready(b"12 "),
    "a number that goes on": _ready(b"12", b"34", b"\n"),
    "true": _ready(b"true\n"),
    "null": _ready(b"null\n"),
    "two scalars": _ready(b"1 2\n"),
    "nothing": _ready(b""),
    "blanks": _ready(b" \t\r\n" * 9),
    "exec-oob where it is not enabled": _ready(b'{"exec-oob": "query-name", "id": 3}'),
    "execute and exec-oob": _ready(b'{"exec-oob": "query-name", "execute": "query-name"}'),
    "negotiated again": _ready(b'{"execute": "qmp_capabilities", "id": 1}'),
    "negotiated again, wrongly": _ready(
        b'{"execute": "qmp_capabilities", "arguments": {"enable": 1}}'
    ),
}
_NEGOTIATING = {
    "too early": _negotiating(b'{"execute": "query-name", "id": 5}'),
    "too early and unknown": _negotiating(b'{"execute": "no-such-command"}'),
    "too early and wrong": _negotiating(b'{"execute": "query-name", "foo": 1}'),
    "too early and broken": _negotiating(b'{"execute": query-name}\n'),
    "early exec-oob": _negotiating(b'{"exec-oob": "query-name"}'),
    "capabilities, then a command": _negotiating(b'{"execute":"qmp_capabilities"}' + NAME),
    "enable nothing": _negotiating(
        b'{"execute": "qmp_capabilities", "arguments": {"enable": []}}' + NAME
    ),
    "enable what is not there": _negotiating(
        b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob", "x"]}, "id": 1}' + NAME
    ),
    "enable a number": _negotiating(
        b'{"execute": "qmp_capabilities", "arguments": {"enable": [1]}, "id": 1}' + NAME
    ),
    "enable is no list": _negotiating(
        b'{"execute": "qmp_capabilities", "arguments": {"enable": "oob"}}' + NAME
    ),
    "enable is null": _negotiating(
        b'{"execute": "qmp_capabilities", "arguments": {"enable": null}}' + NAME
    ),
    "enable oob twice": _negotiating(
        b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob", "oob"]}}' + NAME
    ),
    "an argument too many": _negotiating(
        b'{"execute": "qmp_capabilities", "arguments": {"foo": [1]}, "id": {}}' + NAME
    ),
    "wrong, and one too many": _negotiating(
        b'{"execute": "qmp_capabilities", "arguments": {"foo": 1, "enable": 2}}' + NAME
    ),
    "oob in one write": _negotiating(
        b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}'
        b'{"exec-oob": "query-yank", "id": 1}'
    ),
}
_OUT_OF_BAND = {
    "oob": _oob(b'{"exec-oob": "query-yank", "id": "y"}'),
    "oob unknown": _oob(b'{"exec-oob": "no-such-command", "id": "y"}'),
    "oob name is a number": _oob(b'{"exec-oob": 1, "id": 2}'),
    "oob and in-band": _oob(b'{"exec-oob": "query-yank", "execute": "query-name", "id": 2}'),
    "oob and in-band, wrong": _oob(b'{"exec-oob": 1, "execute": 2, "id": 2}'),
    "oob unexpected": _oob(b'{"exec-oob": "query-yank", "foo": 2, "id": 2}'),
    "oob negotiation": _oob(b'{"exec-oob": "qmp_capabilities", "id": 2}'),
    "oob negotiation, wrong": _oob(
        b'{"exec-oob": "qmp_capabilities", "arguments": {"enable": 1}, "id": 2}'
    ),
    "in-band where oob is enabled": _oob(NAME * 3),
    "no execute where oob is enabled": _oob(b'{"id": 2}'),
}
_IDS = {
    f"id {index}, {told[:40]!r}": _with_id(told)
    for index, told in enumerate((
        b'"x"', b"0", b"-1", b"-0", b"null", b"true", b"false", b"[]", b"{}", b'""',
        b"9223372036854775807", b"9223372036854775808", b"18446744073709551615",
        b"18446744073709551616", b"-9223372036854775808", b"-9223372036854775809",
        b"1" * 300, b"1.0", b"1.5", b"0.1", b"-0.0", b"1e3", b"1E+3", b"12e-3", b"1.5e300",
        b"1e22", b"123456789012345678", b"1e-400", b"3.0e-5", b"0.30000000000000004",
        b'"\\"\\\\\\/\\b\\f\\n\\r\\t\\\'"', b'"\x7f"', b'"\\u007f"', b'"\\u0000"', b'"\xc0\x80"',
        b'"\\u00e9"', '"é"'.encode(), '"😀"'.encode(), b'"\\ud83d\\ude00"', b'"\\uD7FF\\uE000"',
        b"'\"'", b"'a\\\"b'", b'"tab\\tquote\'"', '"\ufffd\u2028"'.encode(),
        b'[1, [2, {"b": 3, "a": [4]}], "five", null, true, 6.5]',
        b'{"b": 1, "a": 2, "c": 3, "return": 4, "error": 5, "id": 6}',
        b'{"k183": 1, "k245": 2, "k4": 3}', b'{"": 1, "\\u0000": 2, "\xc3\xa9": 3}',
        b"[" * 1000 + b"]" * 1000, b'{"a":' * 1000 + b"1" + b"}" * 1000,
        b'"' + b"a" * 5000 + b'"',
    ))
}  # fmt: skip
_BROKEN = {
    f"broken {index}, {told[:40]!r}": _ready(told)
    for index, told in enumerate((
        b"}", b"]", b":", b",", b"{]", b"[}", b"{[}]", b"[{]}", b"{[}", b"[1}", b"[1 2]", b"[1,]",
        b"[,1]", b"{,}", b'{"a"}', b'{"a" 1}', b'{"a":}', b'{"a":1,}', b'{"a":1 "b":2}',
        b'{"a":1:2}', b"{1:2}", b"{null:2}", b"{[1]:2}", b"{{}:2}", b"{a:1}", b"{'a':b}", b"[:]",
        b'{"a":1,"a":2}', b'{"a":1,"a":x}', b'{"a":{"b":1,"b":2}}', b'{"a":1,"\\u0061":2}',
        b"[tru]", b"[nul]", b"[truee]", b"[True]", b"[NaN]", b"[nan]", b"[Infinity]",
        b"[-Infinity]",
        b"[inf]", b"undefined\n", b"[01]", b"[-01]", b"[1.]", b"[.5]", b"[+1]", b"[-]", b"[--1]",
        b"[1e]", b"[1e+]", b"[0e1]", b"[-0e1]", b"[0x10]", b"[1a]", b"[1.5.5]", b"[1.5e3e]",
        b"@\n", b"{@}\n", b'{"execute": @ "query-name"}\n', b"%s\n", b"[%d]\n", b"/* */\n", b"//\n",
        b"\x00", b"\x01", b"\x1f\n", b"\x7f\n", b"\x00\x00\n", b"a\x00b\n", b"\xff", b"\xff\xff",
        b"\xfe", b"\xef\xbb\xbf{}\n", b"\xc3\xa9\n", b"\xed\xa0\x80\n", b"ABC\n", b"aBc\n",
        b'"a\nb"\n', b'"a\tb"\n', b'"\x00"\n', b'"a\x00b"\n', b'"ab', b"'ab", b'{"a": "b', b'"\\',
        b'"\\\n"\n', b'{"a\xff": 1}\n', b'"\xc3\xa9\xff', b'"\xf0\x9f\x98\n', b'"\xe9\xff',
        b'"\xed\xa0\x80\xff', b'"\xf4\x90\x80\x80\xff', b'"\xfc\x80\x80\x80\x80\x80\xff',
        b'"\xc1\x81\xff', b'"\xef\xbf\xbf\xff', b'"\xc0\x80\xff', b'"\x80\x80\xff', b"'\"\n",
        b'"\\x41"\n', b'"\\u12"\n', b'"\\u12G4"\n', b'"\\u"\n', b'"\\uD800"\n', b'"\\uDC00"\n',
        b'"\\uD800x"\n', b'"\\uD800\\n"\n', b'"\\uD800\\uD800"\n', b'"\\uD800\\u12"\n',
        b'"\\uD83F\\uDFFE"\n', b'"\\uFFFE"\n', b'"\\uFFFF"\n', b'"\\uFDD0"\n', b'"\\uFDEF"\n',
        b'"\\a"\n', b'"\\0"\n', b'"\\\xc3\xa9"\n', b'"\\u\xc3\xa9\xc3\xa9"\n',
        b'"\\u1\xc3\xa9\xe2"\n',
        b'"\xc3"\n', b'"\xc3("\n', b'"\xed\xa0\x80"\n', b'"\xef\xbf\xbe"\n',
        b'"\xf4\x90\x80\x80"\n',
        b'"\xc1\x81"\n', b'"\xe0\x80\x80"\n', b'"\xf8\x88\x80\x80\x80"\n', b'"\xfd"\n', b'"\x80"\n',
        b'{"a": "\\x", "b": tru}\n', b'{"a": [1, {"b": "\\ud800"}]}\n', b"a" * 2000 + b"\n",
        b"[" + b"a" * 1100 + b"]", b'["' + "é".encode() * 600 + b'\\q"]',
        b"[" * 1024 + b"]" * 1024, b"[" * 1025 + b"]" * 1025, b"[" * 3000, b"{" * 1025,
        b'{"a":' * 1025, b"[" * 600 + b"{" * 600, b"]" * 50, b"{}" * 50, b"\xff" * 20,
        b"Z" * 300 + b"\n", b"GET / HTTP/1.1\r\nHost: [::1]\r\n\r\n", b"{'execute'; 'stop'}\n",
        b"[" + b"1," * 3000 + b"1]", b"[" + b"1," * 3000 + b"]",
    ))
}  # fmt: skip
_RECOVERY = {
    f"recovery {index}, {told[:40]!r}": _ready(told, NAME)
    for index, told in enumerate((
        b'@ "lost" {', b"@ lost\n", b"@\t\t", b"@,", b"@:", b"@]", b"@}", b"@[", b"@\x01", b"@\xfe",
        b"@ ' ", b'@ " \n', b"{@\n", b'{"a": "\n', b"[1, @, 2]\n", b"@\r", b"{\xff", b"'\xff",
    ))
}  # fmt: skip

CASES: Mapping[str, Case] = {
    **_REQUESTS,
    **_NEGOTIATING,
    **_OUT_OF_BAND,
    **_IDS,
    **_BROKEN,
    **_RECOVERY,
}


class Difference(NamedTuple):
    """Where we do not say what QEMU says, and why."""

    case: Case
    reason: str


DIFFERENT: Mapping[str, Difference] = {
    "an infinite id": Difference(_with_id(b"1e999"), "QEMU writes `inf`, which no client can read"),
    "a long stray token": Difference(
        _ready(b'"' + b"a" * 2000 + b"\n"),
        "QEMU tells all of it: 64 MiB sent are 64 MiB to send, six times as many if no ASCII",
    ),
}
"""What differs only where 64 MiB are written is told in `calotype.qmp.decoder`."""


def answered(greeting: Mapping[str, Any], case: Case, limits: Limits = QEMU_LIMITS) -> list[bytes]:
    """The lines that a session answers *case* with, `END` included."""
    session = Server(greeting, limits)
    session.receive(NEGOTIATION[case.mode])
    written = (*case.chunks, END)
    return b"".join(
        _line(session, request) for chunk in written for request in session.receive(chunk)
    ).splitlines(keepends=True)


def _line(session: Server, request: Command | Answer) -> bytes:
    if isinstance(request, Answer):
        return request.line
    return dispatched(session, request)


_YANK = b'[{"type": "chardev", "id": "compat_monitor0"}]'


def dispatched(session: Server, command: Command) -> bytes:
    """What QEMU says to the few commands that there are."""
    returned = {"query-name": b"{}", "query-yank": _YANK}
    if value := returned.get(command.name):
        return session.answer_raw(command, value)
    desc = f"The command {command.name} has not been found"
    return session.refuse(command, "CommandNotFound", desc)

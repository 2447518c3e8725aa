r"""Secrets in QEMU's command line: found by a table of keys, and told as one fixed word.

What is shown, logged or put into an error never holds a secret; the record keeps the true words,
for its owner alone, since a VM could not be started without them. Only the value goes: which
option it was, and every other key of it, stays legible.

    -object secret,id=s0,data=hunter2       ->  -object secret,id=s0,data=REDACTED
    -drive file=rbd:p/i:id=me:key=AQ==:c=d  ->  -drive file=rbd:p/i:id=me:key=REDACTED:c=d

A key that only *names* a secret (`password-secret`, `key-secret`, `file` of a secret object) is
none. Nothing is parsed that could be refused: a text in no grammar of QEMU's is searched all the
same, since errors about such texts are shown too.

Sources: qapi/crypto.json (secret), ui/spice-core.c, ui/vnc.c, block/iscsi.c, block/rbd.c,
block/curl.c, net/l2tpv3.c, hw/misc/applesmc.c; systemd.system-credentials(7).
"""

import re
from collections.abc import Iterable, Mapping, Sequence

REDACTED = "REDACTED"
"""What is told instead of a secret."""

_EVERYWHERE = (
    "password",  # -iscsi, -spice; -vnc has it as a switch
    "proxy-password",
    "x509-key-password",  # -spice
    "security-password",  # -prom-env
    "cookie",  # -blockdev driver=https
    "rxcookie", "txcookie",  # -netdev l2tpv3
    "osk",  # -device isa-applesmc
)  # fmt: skip
"""Last fragments of keys whose values are secrets, in whatever option."""

_WHERE: Mapping[str, str] = {
    "data": r"\bsecret\b",  # -object secret
    "string": r"opt/(?:io\.systemd\.credentials/|com\.coreos/config|org\.flatcar-linux/config)",
}
"""...and keys that are such only in a value in which this is found: -object, -fw_cfg."""

_SWITCH = r"(?<=[,.]password=)(?:on|off|yes|no|true|false|y|n)(?:,(?!,)|$)"
"""What says no more than that -vnc asks for one."""
_IN_WORDS = r"((?:^|[,.])(?:{keys})=)(?!" + _SWITCH + r")(?:[^,]|,,)*"
_IN_JSON = r"""(["'](?:[\w.-]*\.)?(?:{keys})["']\s*:\s*)(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""

_OTHERS = (
    r"(\b[a-z][a-z0-9+.-]*://[^/@:%\s,\"']*[:%])[^/@\s,\"']+(?=@)",  # scheme://user:SECRET@host
    r"(\brbd:[^,\"']*?:key=)(?:\\.|[^:,\\\"'])+",
    r"(\bio\.systemd\.credential(?:\.binary)?:[^=,]*=)(?:[^,]|,,)*",  # -smbios type=11
    r"(\bproperty=(?:osk|password),value=)(?:[^,]|,,)*",  # -global
)  # fmt: skip
_OF_A_KERNEL = re.compile(
    r"((?:^|\s)[\w.-]*(?:passw(?:or)?d|secret|systemd\.set_credential(?:_binary)?)=)\S+"
)
"""Words of -append that hold one."""


def redacted(argv: Sequence[str]) -> tuple[str, ...]:
    """A command line with each secret in it told as `REDACTED`."""
    options = ["", *(word.lstrip("-") if word.startswith("-") else "" for word in argv)]
    return tuple(redacted_value(*each) for each in zip(options, argv, strict=False))


def redacted_value(option: str, text: str) -> str:
    """The value of an option (its name without dashes, "" if unknown), without its secrets."""
    if option == "append":
        return _OF_A_KERNEL.sub(rf"\1{REDACTED}", text)
    keys = "|".join(_EVERYWHERE + tuple(key for key, at in _WHERE.items() if re.search(at, text)))
    text = re.sub(_IN_JSON.format(keys=keys), rf'\1"{REDACTED}"', text)
    for pattern in (_IN_WORDS.replace("{keys}", keys), *_OTHERS):
        text = re.sub(pattern, rf"\1{REDACTED}", text)
    return text


def redacted_pairs(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """A definition, pairs of an option and its canonical value, without its secrets."""
    return tuple((option, redacted_value(option, text)) for option, text in pairs)


def redacted_log(text: str, argv: Sequence[str]) -> str:
    """What a QEMU said that was started with *argv*: it repeats the argument that it is about."""
    changes = {word: told for word, told in zip(argv, redacted(argv), strict=True) if word != told}
    for word in sorted(changes, key=len, reverse=True):
        text = text.replace(word, changes[word])
    return text

r"""QEMU's option strings: `key=value,...` in its two grammars, JSON, and sizes.

**QemuOpts** (util/qemu-option.c) is a flat list. Keys may repeat and the last one counts:

    options = [ option { "," option } [ "," ] ]
    option  = key "=" value | flag | first            a flag is on; `noflag` is off
    value   = { any character but "," | ",," }        ",," stands for one comma
    first   = value                                   only where an implied key exists

**keyval** (util/keyval.c) is a tree that is written flat. The dots in a key are the path from the
root; a fragment of digits is the index of a list. There are no flags, and the bare first word may
hold neither comma nor "=":

    driver=qcow2,file.driver=file,file.filename=a,,b   {"driver": "qcow2", "file": {...}}
    smp.0=1,smp.1=2                                    {"smp": ["1", "2"]}

Where QEMU reads keyval it mostly reads **JSON** too, told by the first character: "{". Leaves of a
keyval tree are strings, those of JSON have types; `text_of` says how keyval would spell them.

A tree has one more form here, and most code works on it: *flat*, a dict from dotted key to leaf,
which is what `-drive` has by nature. `flatten` and `nest` go back and forth; `nest` is also how a
keyval string becomes a tree, as in QEMU.

**Sizes** (util/cutils.c, do_strtosz) are decimal with an optional fraction and suffix, or
hexadecimal without either. One letter scales by 1024.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from calotype.errors import CommandLineError
from calotype.formats.secrets import redacted_value

_WORD = re.compile(r"([^=,]*)(?:=((?:[^,]|,,)*))?(?:,|\Z)")
_FIRST_OF_OPTS = re.compile(r"(?![^=,]*=)((?:[^,]|,,)*)(?:,|\Z)")
_FIRST_OF_KEYVAL = re.compile(r"(?![^=,]*=)([^=,]+)(?:,|\Z)")

_NAME = r"(?:__[A-Za-z0-9.-]+_)?[A-Za-z][A-Za-z0-9_-]*"
_KEY = re.compile(rf"{_NAME}(?:\.(?:{_NAME}|[0-9]+))*")
_FRAGMENT = re.compile(rf"{_NAME}|[0-9]+")
_MAX_FRAGMENT = 127
_HELP = frozenset({"help", "?"})

_JSON_STRING = re.compile(r'"(?:\\.|[^"\\])*"|\'((?:\\.|[^\'\\])*)\'', re.DOTALL)
_JSON_QUOTE = re.compile(r"(\\.)|\"", re.DOTALL)

_SUFFIXES = "BKMGTPE"
_SIZE = re.compile(rf"0x([0-9a-f]+)|([0-9]+\.?[0-9]*|\.[0-9]+)([{_SUFFIXES}]?)", re.IGNORECASE)
_SIZE_LIMIT = 1 << 64


def parse(text: str, implied: str | None = None) -> tuple[tuple[str, str], ...]:
    """Read a QemuOpts string.

    Args:
        text: Such as `file=a,,b.qcow2,if=virtio`.
        implied: The key of a first word that has none, such as "driver" for `-device`.

    Returns:
        Keys and values in the order written, repetitions included.

    Raises:
        CommandLineError: A key is empty; `position` is the character where it should be.
    """
    pairs, start = [], 0
    if implied and text and (first := _FIRST_OF_OPTS.match(text)):
        pairs.append((implied, _undoubled(first[1])))
        start = first.end()
    for position, key, value in _words(text, start):
        name, meaning = (key, value) if value is not None else _flag(key)
        if not name:
            raise _error(text, position, "a name is missing")
        pairs.append((name, meaning))
    return tuple(pairs)


def unparse(pairs: Iterable[tuple[str, str]]) -> str:
    """Write a QemuOpts or keyval string: no flags, no implied key, commas in values doubled."""
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in pairs)


def parse_nested(text: str, implied: str | None = None) -> dict[str, Any]:
    """Read a keyval string, or JSON if it begins with "{".

    Args:
        text: Such as `driver=qcow2,file.filename=x,,y` or `{"driver": "qcow2"}`.
        implied: The key of a first word that has none; JSON has no such word.

    Returns:
        The tree: dicts, lists and leaves; the leaves are strings unless it was JSON.

    Raises:
        CommandLineError: It is not in the grammar, its keys contradict each other, or it asks for
            help; `position` is the character where that shows.
    """
    if text.startswith("{"):
        return _parse_json(text)
    return nest(_keyvals(text, implied), text)


def unparse_json(tree: Mapping[str, Any]) -> str:
    """Write a tree as the JSON that `-blockdev`, `-device`, `-object` and `-netdev` read."""
    return json.dumps(tree, ensure_ascii=False)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Turn a tree into dotted keys and leaves; an empty dict or list counts as a leaf."""
    if not (isinstance(tree, dict | list) and tree):
        return {prefix: tree} if prefix else {}
    members = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: dict[str, Any] = {}
    for key, member in members:
        flat |= flatten(member, f"{prefix}.{key}" if prefix else str(key))
    return flat


def nest(flat: Mapping[str, Any] | Iterable[tuple[str, Any]], text: str = "") -> dict[str, Any]:
    """Turn dotted keys and leaves into a tree; of leaves with the same key the last one counts.

    Args:
        flat: Dotted keys and their leaves.
        text: What they were read from, for the error.

    Raises:
        CommandLineError: Keys contradict each other, or a list has a gap.
    """
    tree: dict[str, Any] = {}
    for key, leaf in flat.items() if isinstance(flat, Mapping) else flat:
        *path, last = _FRAGMENT.findall(key)
        place = tree
        for fragment in path:
            place = place.setdefault(fragment, {})
            if not isinstance(place, dict):
                raise _error(text or key, text.find(key), f"'{key}' contradicts an earlier key")
        if isinstance(place.get(last), dict):
            raise _error(text or key, text.find(key), f"'{key}' contradicts an earlier key")
        place[last] = leaf
    return {key: _listed(member, key, text) for key, member in tree.items()}


def text_of(leaf: Any) -> str:
    """Spell a leaf as keyval does: on and off for JSON's true and false."""
    if isinstance(leaf, bool):
        return "on" if leaf else "off"
    return "" if leaf is None else str(leaf)


def parse_size(text: str, unit: str = "B") -> int:
    """Read a size.

    Args:
        text: Such as `512`, `1.5G` or `0x1000`.
        unit: The suffix that a plain number is taken to have.

    Returns:
        Bytes, rounded to the nearest.

    Raises:
        CommandLineError: It is no size, or 16 EiB and more.
    """
    if not (match := _SIZE.fullmatch(text)):
        raise _error(text, 0, "not a size")
    hexadecimal, decimal, suffix = match.groups()
    number = Fraction(int(hexadecimal, 16) if hexadecimal else f"0{decimal}")
    scale = 1024 ** _SUFFIXES.index((suffix or unit).upper())
    if scale == 1 and number.denominator != 1:
        raise _error(text, 0, "a fraction of a byte")
    size_bytes = int(number * scale + Fraction(1, 2))
    if size_bytes >= _SIZE_LIMIT:
        raise _error(text, 0, "no machine has so much")
    return size_bytes


def _words(text: str, start: int = 0) -> Iterator[tuple[int, str, str | None]]:
    """Yield position, key and value of each word; a word without "=" has no value."""
    while start < len(text):
        word = _WORD.match(text, start)
        assert word is not None, "the pattern matches any text"
        yield start, word[1], None if word[2] is None else _undoubled(word[2])
        start = word.end()


def _flag(word: str) -> tuple[str, str]:
    return (word[2:], "off") if word.startswith("no") else (word, "on")


def _keyvals(text: str, implied: str | None) -> Iterator[tuple[str, str]]:
    start = 0
    first = _FIRST_OF_KEYVAL.match(text) if implied else None
    if implied and first and first[1] not in _HELP:
        yield implied, first[1]
        start = first.end()
    for position, key, value in _words(text, start):
        if value is None:
            problem = "it asks for help" if key in _HELP else f"'{key}' has no '='"
            raise _error(text, position, problem)
        if not _KEY.fullmatch(key) or max(map(len, _FRAGMENT.findall(key))) > _MAX_FRAGMENT:
            raise _error(text, position, f"'{key}' is not a key")
        yield key, value


def _listed(tree: Any, key: str, text: str) -> Any:
    """Turn the dicts of *tree* whose keys are indexes into lists, depth first."""
    if not isinstance(tree, dict) or not tree:
        return tree
    members = {name: _listed(member, f"{key}.{name}", text) for name, member in tree.items()}
    if not any(name.isdigit() for name in members):
        return members
    if not all(name.isdigit() for name in members):
        raise _error(text or key, text.find(key), f"'{key}' is both a list and an object")
    by_index = {int(name): member for name, member in members.items()}
    for index in range(max(by_index) + 1):
        if index not in by_index:
            raise _error(text or key, text.find(key), f"'{key}.{index}' is missing")
    return [by_index[index] for index in range(len(by_index))]


def _parse_json(text: str) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads(_JSON_STRING.sub(_double_quoted, text))
    except json.JSONDecodeError as error:
        raise _error(text, error.pos, f"not JSON: {error.msg}") from error
    return tree


def _double_quoted(string: re.Match[str]) -> str:
    """QEMU's JSON (qobject/json-lexer.c) also has strings in single quotes."""
    if string[1] is None:
        return string[0]
    inner = _JSON_QUOTE.sub(lambda quote: quote[1] or '\\"', string[1])
    return '"' + inner.replace("\\'", "'") + '"'


def _undoubled(value: str) -> str:
    return value.replace(",,", ",")


def _error(text: str, position: int, problem: str) -> CommandLineError:
    position = max(position, 0)
    told = redacted_value("", text)
    return CommandLineError(
        f"'{told}': {problem}, at character {position + 1}",
        "write it as QEMU's manual shows it",
        text=told,
        position=position,
    )

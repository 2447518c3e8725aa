"""The reference of our QMP commands as Markdown, drawn from their declarations and examples.

Commands come first, then actions and events, then every type that they speak in, in the order in
which a reader meets it. Members that must be there stand before those that need not.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from calotype.qmp.commands import ACTIONS, COMMANDS, EVENTS, JOB_TYPES, UNSERVED
from calotype.qmp.examples import examples
from calotype.qmp.schema import (
    Action,
    Array,
    Builtin,
    Command,
    Enumeration,
    Event,
    Member,
    Object,
    Refusal,
    Shape,
    Variants,
    shape_of,
)
from calotype.qmp.visiting import FAULTS

_WIDTH = 96
_INDENT = 4


def page() -> str:
    """All of it, from the first heading on."""
    return "\n\n".join(
        chain(
            _unserved(),
            ["## Commands"],
            chain.from_iterable(_command(each) for each in COMMANDS.values()),
            ["## Actions of `transaction`"],
            chain.from_iterable(_action(each) for each in ACTIONS.values()),
            ["## Events"],
            chain.from_iterable(_event(each) for each in EVENTS.values()),
            _faults(),
            _jobs(),
            ["## Types"],
            chain.from_iterable(_type(each) for each in _named_types()),
        )
    )


# --- what can be sent, and what comes -------------------------------------------------------------


def _unserved() -> Iterator[str]:
    yield "## Not served yet"
    yield "Declared below, and refused by the service with these words; nothing is changed."
    yield _table(("what", "today"), ((f"`{name}`", told) for name, told in UNSERVED.items()))


def _command(command: Command) -> Iterator[str]:
    arguments = _object(shape_of(command.arguments))
    yield f"### {command.name}"
    yield arguments.doc
    yield _members("argument", arguments.members)
    returned = "" if command.returns is None else f"{_link(shape_of(command.returns))}: "
    yield f"Returns {returned}{command.returns_doc}" if returned else command.returns_doc
    yield from _refusals(command.refusals)
    yield from _examples(command.name)


def _action(action: Action) -> Iterator[str]:
    data = _object(shape_of(action.data))
    yield f"### {action.name}"
    yield data.doc
    yield _members("member of `data`", data.members)
    yield from _refusals(action.refusals)
    yield from _examples(action.name)


def _event(event: Event) -> Iterator[str]:
    yield f"### {event.name}"
    yield event.doc
    yield _members("member of `data`", _object(shape_of(event.data)).members)
    yield from _examples(event.name)


def _object(shape: Shape) -> Object:
    assert isinstance(shape, Object)
    return shape


def _refusals(refusals: Iterable[Refusal]) -> Iterator[str]:
    rows = [(f"`{each.error_class}`", each.when, each.remedy) for each in refusals]
    if rows:
        yield _table(("error", "when", "what to do"), rows)


def _faults() -> Iterator[str]:
    yield "## Errors of arguments"
    yield (
        "Of the class `GenericError`, and in QEMU's words. A member of a member is told by its "
        "path, such as `storage[0].kind`; where an enum has not a value, by its name alone."
    )
    shown = (re.sub(r"{(\w+)}", lambda found: found[1].upper(), each.text) for each in FAULTS)
    rows = zip(shown, (each.meaning for each in FAULTS), strict=True)
    yield _table(("text", "when"), ((f"`{text}`", meaning) for text, meaning in rows))


def _jobs() -> Iterator[str]:
    yield "## Jobs"
    yield (
        "The jobs of these commands are listed by `query-jobs` beside QEMU's own, change their "
        "status with JOB_STATUS_CHANGE, and are ended by `job-cancel` and `job-dismiss`."
    )
    yield _table(("type", "meaning"), ((f"`{name}`", JOB_TYPES[name]) for name in JOB_TYPES))


# --- types ----------------------------------------------------------------------------------------


def _named_types() -> Iterable[Shape]:
    """The types that have a section, each once, in the order in which they are met."""
    returned = [shape_of(each.returns) for each in COMMANDS.values() if each.returns is not None]
    spoken = [
        *(shape_of(each.arguments) for each in COMMANDS.values()),
        *(shape_of(each.data) for each in ACTIONS.values()),
        *(shape_of(each.data) for each in EVENTS.values()),
    ]
    inner = chain.from_iterable(_parts(each) for each in spoken)
    met = chain.from_iterable(_below(each) for each in chain(inner, returned))
    return {each.name: each for each in met}.values()


def _below(shape: Shape) -> Iterator[Shape]:
    """A type, if it has a section, and those that it speaks in."""
    if isinstance(shape, Enumeration | Object | Variants):
        yield shape
    for part in _parts(shape):
        yield from _below(part)


def _parts(shape: Shape) -> Iterator[Shape]:
    match shape:
        case Array():
            yield shape.element
        case Object():
            yield from (member.shape for member in shape.members)
        case Variants():
            yield shape.discriminator.shape
            for branch in shape.branches.values():
                yield from _parts(branch)
        case Builtin() | Enumeration():
            return


def _type(shape: Shape) -> Iterator[str]:
    yield f"### {shape.name}"
    match shape:
        case Enumeration():
            yield shape.doc
            rows = ((f"`{value}`", meaning) for value, meaning in shape.values.items())
            yield _table(("value", "meaning"), rows)
        case Object():
            yield shape.doc
            yield _members("member", shape.members)
        case Variants():
            yield shape.doc
            yield _members("member", (shape.discriminator,))
            yield from _branches(shape)


def _branches(shape: Variants) -> Iterator[str]:
    for value, branch in shape.branches.items():
        yield f"With `{shape.discriminator.name}` being `{value}`: {branch.doc}"
        if branch.members:
            yield _members("member", branch.members)


# --- Markdown -------------------------------------------------------------------------------------


def _members(heading: str, members: Iterable[Member]) -> str:
    ordered = sorted(members, key=lambda each: each.is_optional)
    rows = [(f"`{each.name}`", _kind(each), each.doc) for each in ordered]
    return _table((heading, "type", "meaning"), rows)


def _kind(member: Member) -> str:
    """The type of a member, whether it is optional, and its default."""
    if not member.is_optional:
        return _link(member.shape)
    if member.default in (None, ()):
        return f"{_link(member.shape)}, optional"
    default = f"{member.default:g}" if isinstance(member.default, float) else member.default
    return f"{_link(member.shape)}, default `{str(default).lower()}`"


def _link(shape: Shape) -> str:
    if isinstance(shape, Builtin):
        return shape.name
    if isinstance(shape, Array):
        return f"array of {_link(shape.element)}"
    return f"[{shape.name}](#{shape.name.lower()})"


def _table(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = (f"| {' | '.join(each)} |" for each in (heading, *rows))
    first = next(lines)
    return "\n".join([first, "|" + "---|" * len(heading), *lines])


def _examples(name: str) -> Iterator[str]:
    for each in examples():
        if each.of == name:
            yield from (each.text,) if each.text else ()
            lines = "\n".join(f"{way} {_json(message)}" for way, message in each.lines)
            yield f"```\n{lines}\n```"


def _json(value: Any, depth: int = 1) -> str:
    """A value as JSON, broken into lines where one is too short for it."""
    whole = json.dumps(value, ensure_ascii=False)
    if depth * _INDENT + len(whole) <= _WIDTH or not value or not isinstance(value, list | Mapping):
        return whole
    pad, end = " " * depth * _INDENT, " " * (depth - 1) * _INDENT
    if isinstance(value, Mapping):
        parts = [f"{json.dumps(key)}: {_json(each, depth + 1)}" for key, each in value.items()]
        return "{\n" + ",\n".join(pad + part for part in parts) + "\n" + end + "}"
    return "[\n" + ",\n".join(pad + _json(each, depth + 1) for each in value) + "\n" + end + "]"

"""What `query-qmp-schema` says: our commands, events and types in QEMU's form, merged with QEMU's.

QEMU masks its type names as numbers (`448`), and an array of them as `[448]`; builtin types keep
theirs, and an enum's or object's name means nothing to a client. Ours are the names of the
reference, which no number and no builtin can be. An object without members is one for all, under
the name that QAPI has for it, `q_empty`.

Two things of QEMU's own grow: `transaction` takes our actions, so its union gets branches and the
enum of its discriminator values; and `query-jobs` lists jobs of our types. Both are found by their
way from the command, since their names are numbers that change with each QEMU.

What cannot be said here, as in QEMU: defaults, and that one of two members must be there.

Source: qapi/introspect.json and scripts/qapi/introspect.py of QEMU 10.0.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from calotype.errors import ConflictError
from calotype.qmp.commands import ACTIONS, COMMANDS, EVENTS, JOB_TYPES
from calotype.qmp.schema import (
    Array,
    Builtin,
    Enumeration,
    Member,
    Object,
    Shape,
    Variants,
    shape_of,
)

SchemaInfo = dict[str, Any]

EMPTY = "q_empty"
_JSON_TYPES: Mapping[str, str] = {
    "str": "string",
    "int": "int",
    "number": "number",
    "bool": "boolean",
}


def schema() -> list[SchemaInfo]:
    """Our commands, events and types, and the builtin types that they are made of."""
    return list(_by_name(_ours()).values())


def merged(qemu_schema: Iterable[Mapping[str, Any]]) -> list[SchemaInfo]:
    """QEMU's schema with ours in it; every name that is referenced is there exactly once.

    Args:
        qemu_schema: What QEMU returned to `query-qmp-schema`; it is left as it is.

    Raises:
        ConflictError: QEMU defines something of one of our names itself.
    """
    qemu = _by_name(qemu_schema)
    ours = _by_name(_ours())
    _refuse_rivals({name for name in ours if name in qemu and not _is_predefined(name)})
    actions = _follow(qemu, "transaction", "arg-type", "actions", "element-type")
    _refuse_rivals(ACTIONS.keys() & {each["case"] for each in actions["variants"]})
    action_types = _follow(qemu, actions["name"], "type")
    job_types = _follow(qemu, "query-jobs", "ret-type", "element-type", "type")
    branches = [{"case": name, "type": _wrapper(name)} for name in ACTIONS]
    grown = [
        {**actions, "variants": [*actions["variants"], *branches]},
        _with_values(action_types, ACTIONS),
        _with_values(job_types, JOB_TYPES),
    ]
    return list({**ours, **qemu, **_by_name(grown)}.values())


def _refuse_rivals(names: set[str]) -> None:
    if names:
        raise ConflictError(
            f"this QEMU defines {', '.join(sorted(names))} itself",
            "use a version of Calotype that knows this QEMU",
            names=sorted(names),
        )


def _by_name(entities: Iterable[Mapping[str, Any]]) -> dict[str, SchemaInfo]:
    return {each["name"]: dict(each) for each in entities}


def _is_predefined(name: str) -> bool:
    """Whether it means the same to everyone: a builtin type, or an array of one."""
    return name.strip("[]") in _JSON_TYPES


def _follow(entities: Mapping[str, SchemaInfo], name: str, *way: str) -> SchemaInfo:
    """Where a *way* leads from an entity: each step is one of its members, or says its type."""
    entity = entities[name]
    for step in way:
        members = {each["name"]: each["type"] for each in entity.get("members", ())}
        entity = entities[members.get(step) or entity[step]]
    return entity


def _with_values(enum: SchemaInfo, values: Iterable[str]) -> SchemaInfo:
    new = [value for value in values if value not in enum["values"]]
    members = [*enum["members"], *({"name": value} for value in new)]
    return {**enum, "members": members, "values": [*enum["values"], *new]}


# --- ours, in QEMU's form -------------------------------------------------------------------------


def _ours() -> Iterator[SchemaInfo]:
    yield _object(EMPTY, ())
    for command in COMMANDS.values():
        arguments = shape_of(command.arguments)
        returns = None if command.returns is None else shape_of(command.returns)
        yield {
            "name": command.name,
            "meta-type": "command",
            "arg-type": _name(arguments),
            "ret-type": EMPTY if returns is None else _name(returns),
        }
        yield from _types(arguments)
        yield from () if returns is None else _types(returns)
    for event in EVENTS.values():
        data = shape_of(event.data)
        yield {"name": event.name, "meta-type": "event", "arg-type": _name(data)}
        yield from _types(data)
    for action in ACTIONS.values():
        data = shape_of(action.data)
        member = Member("data", "data", data, "", is_optional=False)
        yield _object(_wrapper(action.name), (member,))
        yield from _types(data)


def _wrapper(action: str) -> str:
    """The name of the type that holds the data of an action."""
    return f"{_name(shape_of(ACTIONS[action].data))}Wrapper"


def _name(shape: Shape) -> str:
    return EMPTY if isinstance(shape, Object) and not shape.members else shape.name


def _types(shape: Shape) -> Iterator[SchemaInfo]:
    """A type and those that it is made of; some of them more than once."""
    match shape:
        case Builtin():
            json_type = _JSON_TYPES[shape.name]
            yield {"name": shape.name, "meta-type": "builtin", "json-type": json_type}
        case Enumeration():
            values = list(shape.values)
            members = [{"name": value} for value in values]
            yield {"name": shape.name, "meta-type": "enum", "members": members, "values": values}
        case Array():
            element = _name(shape.element)
            yield {"name": f"[{element}]", "meta-type": "array", "element-type": element}
            yield from _types(shape.element)
        case Object():
            yield _object(_name(shape), shape.members)
            for member in shape.members:
                yield from _types(member.shape)
        case Variants():
            yield _union(shape)
            yield from _types(shape.discriminator.shape)
            for branch in shape.branches.values():
                yield from _types(branch)


def _object(name: str, members: Iterable[Member]) -> SchemaInfo:
    return {"name": name, "meta-type": "object", "members": [_member(each) for each in members]}


def _union(shape: Variants) -> SchemaInfo:
    branches = shape.branches.items()
    return {
        **_object(shape.name, (shape.discriminator,)),
        "tag": shape.discriminator.name,
        "variants": [{"case": value, "type": _name(branch)} for value, branch in branches],
    }


def _member(member: Member) -> SchemaInfo:
    entry: SchemaInfo = {"name": member.name, "type": _name(member.shape)}
    return {**entry, "default": None} if member.is_optional else entry

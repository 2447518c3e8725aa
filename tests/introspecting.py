"""Whether a value is of a type, as a client would tell that knows nothing but SchemaInfo.

Nothing of ours is used: so it can judge what we serve, by what QEMU says of its own and of ours.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Schema = Mapping[str, Mapping[str, Any]]


def by_name(entities: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    named = {each["name"]: each for each in entities}
    assert len(named) == len(list(entities)), "a name is there twice"
    return named


def referenced(entity: Mapping[str, Any]) -> Iterator[str]:
    """The names that an entity refers to."""
    yield from (entity[key] for key in ("arg-type", "ret-type", "element-type") if key in entity)
    if entity["meta-type"] in ("object", "alternate"):
        yield from (each["type"] for each in entity["members"])
    yield from (each["type"] for each in entity.get("variants", ()))


def conforms(value: Any, name: str, schema: Schema) -> bool:
    """Whether *value* is of the type *name*."""
    entity = schema[name]
    match entity["meta-type"]:
        case "builtin":
            return _is_json(value, entity["json-type"])
        case "enum":
            return isinstance(value, str) and value in {each["name"] for each in entity["members"]}
        case "array":
            items = value if isinstance(value, list) else [None]
            return items is value and all(
                conforms(each, entity["element-type"], schema) for each in items
            )
        case "alternate":
            return any(conforms(value, each["type"], schema) for each in entity["members"])
        case "object":
            return isinstance(value, dict) and _conforms(value, entity, schema)
    raise AssertionError(f"{name} is a {entity['meta-type']}, and no type")


def _conforms(value: dict[str, Any], entity: Mapping[str, Any], schema: Schema) -> bool:
    members = list(entity["members"])
    for each in entity.get("variants", ()):
        if each["case"] == value.get(entity["tag"]):
            members += schema[each["type"]]["members"]
    types = {each["name"]: each["type"] for each in members}
    required = {each["name"] for each in members if "default" not in each}
    return required <= value.keys() <= types.keys() and all(
        conforms(value[each], types[each], schema) for each in value
    )


def _is_json(value: Any, json_type: str) -> bool:
    match json_type:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "int":
            is_number = isinstance(value, int) and not isinstance(value, bool)
            return is_number and -(2**63) <= value < 2**63
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "null":
            return value is None
    assert json_type == "value"
    return True

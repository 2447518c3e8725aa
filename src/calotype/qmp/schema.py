"""How QMP commands, events and their types are declared, and what a declaration says.

A struct type is a `QmpStruct`: its docstring says what it is, each member is
``Annotated[TYPE, Doc("...")]``, and a member with a default is optional. Everything that QAPI has
and Python has not is said by a note in an `Annotated`, where it can be read at run time::

    Colour = Annotated[Literal["red", "blue"], Choices("Colour", "How it looks.", {...})]
    Place = Annotated[Here | There, Branches("Place", "Where it is.", PlaceType, "The kind.")]

`shape_of` reads a declaration into a `Shape`, and three things are made of shapes alone: values
that came in are checked (`visiting.py`), `query-qmp-schema` is answered (`introspection.py`), and
the reference is drawn (`reference.py`). So what is served, refused and documented is one thing.

An optional member that is absent is None here, or its default; JSON's null is never a value, as it
is none in QAPI but for a few alternates.

Source: docs/devel/qapi-code-gen.rst of QEMU, for what can be declared.
"""

from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

from msgspec import NODEFAULT, Struct
from msgspec.structs import FieldInfo, fields

# --- what a declaration is written with -----------------------------------------------------------


class QmpStruct(
    Struct,
    frozen=True,
    kw_only=True,
    rename="kebab",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """The base of all declared structs; an `_` in a member's name is a `-` on the wire."""

    exactly_one: ClassVar[tuple[str, str] | None] = None
    """Two optional members, as the wire has them: one must be there, and not the other."""


class Doc(NamedTuple):
    """What a member means."""

    text: str


class Choices(Struct, frozen=True, eq=False):
    """That a `Literal` is an enum, and what each of its values means."""

    name: str
    doc: str
    values: Mapping[str, str]


class Branches(NamedTuple):
    """That a union of structs is a QAPI union; each struct says its value of the discriminator.

    They say it as msgspec has it: ``tag_field="type", tag="here"``.
    """

    name: str
    doc: str
    discriminator: Any
    """The enum of the discriminator."""
    discriminator_doc: str


class Refusal(NamedTuple):
    """An error that a command can be answered with."""

    when: str
    remedy: str
    error_class: str = "GenericError"


Line = tuple[Literal["->", "<-"], Mapping[str, Any]]
"""What goes to the server or comes from it."""


class Example(NamedTuple):
    """An exchange as it may be seen on the wire."""

    of: str
    """The command, action or event that it shows."""
    text: str
    lines: tuple[Line, ...]


class Command(NamedTuple):
    """A command; what it does is the docstring of its arguments."""

    name: str
    arguments: type[QmpStruct]
    returns: Any
    """The type of what it returns; None where it returns nothing."""
    returns_doc: str
    refusals: tuple[Refusal, ...]


class Action(NamedTuple):
    """An action of `transaction`; what it does is the docstring of its data."""

    name: str
    data: type[QmpStruct]
    refusals: tuple[Refusal, ...]


class Event(NamedTuple):
    """An event, and when it is sent."""

    name: str
    data: type[QmpStruct]
    doc: str


# --- what a declaration says ----------------------------------------------------------------------


class Builtin(NamedTuple):
    """A type that QAPI brings along."""

    name: Literal["str", "int", "number", "bool"]


class Enumeration(NamedTuple):
    """A string that is one of some."""

    name: str
    doc: str
    values: Mapping[str, str]
    """What each value means."""


class Array(NamedTuple):
    """Any number of values of one type."""

    element: "Shape"

    @property
    def name(self) -> str:
        """As QEMU names array types."""
        return f"[{self.element.name}]"


class Member(NamedTuple):
    """A member of an object."""

    name: str
    """As it is spelled on the wire."""
    attribute: str
    shape: "Shape"
    doc: str
    is_optional: bool
    default: Any = None


class Object(NamedTuple):
    """A struct: the type that values are made of, and its members in their order."""

    name: str
    doc: str
    members: tuple[Member, ...]
    kind: type[QmpStruct]


class Variants(NamedTuple):
    """A union: which members there are depends on the value of one that always is."""

    name: str
    doc: str
    discriminator: Member
    branches: Mapping[str, Object]


Shape = Builtin | Enumeration | Array | Object | Variants

_BUILTINS: Mapping[Any, Builtin] = {
    str: Builtin("str"),
    int: Builtin("int"),
    float: Builtin("number"),
    bool: Builtin("bool"),
}


def shape_of(declared: Any) -> Shape:
    """Read a declaration.

    Args:
        declared: A `QmpStruct`, `str`, `int`, `float`, `bool`, ``tuple[X, ...]`` of such, or a
            `Literal` or union with its note.

    Raises:
        TypeError: It is none of these, or a note does not fit what it is about.
    """
    plain, notes = _without_notes(declared)
    for note in notes:
        if isinstance(note, Choices):
            return _enumeration(plain, note)
        if isinstance(note, Branches):
            return _variants(plain, note)
    if plain in _BUILTINS:
        return _BUILTINS[plain]
    if get_origin(plain) is tuple:
        return Array(shape_of(get_args(plain)[0]))
    if isinstance(plain, type) and issubclass(plain, QmpStruct):
        return _object(plain)
    raise TypeError(f"{declared!r} says nothing that QMP could carry")


def _without_notes(declared: Any) -> tuple[Any, list[Any]]:
    """A type without its notes and without None, and the notes."""
    notes: list[Any] = []
    while True:
        if get_origin(declared) is Annotated:
            declared, *more = get_args(declared)
            notes += more
        elif get_origin(declared) in (Union, UnionType) and NoneType in get_args(declared):
            declared = Union[tuple(each for each in get_args(declared) if each is not NoneType)]  # noqa: UP007
        else:
            return declared, notes


def _enumeration(plain: Any, note: Choices) -> Enumeration:
    if set(get_args(plain)) != set(note.values):
        raise TypeError(f"{note.name} is described by other values than it has")
    return Enumeration(note.name, note.doc, note.values)


def _variants(plain: Any, note: Branches) -> Variants:
    structs = {str(each.__struct_config__.tag): each for each in get_args(plain)}
    (name,) = {str(each.__struct_config__.tag_field) for each in structs.values()}
    discriminator = shape_of(note.discriminator)
    if not isinstance(discriminator, Enumeration) or set(discriminator.values) != set(structs):
        raise TypeError(f"{note.name} has other branches than its discriminator has values")
    member = Member(name, name, discriminator, note.discriminator_doc, is_optional=False)
    branches = {value: _object(structs[value]) for value in discriminator.values}
    return Variants(note.name, note.doc, member, branches)


@cache
def _object(kind: type[QmpStruct]) -> Object:
    members = tuple(_member(each) for each in fields(kind))
    if not set(kind.exactly_one or ()) <= {each.name for each in members if each.is_optional}:
        raise TypeError(f"{kind.__name__} has a rule about members that it has not")
    return Object(kind.__name__, _paragraphs(kind.__doc__ or ""), members, kind)


def _member(field: FieldInfo) -> Member:
    doc = next((note.text for note in _without_notes(field.type)[1] if isinstance(note, Doc)), "")
    default = None if field.default is NODEFAULT else field.default
    shape = shape_of(field.type)
    return Member(field.encode_name, field.name, shape, doc, not field.required, default)


def _paragraphs(docstring: str) -> str:
    """The paragraphs of a docstring, each on one line."""
    return "\n\n".join(" ".join(each.split()) for each in docstring.strip().split("\n\n"))

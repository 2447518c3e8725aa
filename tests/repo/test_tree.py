"""The tree keeps its own rules: sizes, names, docstrings, tables that belong together."""

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import get_args

import click
import pytest

from builders import (
    OTHER,
    disk_path,
    make_agent,
    make_disk,
    make_disk_record,
    make_facts,
    make_found,
    make_manifest,
    make_part,
    make_record,
    make_running,
)
from calotype import errors
from calotype.cli.main import COMMANDS, cli
from calotype.engine.abandon_effects import ABANDON_EFFECTS
from calotype.engine.delete_effects import DELETE_EFFECTS
from calotype.engine.effects import EFFECTS
from calotype.errors import FAMILIES, CalotypeError
from calotype.model.vm import Image
from calotype.plan import steps
from calotype.plan.crashes import CRASHES
from calotype.plan.restore import plan_restore
from calotype.plan.restore_plan import RestoreRequest
from calotype.plan.steps import AnyStep, Define, LetRun, RecordStarted, StartQemu, Step
from calotype.plan.take import plan_take
from calotype.plan.take_plan import TakeRequest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
LONGEST_MODULE, LONGEST_FUNCTION = 500, 50
FORBIDDEN_SUFFIXES = ("Manager", "Helper", "Helpers", "Util", "Utils", "Handler")
FORBIDDEN_MODULES = ("common", "helper", "helpers", "misc", "util", "utils")

by_module = pytest.mark.parametrize(
    "path", SOURCES, ids=[str(path.relative_to(ROOT / "src")) for path in SOURCES]
)


# --- modules -------------------------------------------------------------------------------------


def test_there_are_modules_to_look_at() -> None:
    assert len(SOURCES) > 30


@by_module
def test_a_module_opens_with_what_it_is_about(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring.partition("\n")[0].endswith((".", ":"))


@by_module
def test_no_module_is_longer_than_can_be_read_at_once(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_MODULE


@by_module
def test_no_function_is_longer_than_a_page(path: Path) -> None:
    assert [name for name, lines in functions(path) if lines > LONGEST_FUNCTION] == []


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function and its length, docstring included; a command's options are no part of it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


@by_module
def test_names_say_what_a_thing_is(path: Path) -> None:
    classes = [
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert [name for name in classes if name.endswith(FORBIDDEN_SUFFIXES)] == []
    assert path.stem not in FORBIDDEN_MODULES


# --- errors --------------------------------------------------------------------------------------


def families_below(kind: type[CalotypeError]) -> Iterator[type[CalotypeError]]:
    """The classes of *kind*'s module that give an exit code of their own."""
    for each in kind.__subclasses__():
        if each.__module__ == errors.__name__ and "exit_code" in vars(each):
            yield each
        yield from families_below(each)


def test_every_family_is_listed_in_the_order_of_its_exit_code() -> None:
    assert list(FAMILIES) == sorted(families_below(CalotypeError), key=lambda each: each.exit_code)


@pytest.mark.parametrize("attribute", ["exit_code", "family"])
def test_no_two_families_are_told_alike(attribute: str) -> None:
    told = [getattr(family, attribute) for family in (CalotypeError, *FAMILIES)]
    assert len(set(told)) == len(told)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_stands_in_the_tree_with_its_exit_code(family: type[CalotypeError]) -> None:
    row = rf"[├└]── {family.__name__} +{family.exit_code} +\w"
    assert re.search(row, errors.__doc__ or ""), row


def test_the_tree_names_no_error_that_there_is_not() -> None:
    for name in re.findall(r"[├└]── (\w+)", errors.__doc__ or ""):
        assert issubclass(getattr(errors, name), CalotypeError)


NO_REMEDY_NEEDED = {
    "calotype/testing/machine.py": "it tells what the command told, remedy and all",
}
"""Modules whose errors may say only what is wrong, and why."""


@functools.cache
def kinds_of_errors() -> frozenset[str]:
    """The names of all classes of errors of ours, wherever they are defined."""
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    bases = {each.name: {ast.unparse(base) for base in each.bases} for each in classes}
    known = {CalotypeError.__name__}
    while more := {name for name, above in bases.items() if above & known} - known:
        known |= more
    return frozenset(known)


def without_remedy(path: Path, kinds: frozenset[str]) -> Iterator[int]:
    """The lines on which an error of ours is made without a word on what to do."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in kinds):
            continue
        named = [word.value for word in node.keywords if word.arg == "remedy"]
        remedy = node.args[1] if len(node.args) > 1 else next(iter(named), None)
        is_empty = isinstance(remedy, ast.Constant) and not str(remedy.value).strip()
        if remedy is None or is_empty:
            yield node.lineno


@by_module
def test_every_error_says_what_to_do(path: Path) -> None:
    name = str(path.relative_to(ROOT / "src"))
    lines = list(without_remedy(path, kinds_of_errors()))
    assert lines == [] or name in NO_REMEDY_NEEDED


def test_an_error_without_a_remedy_would_be_found(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "raise StoreError('a')\nraise errors.StoreError('a', '')\nCommandRefused('a', remedy=' ')\n"
        "raise StoreError('a', 'b')\nStoreError(problem, error.remedy)\nraise ValueError('a')\n"
    )
    assert list(without_remedy(source, kinds_of_errors())) == [1, 2, 3]


LACKS_ITS_NAME = re.compile(
    r"`calotype (console|forget|list|logs|restore|show|start|stop)( -\S+)*`"
)
OPEN_COMMAND = re.compile(r"`calotype [^`]*$")


def bad_suggestions(path: Path) -> Iterator[str]:
    """Commands in the texts of a module that lack the VM, or name it without quoting it."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield from (found[0] for found in LACKS_ITS_NAME.finditer(node.value))
        if isinstance(node, ast.JoinedStr):
            for text, value in pairwise(node.values):
                is_open = isinstance(text, ast.Constant) and OPEN_COMMAND.search(str(text.value))
                if is_open and "shlex." not in ast.unparse(value):
                    yield ast.unparse(value)


@by_module
def test_a_suggested_command_can_be_typed_as_it_stands(path: Path) -> None:
    name = str(path.relative_to(ROOT / "src"))
    assert list(bad_suggestions(path)) == [], name


def test_a_suggested_command_that_cannot_be_typed_would_be_found(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        '"""`calotype logs` prints."""\na = \'see `calotype logs --qemu`\'\n'
        "b = f'`calotype stop {name}`'\nc = f'`calotype stop {shlex.quote(name)}`: {other}'\n"
        "d = '`calotype logs NAME --qemu`, `calotype ps`'\n"
    )
    assert list(bad_suggestions(source)) == ["`calotype logs --qemu`", "{name}"]


def rows(page: str) -> list[list[str]]:
    """The cells of each row of the tables on a page."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_on_the_page_on_exit_codes_with_its_meaning(
    family: type[CalotypeError],
) -> None:
    table = rows((ROOT / "docs" / "exit-codes.md").read_text())
    assert table[0][:3] == ["code", "family", "meaning"]
    (row,) = (row for row in table if row[0] == str(family.exit_code))
    assert row[1] == family.family
    assert row[2]


def test_the_page_on_exit_codes_names_no_family_that_there_is_not() -> None:
    table = rows((ROOT / "docs" / "exit-codes.md").read_text())
    told = {(row[0], row[1]) for row in table[2:] if row[1]}
    known = {(str(each.exit_code), each.family) for each in FAMILIES}
    known.add((str(CalotypeError.exit_code), CalotypeError.family))
    assert told <= known


# --- commands ------------------------------------------------------------------------------------


def test_every_module_of_a_command_is_a_command() -> None:
    folder = ROOT / "src" / "calotype" / "cli"
    assert {path.name.removesuffix("_cmd.py") for path in folder.glob("*_cmd.py")} == set(COMMANDS)


def sections(page: str) -> dict[str, str]:
    """What stands below each heading `## calotype NAME`."""
    headed = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    return {head: text for head, _, text in (part.partition("\n") for part in headed)}


def test_the_commands_are_described_in_their_order_and_no_other() -> None:
    described = [
        head.removeprefix("calotype ")
        for head in sections((ROOT / "docs" / "commands.md").read_text())
        if head.startswith("calotype ")
    ]
    assert described == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_described_below_its_heading_and_no_other(name: str) -> None:
    section = sections((ROOT / "docs" / "commands.md").read_text())[f"calotype {name}"]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    options = {word for each in command.params for word in each.opts if word.startswith("-")}
    table = [row for row in rows(section) if row[0].startswith("-")]
    described = {word for row in table for word in re.findall(r"(?<![\w-])--?\w[\w-]*", row[0])}
    assert described == options
    assert all(row[1] for row in table)


# --- steps and what they do ----------------------------------------------------------------------


def step_kinds() -> set[type[Step]]:
    return {
        each
        for each in vars(steps).values()
        if isinstance(each, type) and issubclass(each, Step) and each is not Step
    }


def taken() -> set[type[Step]]:
    """What the plans of a take are made of, over every kind and method."""
    facts = make_facts([make_disk(0), make_disk(1)], agent=make_agent())
    record = make_record([make_disk_record(0), make_disk_record(1)])
    requests = [
        TakeRequest(machine_state, method, disks={"disk1": kind}, quiesce=True)
        for machine_state in ("external", "none")
        for method in ("live", "paused")
        for kind in ("external", "internal", "skip")
    ]
    plans = [plan_take(facts, record, request, OTHER) for request in requests]
    return {type(step) for plan in plans for step in plan.steps}


def restored() -> set[type[Step]]:
    """What the plans of a restore are made of, over every kind, place and run state."""
    parts = [make_part(0), make_part(1, "internal"), make_part(2, "internal"), make_part(3, "skip")]
    manifest = make_manifest(parts)
    moved_on = Image(f"{disk_path(1)}.{OTHER}.qcow2", "qcow2")
    disks = [make_disk_record(0), make_disk_record(1, active=moved_on)]
    record = make_record([*disks, make_disk_record(2), make_disk_record(3)])
    found = make_found(manifest, record, agent=make_agent())
    plans = [
        plan_restore(manifest, record, found, request, OTHER, running)
        for run_state in ("running", "paused")
        for discard in (True, False)
        for request in (
            RestoreRequest(run_state, discard, keep_current=not discard, sync_time=True),
        )
        for running in (None, make_running())
    ]
    return {type(step) for plan in plans for step in plan.steps}


STARTED: set[type[Step]] = {Define, StartQemu, RecordStarted, LetRun}
"""What a start is made of (`lifecycle._start`)."""


def test_every_kind_of_step_has_an_effect() -> None:
    assert step_kinds() == EFFECTS.keys() | ABANDON_EFFECTS.keys()


def test_every_kind_of_step_says_what_a_crash_after_it_leaves() -> None:
    assert step_kinds() == CRASHES.keys()


def test_every_effect_is_one_of_a_step_that_is_planned() -> None:
    assert EFFECTS.keys() == taken() | restored() | STARTED | DELETE_EFFECTS.keys()


def test_a_step_of_a_delete_is_never_undone() -> None:
    assert [effect.revert for effect in DELETE_EFFECTS.values()] == [None] * len(DELETE_EFFECTS)


def test_a_journal_can_hold_every_kind_of_step() -> None:
    assert step_kinds() == set(get_args(AnyStep))


# --- what git keeps ------------------------------------------------------------------------------

HOSTS = tuple(
    ".".join(labels)
    for labels in (
        ("deb", "debian", "org"),
        ("pypi", "org"),
        ("files", "pythonhosted"),
        ("registry", "npmjs"),
    )
)
EVERYWHERE = {Path(f"/{name}") for name in ("", "home", "opt", "root", "srv", "tmp", "usr", "vm")}
"""Folders that every machine has, or that stand for one in the tests."""


@pytest.fixture(scope="module")
def tracked() -> dict[str, bytes]:
    """What git keeps, by path."""
    if not (ROOT / ".git").exists():
        pytest.skip("this tree is not under git")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    names = [name for name in listed.split("\0") if (ROOT / name).is_file()]
    assert "pyproject.toml" in names
    return {name: (ROOT / name).read_bytes() for name in names}


def naming(word: str, tracked: dict[str, bytes]) -> list[str]:
    """The files in which *word* stands by itself."""
    pattern = re.compile(rb"(?<![\w.-])" + re.escape(word.encode()) + rb"(?![\w-])")
    return [name for name, content in tracked.items() if pattern.search(content)]


def test_nothing_that_is_kept_says_where_the_tree_lies(tracked: dict[str, bytes]) -> None:
    assert naming(str(ROOT), tracked) == []
    if ROOT.parent not in EVERYWHERE:
        assert naming(str(ROOT.parent), tracked) == []


@pytest.mark.parametrize("host", HOSTS)
def test_nothing_that_is_kept_says_where_its_packages_come_from(
    host: str, tracked: dict[str, bytes]
) -> None:
    assert [name for name, content in tracked.items() if host.encode() in content] == []

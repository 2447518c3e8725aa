"""The docs say what is: each family, command, option, link and table is compared with the code."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from calotype.cli.main import COMMANDS, cli
from calotype.errors import FAMILIES
from calotype.model.snapshot import Manifest

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
CONTEXT = click.Context(cli)


def page(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_under_its_heading(name: str) -> None:
    command = cli.get_command(CONTEXT, name)
    assert command is not None
    section = page("docs/commands.md").split(f"\n## calotype {name}\n")[1].split("\n## ")[0]
    options = [each for each in command.params if isinstance(each, click.Option)]
    assert {word for option in options for word in option.opts} <= set(
        re.findall(r"`(-[\w-]+)`", section)
    )


def test_every_family_has_its_row() -> None:
    rows = re.findall(r"^\| (\d+) \| ([a-z-]+) \|", page("docs/exit-codes.md"), re.MULTILINE)
    assert {(str(family.exit_code), family.family) for family in FAMILIES} <= set(rows)


def test_the_tables_of_the_window_are_those_of_the_code() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "draw-window")]
    drawn = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    assert page("docs/consistency.md").endswith(drawn.rstrip("\n") + "\n")


def test_the_table_of_crashes_is_that_of_the_code() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "draw-crashes")]
    drawn = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    assert page("docs/internals.md").endswith(drawn)


def test_the_table_of_kinds_is_that_of_the_code() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "draw-kinds")]
    drawn = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    assert page("docs/kinds.md").endswith(drawn)


def test_every_member_of_a_manifest_is_described() -> None:
    described = set(re.findall(r"`(\w+)`", page("docs/store.md").split("format 1")[1]))
    assert set(Manifest.__struct_fields__) <= described


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_commands_in_the_readme_exist_with_their_options() -> None:
    lines = re.findall(r"^    \$ calotype (\w+)(.*)$", page("README.md"), re.MULTILINE)
    assert len(lines) >= 6
    for name, rest in lines:
        command = cli.get_command(CONTEXT, name)
        assert command is not None, name
        known = {word for each in command.params for word in each.opts}
        own = rest.split(" -- ")[0]
        assert set(re.findall(r"(?<= )--[\w-]+", own)) <= known, own

"""The docs say what is: each family, command, option, link and table is compared with the code."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from calotype.cli.main import cli
from calotype.errors import FAMILIES
from calotype.model.snapshot import Manifest

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CONTEXT = click.Context(cli)


def page(name: str) -> str:
    return (ROOT / name).read_text()


def test_every_family_has_its_row() -> None:
    rows = re.findall(r"^\| (\d+) \| ([a-z-]+) \|", page("docs/exit-codes.md"), re.MULTILINE)
    assert {(str(family.exit_code), family.family) for family in FAMILIES} <= set(rows)


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("draw-window", "docs/consistency.md"),
        ("draw-crashes", "docs/internals.md"),
        ("draw-kinds", "docs/kinds.md"),
        ("draw-commands", "docs/commands.md"),
        ("draw-man", "man/calotype.1"),
        ("draw-qmp", "docs/qmp.md"),
    ],
)
def test_what_is_drawn_from_the_code_is_that_of_the_code(script: str, name: str) -> None:
    """Run the script and put what it prints in the place of what is there, if this fails."""
    command = [sys.executable, str(ROOT / "scripts" / script)]
    drawn = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert page(name).endswith(drawn.rstrip("\n") + "\n")


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

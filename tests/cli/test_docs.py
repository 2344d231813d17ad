"""The pages are true where a program can tell: options, links, the length of the README."""

import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

from meshserve.cli.bench.options import bench_options
from meshserve.cli.main import _COMMANDS
from meshserve.cli.options import mesh_options
from meshserve.cli.run import run

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING, DOCS = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
MAX_README_LINES = 150

OPTION = re.compile(r"--[a-z][a-z-]*")
CODE = re.compile(r"^```.*?^```$|^ {4}.*?$|``?[^`\n]+``?", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def section(page: Path, title: str) -> str:
    """What stands under this heading, up to the next one of the same rank."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{page.name} has no section {title!r}"
    return found[1]


def rows(text: str) -> dict[str, str]:
    """The rows of the section's tables: the first cell, and the rest."""
    cells = [line.strip("| ").partition(" | ")[::2] for line in text.splitlines() if line.startswith("| ")]
    return dict(cells)


def documented(text: str) -> list[str]:
    """The options that are the subjects of the tables' rows."""
    return sorted(option for cell in rows(text) for option in OPTION.findall(cell))


def names(parameters: Iterable[click.Parameter]) -> set[str]:
    return {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("--")}


def common() -> set[str]:
    return names(click.command()(mesh_options(lambda **settings: None)).params)


def own(command: str) -> set[str]:
    """The options of a command that others do not share."""
    found: click.Command = getattr(import_module(_COMMANDS[command]), command)
    return names(found.params) - common()


def test_each_option_of_run_is_documented_and_no_other() -> None:
    assert documented(section(DOCS / "commands.md", "Options of `run`")) == sorted(names(run.params) - common())


def test_each_common_option_is_documented_and_no_other() -> None:
    assert documented(section(DOCS / "commands.md", "Common options")) == sorted(common())


def test_each_option_of_bench_is_documented_and_no_other() -> None:
    params = click.command()(bench_options(lambda **settings: None)).params
    assert documented(section(DOCS / "measuring.md", "Options")) == sorted(names(params))


@pytest.mark.parametrize("command", sorted(_COMMANDS.keys() - {"run", "bench", "key"}))
def test_each_option_of_another_command_is_documented_and_no_other(command: str) -> None:
    told = set(OPTION.findall(rows(section(DOCS / "commands.md", "Options of other commands"))[f"`{command}`"]))
    assert told == own(command)


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The files that a page links to, each with the heading that is meant, if one is; no code, and nothing on the web."""
    for target in LINK.findall(CODE.sub("", page.read_text())):
        if "://" not in target:
            path, _, heading = target.partition("#")
            yield ((page.parent / path).resolve() if path else page), heading


def anchor(heading: str) -> str:
    """As the usual hosts of repositories make it: lower case, dashes for spaces, no other marks."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", [README, CONTRIBUTING, *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_each_link_of_a_page_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    for target, heading in links(page):
        assert target.exists(), f"{target} is not there"
        if heading:
            assert heading in map(anchor, HEADING.findall(target.read_text())), f"{target.name} has no heading {heading}"


def test_each_page_is_reached_from_the_readme_over_other_pages() -> None:
    reached, waiting = {README}, [README]
    while waiting:
        new = {target for target, _ in links(waiting.pop()) if target in PAGES} - reached
        reached |= new
        waiting += new
    assert set(PAGES) <= reached, f"not reached: {sorted(path.name for path in set(PAGES) - reached)}"


def test_the_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= MAX_README_LINES and max(map(len, lines)) <= 120

"""The documentation against the code: links, scenarios, commands and Python blocks of every page, and the site.

Every Python block must compile. `<!-- test: run -->` before it runs the block in its own process.
"""

from __future__ import annotations

import ast
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import pytest
import typer
import yaml

from lightcl.errors import RequestError
from lightcl.scenario import Scenario, bundled_scenarios, find_scenario, load_scenario, scenario_keys
from simulations.sweeps.description import load_description
from simulations.sweeps.grid import make_sweep

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```\s*$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
MARK = re.compile(r"<!-- test: (\w+) -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    mark: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        mark = MARK.search(text[: found.start()])
        code = re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        line = text[: found.start()].count("\n") + 1
        yield Block(str(page.relative_to(ROOT)), line, found["language"], code, mark[1] if mark else None)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub and MkDocs make from the page's headings (they agree on plain ones)."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue  # the network is not asked
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{target}: there is no such file"
        assert not anchor or anchor in anchors_of(file), f"{target}: {file.name} has no such heading"


def _scenarios() -> list[Block]:
    found = []
    for block in BLOCKS:
        if block.language == "yaml":
            values = yaml.safe_load(block.text)
            if isinstance(values, dict) and values.keys() & set(Scenario.model_fields):
                found.append(block)
    return found


@pytest.mark.parametrize("block", _scenarios(), ids=str)
def test_scenarios_in_the_text_are_valid(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "scenario.yaml"
    file.write_text(block.text, encoding="utf-8")
    load_scenario(file)


SWEEPS = [b for b in BLOCKS if b.language == "yaml" and list(yaml.safe_load(b.text)) == ["sweep"]]


@pytest.mark.parametrize("block", SWEEPS, ids=str)
def test_sweeps_in_the_text_can_be_planned(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(block.text, encoding="utf-8")
    description = load_description(file)
    assert description.scenario is not None
    assert make_sweep(description, find_scenario(Path(description.scenario)), [], tmp_path).cells


def test_every_yaml_block_is_checked() -> None:
    assert len(_scenarios()) + len(SWEEPS) == sum(block.language == "yaml" for block in BLOCKS) > 3


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of every `lightcl ...` command of a shell block."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";")), len(words))
            command, words = words[:end], words[end + 1 :]
            command = command[: command.index(">")] if ">" in command else command
            if command and command[0] == "lightcl":
                yield command[1:]


OF_PLUGINS = re.compile(
    r"""unknown (method "hold-head"|network "(small-cnn|resnet10)")|is '(stripes|halves)': unknown"""
)
"""Names that the plugins of the pages register, which the test does not load."""
COMMANDS = [
    (f"{block}: {shlex.join(words)}", words)
    for block in BLOCKS
    if block.language in ("console", "bash")
    for words in commands_of(block.text)
]


@cache
def program() -> click.Command:
    from simulations.main import app

    return typer.main.get_command(app)


def parse(words: list[str]) -> click.Context:
    """The context of the innermost command with its parameters parsed; nothing is run."""
    command, name, context = program(), "lightcl", None
    while True:
        context = command.make_context(name, list(words), parent=context)
        if not hasattr(command, "resolve_command"):
            return context
        left = [*getattr(context, "_protected_args", ()), *context.args]  # Click keeps them apart
        if not left:
            return context
        found, inner, words = command.resolve_command(context, left)
        assert found is not None
        assert inner is not None
        command, name = inner, found


@pytest.mark.parametrize("words", [words for _, words in COMMANDS], ids=[title for title, _ in COMMANDS])
def test_commands_in_the_text_exist_with_these_options(words: list[str], tmp_path: Path) -> None:
    try:
        context = parse(words)
    except click.exceptions.Exit:
        return  # --version, --help
    changes = context.params.get("changes") or [word for option, word in itertools.pairwise(words) if option == "--set"]
    if changes:
        named = [word for word in words if word in bundled_scenarios()]
        file = tmp_path / "empty.yaml"
        file.write_text("name: empty\n", encoding="utf-8")
        try:
            load_scenario(Path(named[0]) if named else file, changes)
        except RequestError as error:
            if not OF_PLUGINS.search(str(error)):
                raise


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 40
    with pytest.raises(click.UsageError, match="No such option"):
        parse(["simulate", "quickstart", "--no-such-option"])
    with pytest.raises(click.UsageError, match="No such command"):
        parse(["no-such-command"])


def test_every_command_of_the_program_is_on_the_reference_page() -> None:
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    group = program()
    assert isinstance(group, click.Group)
    with click.Context(group) as context:
        names = group.list_commands(context)
    missing = [name for name in names if f"`lightcl {name}" not in page]
    assert not missing, f"not on docs/reference/command-line.md: {missing}"


PYTHON = [block for block in BLOCKS if block.language == "python"]


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=str(block), marks=[pytest.mark.ray] if "run_fleet" in block.text else [])
        for block in PYTHON
    ],
)
def test_python_blocks_compile_and_run_where_they_say_so(block: Block, tmp_path: Path) -> None:
    ast.parse(block.text)
    assert block.mark in (None, "run"), f"{block}: unknown mark {block.mark!r}"
    if block.mark == "run":
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", block.text], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_the_table_of_keys_is_the_one_that_the_code_prints() -> None:
    table = (ROOT / "docs" / "reference" / "scenario-keys.md").read_text(encoding="utf-8")
    assert table == scenario_keys(), "run: lightcl schema --markdown > docs/reference/scenario-keys.md"


def test_pages_that_code_and_help_texts_name_exist() -> None:
    folders = ("lightcl", "client", "server", "simulations", "benchmarks", "examples", "tests")
    files = [file for folder in folders for kind in ("*.py", "*.yaml", "*.j2") for file in (ROOT / folder).rglob(kind)]
    for file in files:
        for page in re.findall(r"\bdocs/[\w./-]+\.md\b", file.read_text(encoding="utf-8")):
            assert (ROOT / page).is_file(), f"{file.relative_to(ROOT)} names {page}"


def test_bundled_scenarios_open_with_description_command_cost_and_result() -> None:
    for name, file in bundled_scenarios().items():
        about, command, cost, result = file.read_text(encoding="utf-8").splitlines()[:4]
        assert re.fullmatch(r"# [A-Z].+", about)
        assert re.fullmatch(rf"# Command: lightcl (simulate|train) {name}", command)
        assert cost.startswith("# Cost: ")
        assert result.startswith("# Result: ")


def test_results_pages_have_the_same_headings() -> None:
    for page in (ROOT / "docs" / "results").glob("*.md"):
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert headings == ["Question", "Setup", "Command", "Result", "Limits"], page


def _navigation(entries: object) -> Iterator[str]:
    for entry in entries if isinstance(entries, list) else []:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else _navigation(value)


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(_navigation(yaml.safe_load(text)["nav"]))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages <= listed, "not in the navigation of mkdocs.yml"
    assert listed <= pages, "entries of the navigation without a page"


def test_the_site_builds_without_warnings_and_without_the_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "overview.svg" in page
    loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]+(?:src|href)="(https?:[^"]+)"', page)
    assert loaded == [], "the site loads files from the network"

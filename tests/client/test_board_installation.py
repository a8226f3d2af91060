"""`deploy/board-requirements.txt`: what is installed on a board by `deploy/install-board.sh`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.board_installation.sitecustomize import required, without_extras

CHECKOUT = Path(__file__).resolve().parents[2]
LEFT_OUT = {"alembic", "pathspec", "prompt-toolkit", "sqlalchemy", "tomli", "uv"}
"""Of Flower's: its server's database, and what `flwr` on the command line needs."""


def needed_by(lines: list[str]) -> dict[str, Requirement]:
    return {one.name: one for one in without_extras(lines)}


def within(inner: SpecifierSet, outer: SpecifierSet) -> bool:
    """Whether each limit of `outer` stands in `inner`, or a narrower one of the same kind does."""

    def limit(kind: str, among: SpecifierSet) -> list[Version]:
        return [Version(one.version) for one in among if one.operator == kind]

    lowest, highest = limit(">=", inner), limit("<", inner)
    return all(lowest and max(lowest) >= low for low in limit(">=", outer)) and all(
        highest and min(highest) <= high for high in limit("<", outer)
    )


def test_limits_are_told_apart() -> None:
    assert within(SpecifierSet(">=2,<3"), SpecifierSet(">=1.5"))
    assert not within(SpecifierSet(">=1"), SpecifierSet(">=1.5"))
    assert not within(SpecifierSet(">=2"), SpecifierSet(">=1.5,<4"))


def test_it_has_what_the_project_needs() -> None:
    listed = {one.name: one.specifier for one in required()}
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    needed = needed_by(project["dependencies"])
    assert set(needed) - set(listed) == {"flwr", "torch"}, "installed by deploy/install-board.sh itself"
    assert [n for n in listed if n in needed and not within(listed[n], needed[n].specifier)] == []
    script = (CHECKOUT / "deploy" / "install-board.sh").read_text()
    (flower,) = re.findall("'(flwr.*?)'", script)
    assert Requirement(flower).specifier == needed["flwr"].specifier


def test_it_has_what_flower_needs_on_a_board() -> None:
    listed = {one.name: one.specifier for one in required()}
    needed = needed_by(requires("flwr") or [])
    assert set(needed) - set(listed) == LEFT_OUT
    assert [n for n in listed if n in needed and not within(listed[n], needed[n].specifier)] == []


PROGRAM = """
import importlib, pkgutil
import client, client.board, client.commands, lightcl
for package in (client, client.board, client.commands):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
import simulations.main
try:
    import sqlalchemy
except ModuleNotFoundError:
    print("a board has no database")
"""


def test_a_board_imports_nothing_else() -> None:
    path = os.pathsep.join([str(CHECKOUT / "tests" / "board_installation"), str(CHECKOUT)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "a board has no database\n"), done.stderr

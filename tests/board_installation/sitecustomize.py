"""Python imports this at its start where this folder is on its path. A process then finds only what a board has.

Those are the packages of `deploy/board-requirements.txt` with what they require, PyTorch, and Flower and the project
without what they require. `BOARD_EXTRA` names more, separated by spaces.
"""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = Path(__file__).resolve().parents[2] / "deploy" / "board-requirements.txt"
WITHOUT_WHAT_THEY_REQUIRE = {"flwr", "lightcl-fleet"}


def required() -> list[Requirement]:
    lines = REQUIREMENTS.read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def without_extras(lines: Iterable[str]) -> list[Requirement]:
    """The requirements that a plain installation has on this machine."""
    found = map(Requirement, lines)
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def installed() -> set[str]:
    """The distributions on a board, by their normalized names."""
    found = set(WITHOUT_WHAT_THEY_REQUIRE)
    open_ones = [*required(), Requirement("torch"), *map(Requirement, os.environ.get("BOARD_EXTRA", "").split())]
    while open_ones:
        name = canonicalize_name(open_ones.pop().name)
        if name in found:
            continue
        found.add(name)
        with suppress(PackageNotFoundError):
            open_ones += without_extras(requires(name) or [])
    return found


class NotOnABoard(MetaPathFinder):
    def __init__(self) -> None:
        there = installed()
        self.absent = {
            module
            for module, distributions in packages_distributions().items()
            if not any(canonicalize_name(name) in there for name in distributions)
        }

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name.partition(".")[0] in self.absent:
            raise ModuleNotFoundError(f"No module named {name!r} (a board does not have it)", name=name)


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, NotOnABoard())

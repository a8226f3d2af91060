"""What both ends of a simulation must agree on: Flower's task identity, and the project's source code."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import lightcl

PACKAGES = ("lightcl", "client", "simulations.runtime")


def assume_identity() -> None:
    """Lets this process create Flower Messages outside of Flower's own runtimes, which do the same.

    flwr 1.41 has no public way; hence the pinned version and this single place.
    """
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0


def code_folder() -> str:
    """Where this process has the project's source files from."""
    return str(Path(lightcl.__path__[0]).parent)


def code_digest() -> str:
    """Changes with every source file that a device's numbers or the messages depend on."""
    found = hashlib.sha256()
    for package in PACKAGES:
        spec = find_spec(package)
        for folder in sorted(spec.submodule_search_locations or []) if spec else []:
            for file in sorted([*Path(folder).rglob("*.py"), *Path(folder).rglob("*.[ch]")]):
                found.update(str(file.relative_to(folder)).encode())
                found.update(file.read_bytes())
    return found.hexdigest()[:16]

"""A scenario under another method, for comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from lightcl.methods.base import METHODS
from lightcl.scenario.model import Scenario


def as_method(scenario: Scenario, name: str) -> Scenario:
    """The scenario under another method: with that method's defaults, and all other keys that it can work with.

    A freeze point belongs to the way a method works, so it is kept only among methods with the same default;
    `resets` lists the keys that were not kept. Under its own method the scenario stays as it is. Raises RequestError
    for a method that does not exist.
    """
    if name == scenario.method.name:
        return scenario
    method = METHODS.find(name)()
    values = scenario.model_dump() | {"method": method.model_dump()}
    if method.default_freeze != scenario.method.default_freeze:
        values["network"] |= {"freeze": None, "frozen_batch_norm": None}
    if not method.shareable:
        values["server"] |= {"aggregation": "none"}
    if "cil" not in method.settings and scenario.stream.settings == "til+cil":
        values["stream"] |= {"settings": "auto"}
    return Scenario.model_validate(values)


def resets(scenario: Scenario, names: Sequence[str]) -> list[str]:
    """The keys that `as_method` cannot keep for these methods, one line per key."""
    lines = []
    for section, key in (
        ("network", "freeze"), ("network", "frozen_batch_norm"), ("server", "aggregation"), ("stream", "settings"),
    ):  # fmt: skip
        given = getattr(getattr(scenario, section), key)
        found = {name: getattr(getattr(as_method(scenario, name), section), key) for name in names}
        other = [name for name, value in found.items() if value != given]
        if other:
            instead = "the method's own" if section == "network" else found[other[0]]
            lines.append(f"{section}.{key} is {instead}, not {given}, for {', '.join(other)}")
    return lines

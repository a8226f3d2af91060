"""What several commands ask of the options they are given, and how they word numbers."""

from __future__ import annotations

from collections.abc import Sequence

from lightcl.errors import RequestError, nearest
from lightcl.scenario import Scenario, method_names


def check_device(number: int, scenario: Scenario) -> None:
    """Raises RequestError for a device that the fleet does not have."""
    count = scenario.fleet.devices
    if number >= count:
        raise RequestError(f"--device {number}: the fleet has {amount(count, 'device')} (allowed: 0 to {count - 1})")


def methods_named(text: str) -> list[str]:
    """`sgd,lightcl` -> the methods, each once. Raises RequestError for one that there is not."""
    known = method_names()
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise RequestError(
                f"--methods: unknown method {name!r}{nearest(name, known)} (allowed: {', '.join(known)})"
            )
    return list(dict.fromkeys(names))


def amount(number: int, one: str, more: str = "") -> str:
    """`1 task`, `2 tasks`; `more` is the plural where it is not made with an s."""
    return f"{number} {one if number == 1 else more or one + 's'}"


def number_ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as `0–3, 7`; after a dozen pieces the rest is only counted."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and number == pieces[-1][-1] + 1:
            pieces[-1] = [pieces[-1][0], number]
        else:
            pieces.append([number])
    shown = ", ".join("–".join(map(str, piece)) for piece in pieces[:12])
    return shown if len(pieces) <= 12 else f"{shown} … ({len(numbers)} in all)"

"""The cells of a sweep: points (named variants x grid), each with every seed and every device.

A point with another method keeps the scenario's keys that this method supports (`as_method`): the keys of the other
method's section are left out, and `Sweep.resets` lists what else was reset.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightcl.errors import RequestError, nearest
from lightcl.scenario import Scenario, load_scenario, method_names
from lightcl.scenario.variants import as_method
from lightcl.scenario.yaml_text import parse
from simulations.options import check_device
from simulations.sweeps.description import SweepDescription

RESETTABLE = ("network.freeze", "network.frozen_batch_norm", "server.aggregation", "stream.settings")
"""Keys whose value a method may not support (see `as_method`)."""
LONGEST_NAME = 100
"""Characters of a cell's name, which is the name of its folder and files."""


@dataclass(frozen=True)
class Point:
    """One combination of keys. `changes` are `KEY=VALUE` texts over the sweep's scenario file."""

    variant: str
    """Name of the variant; empty where the sweep has none."""
    setting: str
    """The grid's values as text; empty where the sweep has no grid."""
    changes: tuple[str, ...]
    resets: tuple[str, ...] = ()
    """The part of `changes` that the point's method made necessary."""

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.variant, self.setting))) or "scenario"


@dataclass(frozen=True)
class Cell:
    """One run: a point with a seed, on the whole fleet or on one device."""

    point: Point
    seed: int
    device: int | None
    """None: the whole fleet."""
    scenario: Scenario

    @property
    def name(self) -> str:
        """The name of the cell's run folder, scenario and log."""
        device = "" if self.device is None else f"-device-{self.device}"
        return f"{folder_name(self.point.label)}-seed-{self.seed}{device}"

    @property
    def title(self) -> str:
        device = "" if self.device is None else f", device {self.device}"
        return f"{self.point.label}, seed {self.seed}{device}"


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep, in order, and its folder."""

    description: SweepDescription
    scenario: Scenario
    """The scenario without the changes of a point."""
    cells: tuple[Cell, ...]
    folder: Path

    @cached_property
    def points(self) -> list[Point]:
        return list(dict.fromkeys(cell.point for cell in self.cells))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(cell.seed for cell in self.cells))

    @property
    def devices(self) -> list[int]:
        """Devices that are trained alone; none where the whole fleet is simulated."""
        return list(dict.fromkeys(cell.device for cell in self.cells if cell.device is not None))

    def baseline_of(self, point: Point) -> Point:
        """The point that this one is compared with: the baseline variant under the same values of the grid.

        Without variants it is the first point of all.
        """
        wanted = self.description.baseline or self.points[0].variant
        same = [other for other in self.points if other.setting == point.setting and other.variant]
        by_label = [other for other in self.points if other.label == wanted]
        return next((other for other in same if other.variant == wanted), (by_label or same or self.points)[0])

    def of(self, point: Point) -> list[Cell]:
        """The point's cells, seed by seed."""
        return [cell for cell in self.cells if cell.point == point]

    def run_folder(self, cell: Cell) -> Path:
        return self.folder / "runs" / cell.name

    @property
    def resets(self) -> list[str]:
        """The keys that the points' methods do not support as given, one line per key and value."""
        lines = []
        for key in RESETTABLE:
            by_value: dict[str, list[str]] = {}
            for point in self.points:
                for change in point.resets:
                    if change.startswith(f"{key}="):
                        by_value.setdefault(change.partition("=")[2], []).append(point.label)
            for value, labels in by_value.items():
                shown = "the method's own" if value == "null" else json.loads(value)
                section, _, name = key.partition(".")
                given = getattr(getattr(self.scenario, section), name)
                lines.append(f"{key} is {shown} instead of {given} for {', '.join(labels)}")
        return lines


def make_sweep(
    description: SweepDescription, file: Path, changes: Sequence[str], folder: Path, only: Sequence[str] = ()
) -> Sweep:
    """All cells of a sweep over the scenario in `file`; `only` limits it to these variants.

    Raises RequestError for a key, a value or a combination that the scenario refuses; it names the cell.
    """
    base_changes = [*_texts(description.set), *changes]
    base = load_scenario(file, base_changes)
    variants = _variants(description, only)
    _check_grid(description.grid)
    points = [
        _point(name, setting, values, base_changes, base)
        for name, setting, values in _combinations(variants, description.grid)
    ]
    names = list(dict.fromkeys(name for point in points for name in (point.variant, point.label) if name))
    if description.baseline is not None and description.baseline not in names and not only:
        raise RequestError(
            f"sweep.baseline {description.baseline!r}: no variant or point has this name (allowed: {', '.join(names)})"
        )
    for device in description.devices:
        check_device(device, base)
    devices: list[int | None] = [*description.devices]
    if not devices:
        devices = [0] if base.fleet.devices == 1 and "fleet.devices" not in description.grid else [None]
    # Seed by seed, so that a sweep that is stopped early has every point of the first seeds.
    cells = [
        Cell(point, seed, device, _scenario_of(point, seed, file))
        for seed in _seeds(description, base)
        for point in points
        for device in devices
    ]
    return Sweep(description, base, tuple(cells), folder)


def parse_grid(text: str) -> tuple[str, list[Any]]:
    """`KEY=V1,V2` -> the key and its values (YAML). Raises RequestError."""
    key, equals, values = text.partition("=")
    if not equals or not all(key.split(".")):
        raise RequestError(f"--grid {text}: expected KEY=VALUE,VALUE,..., for instance training.epochs=5,30")
    try:
        _, found = parse(f"[{values}]", f"--grid {key}")
    except ValueError as error:
        raise RequestError(f"--grid {key}: {values!r} is not a list of YAML values ({error})") from error
    return key, list(found)


def parse_seeds(text: str) -> list[int] | int:
    """`5` -> five seeds from the scenario's on; `0,1,2` or `7,` -> these seeds. Raises RequestError."""
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    if not pieces or not all(piece.isdecimal() for piece in pieces):
        raise RequestError(f"--seeds {text}: expected how many (5) or which (0,1,2; a single one with a comma: 7,)")
    numbers = [int(piece) for piece in pieces]
    return numbers if "," in text else numbers[0]


def folder_name(label: str) -> str:
    """A label as a file name; one that has to be changed or shortened gets a digest, so that names stay distinct."""
    plain = re.sub(r"[^A-Za-z0-9._=]+", "-", label).strip("-.").replace("=", "-")
    if plain == label.replace("=", "-") and len(plain) <= LONGEST_NAME and "=" not in label:
        return plain
    return f"{plain[: LONGEST_NAME - 7]}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"


def _variants(description: SweepDescription, only: Sequence[str]) -> dict[str, dict[str, Any]]:
    known = method_names()
    methods = known if description.methods == "all" else list(description.methods)
    for method in methods:
        if method not in known:
            raise RequestError(
                f"sweep.methods: unknown method {method!r}{nearest(method, known)} (allowed: {', '.join(known)})"
            )
    variants = {name: {"method.name": name} for name in methods} | description.variants
    for name in only:
        if name not in variants:
            raise RequestError(
                f"--only: unknown variant {name!r}{nearest(name, variants)} (allowed: {', '.join(variants) or 'none'})"
            )
    return {name: variants[name] for name in only} if only else variants


def _check_grid(grid: Mapping[str, Sequence[Any]]) -> None:
    for key, values in grid.items():
        if key == "seed":
            raise RequestError("--grid seed: the seeds of a sweep are given by --seeds")
        texts = [json.dumps(value) for value in values]
        if not texts:
            raise RequestError(f"--grid {key}: no values")
        if len(set(texts)) < len(texts):
            raise RequestError(f"--grid {key}: a value is given twice ({', '.join(texts)})")


def _combinations(
    variants: Mapping[str, Mapping[str, Any]], grid: Mapping[str, Sequence[Any]]
) -> list[tuple[str, str, dict[str, Any]]]:
    """Every variant with every combination of the grid's values: variant, the values as text, all keys."""
    found = []
    for values in itertools.product(*grid.values()):
        keys = dict(zip(grid, values, strict=True))
        setting = ", ".join(_label(key, value) for key, value in keys.items())
        for name, changes in variants.items() or [("", {})]:
            twice = set(changes) & set(keys)
            if twice:
                raise RequestError(f"sweep: {min(twice)} is set by variant {name!r} and by the grid; choose one")
            found.append((name, setting, {**changes, **keys}))
    return found


def _label(key: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if key == "method.name" else f"{key}={text}"


def _texts(values: Mapping[str, Any]) -> list[str]:
    """`KEY=VALUE` as `--set` takes it; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _point(variant: str, setting: str, values: Mapping[str, Any], base_changes: Sequence[str], base: Scenario) -> Point:
    method = values.get("method.name", base.method.name)
    own = _texts(values)
    if method == base.method.name or method not in method_names():  # an unknown one is refused with the scenario
        return Point(variant, setting, (*base_changes, *own))
    adapted = as_method(base, method)
    resets = []
    for key in RESETTABLE:
        section, _, name = key.partition(".")
        given, found = (getattr(getattr(scenario, section), name) for scenario in (base, adapted))
        if given != found and key not in values:
            resets.append(f"{key}={json.dumps(found)}")
    # The base's method section applies to the base's method alone.
    kept = [change for change in base_changes if not change.startswith(("method.", "method="))]
    return Point(variant, setting, (*kept, *resets, *own), tuple(resets))


def _scenario_of(point: Point, seed: int, file: Path) -> Scenario:
    try:
        return load_scenario(file, [*point.changes, f"seed={seed}"])
    except RequestError as error:
        raise RequestError(f"cell {point.label!r}: {error}") from error


def _seeds(description: SweepDescription, base: Scenario) -> list[int]:
    given = description.seeds if description.seeds is not None else 1
    seeds = list(range(base.seed, base.seed + given)) if isinstance(given, int) else given
    if not seeds:
        raise RequestError(f"--seeds {given}: at least one seed is needed")
    if len(set(seeds)) < len(seeds):
        raise RequestError(f"--seeds: a seed is given twice ({', '.join(map(str, seeds))})")
    return seeds

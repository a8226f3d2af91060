"""The cells of a sweep: points (named variants x axes x grid), each with every seed and every device.

A point with another method keeps the scenario's keys that this method supports (`as_method`): the keys of the other
method's section are left out, and `Sweep.resets` lists what else was reset.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightcl.errors import RequestError, nearest
from lightcl.scenario import Scenario, load_scenario, method_names
from lightcl.scenario.variants import as_method
from lightcl.scenario.yaml_text import parse
from simulations.options import check_device
from simulations.sweeps.description import VARIANT, SweepDescription

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
    axes: tuple[tuple[str, str], ...] = ()
    """The point's value on each axis, by the axis' name."""

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.variant, *(value for _, value in self.axes), self.setting))) or "scenario"


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
    skipped: tuple[str, ...] = ()
    """The points that are left out and why, one line per rule of `skip`."""

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
        """The point that this one is compared with: the baseline variant under the same values of axes and grid, or the
        point with the baseline's values on its axes and the same ones otherwise.

        Without variants it is the first point of all. A point whose baseline is not run is compared with itself.
        """
        wanted = self.description.baseline or self.points[0].variant
        if isinstance(wanted, dict):
            place = _place(point.variant, point.axes) | wanted
            at_place = [p for p in self.points if p.setting == point.setting and _place(p.variant, p.axes) == place]
            return (at_place or [point])[0]
        same = [p for p in self.points if (p.setting, p.axes) == (point.setting, point.axes) and p.variant]
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
    """All cells of a sweep over the scenario in `file`; `only` limits it to these variants and values of axes.

    Raises RequestError for a key, a value or a combination that the scenario refuses; it names the cell.
    """
    base_changes = [*_texts(description.set), *changes]
    base = load_scenario(file, base_changes)
    axes = _axes(description)
    _check_axes(description, axes)
    _check_grid(description.grid)
    left_out: dict[str, list[str]] = {}
    points = []
    for combination in _combinations(_limited(axes, only), description.grid):
        point = _point(combination, base_changes, base)
        place = _place(point.variant, point.axes)
        rules = (rule for rule in description.skip if all(place.get(a) in names for a, names in rule.where.items()))
        if rule := next(rules, None):
            left_out.setdefault(rule.reason, []).append(point.label)
        else:
            points.append(point)
    if not points:
        raise RequestError(f"sweep.skip leaves nothing to run ({'; '.join(left_out)})")
    names = list(dict.fromkeys(name for point in points for name in (point.variant, point.label) if name))
    if isinstance(description.baseline, str) and description.baseline not in names and not only:
        raise RequestError(
            f"sweep.baseline {description.baseline!r}: no variant or point has this name (allowed: {_quoted(names)})"
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
    skipped = tuple(f"{reason}: {'; '.join(labels)}" for reason, labels in left_out.items())
    return Sweep(description, base, tuple(cells), folder, skipped)


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


Axes = dict[str, dict[str, dict[str, Any]]]
"""By an axis' name: its values, named sets of keys. The variants are the first axis."""


def _axes(description: SweepDescription) -> Axes:
    """The variants and the axes; an axis `variant` without a value where the sweep has no variants."""
    known = method_names()
    methods = known if description.methods == "all" else list(description.methods)
    for method in methods:
        if method not in known:
            raise RequestError(
                f"sweep.methods: unknown method {method!r}{nearest(method, known)} (allowed: {', '.join(known)})"
            )
    variants = {name: {"method.name": name} for name in methods} | description.variants
    return {VARIANT: variants} | description.axes


def _limited(axes: Axes, only: Sequence[str]) -> Axes:
    """The axes with the values that `--only` names; an axis of which it names none stays as it is."""
    known = list(dict.fromkeys(name for values in axes.values() for name in values))
    chosen = {_the_one(name, known) for name in only}
    return {
        axis: {name: keys for name, keys in values.items() if name in chosen} or values for axis, values in axes.items()
    }


def _the_one(given: str, known: Sequence[str]) -> str:
    """The known name that `given` is or that alone begins with it, upper and lower case apart only where needed."""
    small = given.casefold()
    same = [name for name in known if name == given] or [name for name in known if name.casefold() == small]
    found = same or [name for name in known if name.casefold().startswith(small)]
    if len(found) == 1:
        return found[0]
    if found:
        raise RequestError(f"--only: {given!r} may be {' or '.join(map(repr, found))}; write more of the name")
    raise RequestError(f"--only: unknown variant {given!r}{nearest(given, known)} (allowed: {_quoted(known)})")


def _quoted(names: Iterable[str]) -> str:
    """A list of names, which may hold commas."""
    return ", ".join(map(repr, names)) or "none"


def _check_axes(description: SweepDescription, axes: Axes) -> None:
    """Raises RequestError for an axis without values, and for names in `skip` and `baseline` that do not exist."""
    if VARIANT in description.axes:
        raise RequestError(f"sweep.axes.{VARIANT}: the values of this axis stand under sweep.variants")
    for axis, named_sets in description.axes.items():
        if not named_sets:
            raise RequestError(f"sweep.axes.{axis}: no values")
    named = [(f"sweep.skip[{i}].where", rule.where) for i, rule in enumerate(description.skip)]
    if isinstance(description.baseline, dict):
        named.append(("sweep.baseline", {axis: [value] for axis, value in description.baseline.items()}))
    for key, where in named:
        for axis, values in where.items():
            if axis not in axes:
                raise RequestError(f"{key}.{axis}: no such axis{nearest(axis, axes)} (allowed: {', '.join(axes)})")
            for value in values:
                if value not in axes[axis]:
                    known = list(axes[axis])
                    raise RequestError(
                        f"{key}.{axis}: {value!r} is not on this axis{nearest(value, known)} "
                        f"(allowed: {_quoted(known)})"
                    )


def _place(variant: str, axes: Sequence[tuple[str, str]]) -> dict[str, str]:
    """A point's value on every axis, the variants included."""
    return {VARIANT: variant} | dict(axes)


def _check_grid(grid: Mapping[str, Sequence[Any]]) -> None:
    for key, values in grid.items():
        if key == "seed":
            raise RequestError("--grid seed: the seeds of a sweep are given by --seeds")
        texts = [json.dumps(value) for value in values]
        if not texts:
            raise RequestError(f"--grid {key}: no values")
        if len(set(texts)) < len(texts):
            raise RequestError(f"--grid {key}: a value is given twice ({', '.join(texts)})")


@dataclass(frozen=True)
class Combination:
    """A point before the scenario is looked at."""

    variant: str
    axes: tuple[tuple[str, str], ...]
    setting: str
    """The grid's values as text."""
    keys: Mapping[str, Any]


def _combinations(axes: Axes, grid: Mapping[str, Sequence[Any]]) -> list[Combination]:
    """Every combination of variants, values on axes and values of the grid. Raises RequestError for a key set twice."""
    variants = axes[VARIANT] or {"": {}}
    others = {axis: values for axis, values in axes.items() if axis != VARIANT}
    found = []
    for values in itertools.product(*grid.values()):
        given = dict(zip(grid, values, strict=True))
        setting = ", ".join(_label(key, value) for key, value in given.items())
        for names in itertools.product(*others.values()):
            for variant, changes in variants.items():
                place = tuple(zip(others, names, strict=True))
                keys: dict[str, Any] = dict(changes)
                setters = dict.fromkeys(keys, f"variant {variant!r}")
                for by, more in [*((f"{a} {n!r}", others[a][n]) for a, n in place), ("the grid", given)]:
                    if twice := set(keys) & set(more):
                        key = min(twice)
                        raise RequestError(f"sweep: {key} is set by {setters[key]} and by {by}; choose one")
                    keys |= more
                    setters |= dict.fromkeys(more, by)
                found.append(Combination(variant, place, setting, keys))
    return found


def _label(key: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if key == "method.name" else f"{key}={text}"


def _texts(values: Mapping[str, Any]) -> list[str]:
    """`KEY=VALUE` as `--set` takes it; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _point(combination: Combination, base_changes: Sequence[str], base: Scenario) -> Point:
    variant, setting, axes, values = combination.variant, combination.setting, combination.axes, combination.keys
    method = values.get("method.name", base.method.name)
    own = _texts(values)
    if method == base.method.name or method not in method_names():  # an unknown one is refused with the scenario
        return Point(variant, setting, (*base_changes, *own), axes=axes)
    adapted = as_method(base, method)
    resets = []
    for key in RESETTABLE:
        section, _, name = key.partition(".")
        given, found = (getattr(getattr(scenario, section), name) for scenario in (base, adapted))
        if given != found and key not in values:
            resets.append(f"{key}={json.dumps(found)}")
    # The base's method section applies to the base's method alone.
    kept = [change for change in base_changes if not change.startswith(("method.", "method="))]
    return Point(variant, setting, (*kept, *resets, *own), tuple(resets), axes)


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

"""What a sweep runs, as read from a YAML file: scenario, named variants, grid, seeds, devices.

    sweep:
      scenario: cifar10-10-devices      # a file or a bundled scenario
      set: {training.epochs: 5}         # changes for every cell
      methods: [sgd, lightcl]           # or all: each with its own defaults
      variants:                         # named sets of keys
        LightCL, β = 0: {method.beta: 0}
      axes:                             # like grid, but each value is a named set of keys
        partition:
          iid: {fleet.partition: iid}
          Dirichlet 0.1: {fleet.partition: dirichlet, fleet.alpha: 0.1}
      skip:                             # combinations that make no sense
        - {where: {variant: [SGD], partition: [iid]}, reason: why not}
      grid: {server.aggregation: [none, suffix], training.epochs: [5, 30]}
      seeds: [0, 1, 2]
      devices: []                       # empty: the whole fleet, with Flower
      footprint: true                   # count FLOPs and memory, and measure memory
      baseline: SGD                     # paired differences are taken from this variant, or, as
                                        # {partition: iid}, from the point that differs on this axis only

Every key may be left out. Presets are such files; `aggregation`, `demo`, `methods` and `table1` are in `presets/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from lightcl.errors import RequestError, nearest
from lightcl.scenario.yaml_text import parse
from lightcl.section import Section

Spread = Literal["standard-error", "standard-deviation", "interval"]
VARIANT = "variant"
"""The name of the variants where they are an axis among others."""


class Skip(Section):
    """Combinations that are left out."""

    where: dict[str, list[str]] = Field(min_length=1)
    """Names by axis (`variant` for the variants); a point is left out where all of its names are listed."""
    reason: str = Field(min_length=1)
    """Said where the sweep is planned and in its summary."""


class SweepDescription(Section):
    """The section `sweep` of a sweep file."""

    scenario: str | None = None
    set: dict[str, Any] = Field(default={})
    """Changes that apply to every cell."""
    methods: Literal["all"] | list[str] = Field(default=[])
    """Methods side by side; short for one variant per method that sets `method.name`."""
    variants: dict[str, dict[str, Any]] = Field(default={})
    """Named sets of keys."""
    axes: dict[str, dict[str, dict[str, Any]]] = Field(default={})
    """By an axis' name its values, which are named sets of keys; every combination is one point."""
    skip: list[Skip] = Field(default=[])
    """Combinations of variants and axes that make no sense."""
    grid: dict[str, list[Any]] = Field(default={})
    """Values of each key; every combination is one point."""
    seeds: list[int] | int | None = None
    """A list, or the number of seeds from the scenario's own; default: 1."""
    devices: list[int] = Field(default=[])
    """Devices to train alone, without Flower; empty: the whole fleet."""
    footprint: bool = False
    """Count FLOPs and memory of every point, and measure memory in fresh processes."""
    spread: Spread = "standard-error"
    """What the summary prints after ± (over the seeds); interval: half of the 95 % interval of Student's t."""
    baseline: str | dict[str, str] | None = None
    """The variant or point that the others are compared with, or by axis the value that replaces the point's own;
    default: the first variant."""


def presets() -> dict[str, Path]:
    """The sweep files that ship with the package, by name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}


def find_preset(name: str) -> Path:
    """A sweep file, or the bundled preset of that name. Raises RequestError."""
    known = presets()
    file = known.get(name, Path(name))
    if not file.is_file():
        raise RequestError(
            f"--preset: there is no preset or file {name!r}{nearest(name, known)} (presets: {', '.join(known)})"
        )
    return file


def is_sweep_file(file: Path) -> bool:
    """Whether a YAML file describes a sweep and not a scenario; False where it cannot be read."""
    try:
        _, values = parse(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError, ValueError, RequestError):
        return False
    return isinstance(values, dict) and "sweep" in values


def load_description(file: Path) -> SweepDescription:
    """Reads a sweep file. Raises RequestError that names the file and the key."""
    try:
        _, values = parse(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except ValueError as error:
        raise RequestError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(values, dict) or set(values) != {"sweep"} or not isinstance(values["sweep"], dict):
        raise RequestError(f"{file}: a sweep file has one section, sweep: with the keys {', '.join(_keys())}")
    try:
        return SweepDescription.model_validate(values["sweep"])
    except ValidationError as error:
        raise RequestError("\n".join(_explain(problem, file) for problem in error.errors())) from error


def _keys() -> list[str]:
    return list(SweepDescription.model_fields)


def _explain(problem: Any, file: Path) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys()
        return f"{file}: sweep.{key}: unknown key{nearest(key, known)} (allowed here: {', '.join(known)})"
    return f"{file}: sweep.{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem.get('input')!r}"

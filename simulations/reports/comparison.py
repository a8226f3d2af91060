"""Runs side by side: groups, differences, warnings, pictures, and one self-contained HTML page.

A group holds runs that differ only in seed or device. Figures of a group are means over its observations, one per
device and seed. Two groups are compared by pairs of the same device and seed. Where such pairs are not comparable
(different partition, seeds or devices), the difference is that of two independent samples, and a warning says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

from lightcl.analysis.footprint.shapes import MIB
from lightcl.scenario import Scenario
from lightcl.storage.files import write_atomically
from simulations.options import number_ranges
from simulations.reports import plots
from simulations.reports.figures import chance
from simulations.reports.page import page_environment
from simulations.reports.pictures import Drawing, paint, panel_drawing
from simulations.reports.run_figures import FIGURES, RunFigures
from simulations.reports.statistics import Difference, Mean, paired_difference, unpaired_difference
from simulations.reports.wording import DASH, duration, energy, interval_text, percent, size

PAGE = "comparison.html"
DATA_KEYS = ("source", "image_size", "test_fraction", "augmentation")
"""Keys of `data` that decide which images a run sees; keys that a version does not have are ignored."""


@dataclass(frozen=True)
class Group:
    """Runs of one scenario with several seeds, or of several devices trained alone."""

    label: str
    runs: tuple[RunFigures, ...]
    step_bytes: int | None = None
    """Measured peak of a training step (`lightcl footprint --measure`); None where it was not measured."""

    @property
    def scenario(self) -> Scenario:
        return self.runs[0].scenario

    @property
    def seeds(self) -> list[int]:
        return sorted({run.scenario.seed for run in self.runs})

    @property
    def seeds_text(self) -> str:
        """How many seeds, and which: `3 (0–2)`."""
        return f"{len(self.seeds)} ({number_ranges(self.seeds)})"

    @property
    def devices(self) -> list[int]:
        return sorted({device for run in self.runs for device in run.devices})

    @property
    def complete(self) -> bool:
        return all(run.complete for run in self.runs)

    def observations(self, setting: str, key: str) -> dict[tuple[int, int], float]:
        """By (seed, device), in 0..1."""
        figures = f"{setting} {key}"
        return {(run.scenario.seed, d): value for run in self.runs for d, value in run.figures[figures].items()}

    def mean(self, setting: str, key: str) -> Mean | None:
        return Mean.of(list(self.observations(setting, key).values()))

    def curve(self, setting: str) -> list[float]:
        """`[t]`: average accuracy after task t, mean over the runs."""
        curves = [run.curve(setting) for run in self.runs]
        found = []
        for values in zip(*curves, strict=False):
            known = [value for value in values if value == value]
            found.append(fmean(known) if known else nan)
        return found

    @property
    def shares(self) -> bool:
        """Whether devices of one run share weights or class sums."""
        return self.scenario.server.aggregation != "none" or self.scenario.method.sums_statistics

    @property
    def process_mib(self) -> float | None:
        """The largest of the runs' process peaks, MiB."""
        return max((run.process_mib for run in self.runs if run.process_mib), default=None)

    @property
    def bytes_down(self) -> float:
        """Per run."""
        return fmean(run.bytes_down for run in self.runs)

    @property
    def bytes_up(self) -> float:
        """Per run."""
        return fmean(run.bytes_up for run in self.runs)

    @property
    def joules(self) -> Mean | None:
        """Energy per learned task, over the devices and seeds that measured it; None where none did."""
        return Mean.of([energy for run in self.runs for energy in run.joules.values()])

    @property
    def seconds(self) -> float:
        """Wall clock per run."""
        return fmean(run.seconds for run in self.runs)


def group_runs(runs: Sequence[RunFigures]) -> list[Group]:
    """Groups runs that differ only in seed or device. The labels are the methods where these are distinct."""
    found: list[list[RunFigures]] = []
    for run in runs:
        fitting = (group for group in found if _fits(run, group))
        group = next(fitting, None)
        if group is None:
            found.append([run])
        else:
            group.append(run)
    methods = [group[0].scenario.method.name for group in found]
    names = [f"{group[0].scenario.name}, {method}" for group, method in zip(found, methods, strict=True)]
    folders = [group[0].path.name for group in found]
    paths = [str(group[0].path) for group in found]
    labels = next(
        choice for choice in (methods, names, folders, paths) if len(set(choice)) == len(found) or choice is paths
    )
    return [Group(label, tuple(group)) for label, group in zip(labels, found, strict=True)]


def _fits(run: RunFigures, group: Sequence[RunFigures]) -> bool:
    alike = _decisive(run.scenario) == _decisive(group[0].scenario)
    taken = {(other.scenario.seed, other.device) for other in group}
    # A fleet and a single device are not observations of the same kind.
    same_kind = (run.device is None) == (group[0].device is None)
    return alike and same_kind and (run.scenario.seed, run.device) not in taken


def _decisive(scenario: Scenario) -> dict[str, Any]:
    values = scenario.model_dump(mode="json", exclude={"seed", "name", "simulation"})
    values["data"].pop("path", None)
    return values


# -- pairing -------------------------------------------------------------------------------------------------------


def pairing_problems(first: Group, second: Group) -> list[str]:
    """Why pairs of the same device and seed are not comparable; empty where they are."""
    one, other = first.scenario, second.scenario
    problems = []
    for section, keys in (("data", DATA_KEYS), ("fleet", None), ("stream", None)):
        left, right = (getattr(s, section).model_dump(mode="json") for s in (one, other))
        for key in left:
            # The settings of the test do not change the training data.
            if (keys is None or key in keys) and key != "settings" and left[key] != right[key]:
                problems.append(f"{section}.{key} is {left[key]} and {right[key]}")
    if not set(first.seeds) & set(second.seeds):
        problems.append(f"the seeds are {number_ranges(first.seeds)} and {number_ranges(second.seeds)}")
    if _scope(first) != _scope(second):
        problems.append(f"one has {_scope(first)}, the other {_scope(second)}")
    if not problems and not _same_shares(first, second):
        problems.append("partition.json assigns different images to the devices")
    return problems


def _scope(group: Group) -> str:
    alone = sorted({run.device for run in group.runs if run.device is not None})
    return f"device {number_ranges(alone)} alone" if alone else f"a fleet of {group.scenario.fleet.devices}"


def _same_shares(first: Group, second: Group) -> bool:
    for run in first.runs:
        for other in second.runs:
            if run.scenario.seed == other.scenario.seed and run.device == other.device:
                common = run.shares.keys() & other.shares.keys()
                if any(run.shares[device] != other.shares[device] for device in common):
                    return False
    return True


def difference(first: Group, second: Group, setting: str, key: str) -> Difference | None:
    """First minus second, by pairs where these are comparable; None where one of them lacks the figure."""
    one, other = first.observations(setting, key), second.observations(setting, key)
    if pairing_problems(first, second):
        return unpaired_difference(list(one.values()), list(other.values()))
    return paired_difference(one, other)


def difference_over_seeds(first: Group, second: Group, setting: str, key: str) -> Difference | None:
    """First minus second over the means of each seed, a pair per seed.

    Devices that share weights are not independent of each other, runs of different seeds are. None where there are no
    pairs, where there is one seed, and where neither group shares anything.
    """
    if not (first.shares or second.shares) or pairing_problems(first, second):
        return None
    one, other = first.observations(setting, key), second.observations(setting, key)
    common = sorted(one.keys() & other.keys())
    seeds = sorted({seed for seed, _ in common})
    if len(seeds) < 2:
        return None

    def by_seed(values: Mapping[tuple[int, int], float]) -> dict[int, float]:
        return {seed: fmean([values[at] for at in common if at[0] == seed]) for seed in seeds}

    return paired_difference(by_seed(one), by_seed(other))


def warnings_of(groups: Sequence[Group], baselines: Mapping[str, str]) -> list[str]:
    """What a reader must know before comparing: missing pairs, unfinished runs, dropped devices."""
    by_label = {group.label: group for group in groups}
    lines = []
    for group in groups:
        base = by_label.get(baselines.get(group.label, groups[0].label), groups[0])
        problems = pairing_problems(group, base) if group is not base else []
        if problems:
            lines.append(
                f"{group.label} and {base.label} are compared without pairs: {'; '.join(problems)}. The interval is "
                "that of two independent samples"
            )
        elif group is not base:
            one, other = (g.observations("til", "average_accuracy").keys() for g in (group, base))
            if one != other:
                lines.append(
                    f"{group.label} and {base.label}: {len(one ^ other)} results have no partner (a device or a seed "
                    f"that did not finish); {len(one & other)} pairs are left"
                )
        for run in group.runs:
            if not run.complete:
                lines.append(f"{group.label}: the run in {run.path.name} is not complete; its figures are those so far")
            if run.dropped:
                numbers = number_ranges(run.dropped)
                lines.append(f"{group.label}: {run.path.name} dropped device{'s' * (len(run.dropped) > 1)} {numbers}")
    return lines


# -- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Groups, the baseline of each, and the differences from it."""

    title: str
    groups: list[Group]
    baselines: Mapping[str, str]
    differences: Mapping[str, Mapping[str, Difference | None]]
    """By label, then by "til average_accuracy" and so on; without the baselines themselves."""
    warnings: list[str]
    command: str = ""
    over_seeds: Mapping[str, Mapping[str, Difference | None]] = field(default_factory=dict)
    """The same over the means of each seed, of the groups in which devices share something."""

    @property
    def figures(self) -> list[tuple[str, str]]:
        """Settings and keys that any group has a figure for, in the order of the tables."""
        return [
            (s, key)
            for key in ("average_accuracy", "forgetting")
            for s in self.settings
            if any(g.observations(s, key) for g in self.groups)
        ]

    def short_label(self, label: str) -> str:
        """The label without the parts that its baseline's label has, too."""
        base = self.baselines[label].split(", ")
        return ", ".join(part for part in label.split(", ") if part not in base) or label

    @property
    def settings(self) -> list[str]:
        """Settings in which at least one group is tested."""
        return [s for s in ("til", "cil") if any(g.observations(s, "average_accuracy") for g in self.groups)]

    @property
    def has_step_memory(self) -> bool:
        return any(group.step_bytes for group in self.groups)

    @property
    def has_process_memory(self) -> bool:
        """Whether to show process memory: only where step memory is missing, since it says little about a method."""
        return any(group.process_mib and not group.step_bytes for group in self.groups)

    @property
    def has_energy(self) -> bool:
        return any(group.joules for group in self.groups)

    @property
    def paired(self) -> bool:
        """Whether all differences are over pairs of the same device and seed."""
        return all(d.paired for found in self.differences.values() for d in found.values() if d)

    def same(self, key: str) -> Any:
        """The value of a key such as "stream.tasks" that all scenarios have; None where they differ."""
        section, _, name = key.partition(".")
        values = {getattr(getattr(group.scenario, section), name) for group in self.groups}
        return values.pop() if len(values) == 1 else None

    @property
    def differing_keys(self) -> list[tuple[str, list[str]]]:
        """Scenario keys in which the groups that have them differ, with the values by group (DASH: no such key)."""
        flat = [_flat(_decisive(group.scenario)) for group in self.groups]
        keys = dict.fromkeys(key for values in flat for key in values)
        rows = [(key, [str(values.get(key, DASH)) for values in flat]) for key in keys]
        return [(key, values) for key, values in rows if len({value for value in values if value != DASH}) > 1]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def compare(
    groups: Sequence[Group], *, title: str, baselines: Mapping[str, str] | None = None, command: str = ""
) -> Comparison:
    """Computes each group's differences from its baseline; the default baseline is the first group."""
    by_label = {group.label: group for group in groups}
    chosen = {}
    for group in groups:
        wanted = (baselines or {}).get(group.label, groups[0].label)
        chosen[group.label] = wanted if wanted in by_label else groups[0].label
    differences = {
        group.label: {f"{s} {key}": difference(group, by_label[chosen[group.label]], s, key) for s, key in FIGURES}
        for group in groups
        if chosen[group.label] != group.label
    }
    over_seeds: dict[str, dict[str, Difference | None]] = {}
    for group in groups:
        base = by_label[chosen[group.label]]
        over = {f"{s} {key}": difference_over_seeds(group, base, s, key) for s, key in FIGURES}
        if base is not group and any(over.values()):
            over_seeds[group.label] = over
    return Comparison(title, list(groups), chosen, differences, warnings_of(groups, chosen), command, over_seeds)


def number(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return value if value == value else None


def mean_json(mean: Mean | None) -> dict[str, Any] | None:
    return None if mean is None else {
        "mean": mean.mean, "standard_error": number(mean.error), "margin": number(mean.margin), "count": mean.count,
    }  # fmt: skip


def difference_json(found: Difference | None) -> dict[str, Any] | None:
    return None if found is None else {
        "mean": found.mean, "standard_error": number(found.error), "low": number(found.low),
        "high": number(found.high), "count": found.count, "paired": found.paired,
    }  # fmt: skip


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything that the page shows, as numbers."""
    groups = []
    for group in comparison.groups:
        means = {f"{s} {key}": group.mean(s, key) for s, key in FIGURES}
        found = comparison.differences.get(group.label, {})
        groups.append({
            "name": group.label, "method": group.scenario.method.name, "seeds": group.seeds,
            "devices": len(group.devices), "runs": [str(run.path) for run in group.runs],
            "figures": {name: mean_json(m) for name, m in means.items()},
            "baseline": comparison.baselines[group.label] if found else None,
            "differences": {name: difference_json(d) for name, d in found.items()},
            "differences_over_seeds": {
                name: difference_json(d) for name, d in comparison.over_seeds.get(group.label, {}).items()
            },
            "training_step_bytes": group.step_bytes, "process_mib": group.process_mib,
            "bytes_down": group.bytes_down, "bytes_up": group.bytes_up, "seconds": group.seconds,
            "joules_per_task": mean_json(group.joules),
        })  # fmt: skip
    return {"title": comparison.title, "warnings": comparison.warnings, "groups": groups}


# -- the page ------------------------------------------------------------------------------------------------------


def drawings_of(comparison: Comparison) -> list[Drawing]:
    """The pictures for which there is data."""
    groups, settings = comparison.groups, comparison.settings
    chances = {tuple(sorted(chance(group.scenario, group.runs[0].classes).items())) for group in groups}
    guessing = dict(next(iter(chances))) if len(chances) == 1 else {}
    curves = {s: {g.label: g.curve(s) for g in groups if g.observations(s, "average_accuracy")} for s in settings}
    bars = {
        s: {g.label: (m.mean, m.error) for g in groups if (m := g.mean(s, "forgetting")) is not None} for s in settings
    }
    drawn = []
    if settings:
        draw_accuracy = partial(plots.accuracy_of_runs, curves, guessing)
        drawn.append(panel_drawing("compare-accuracy", "Average accuracy after each task, by run", draw_accuracy))
    if any(bars.values()):
        drawn.append(
            panel_drawing("compare-forgetting", "Mean forgetting, by run", partial(plots.forgetting_of_runs, bars))
        )
    shown = {
        s: {
            label: (d, comparison.over_seeds.get(label, {}).get(f"{s} average_accuracy"))
            for label, found in comparison.differences.items()
            if (d := found[f"{s} average_accuracy"])
        }
        for s in settings
    }
    if any(shown.values()):
        labels = {label: comparison.short_label(label) for label in comparison.differences}
        draw_gains = partial(plots.differences_of_runs, shown, labels, comparison.baselines)
        drawn.append(
            panel_drawing("compare-differences", "Difference in average accuracy from the baseline", draw_gains)
        )
    # One kind of memory per picture: that of a training step where it was measured, else that of the processes.
    memory = {g.label: g.step_bytes / MIB if g.step_bytes else None for g in groups}
    label = plots.STEP_MEMORY
    if not comparison.has_step_memory:
        memory, label = {g.label: g.process_mib for g in groups}, "memory of the training process, peak (MiB)"
    places = {
        s: {
            g.label: (amount, m.mean, m.error)
            for g in groups
            if (amount := memory[g.label]) and (m := g.mean(s, "average_accuracy"))
        }
        for s in settings
    }
    if any(places.values()):
        draw_memory = partial(plots.accuracy_over_memory, places, memory_label=label)
        drawn.append(panel_drawing("compare-memory", "Accuracy over memory, by run", draw_memory))
    return drawn


def write_page(
    comparison: Comparison, folder: Path, tables: Sequence[Table] = (), drawings: Sequence[Drawing] = ()
) -> Path:
    """Writes `comparison.html`, with more tables and drawings at its end, and `plots/compare-*.png`; returns the
    page.
    """
    pictures = paint([*drawings_of(comparison), *drawings])
    target = folder / "plots"
    target.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (target / f"{picture.name}.png").write_bytes(picture.light)
    environment = page_environment()
    page = folder / PAGE
    text = environment.get_template("comparison.html.j2").render(
        comparison=comparison, pictures={picture.name: picture for picture in pictures}, figures=FIGURES, mib=MIB,
        tables=tables, more=[drawing.name for drawing in drawings],
        light=plots.LIGHT, dark=plots.DARK, links=_links(comparison, folder),
    )  # fmt: skip
    write_atomically(page, text)
    return page


def _links(comparison: Comparison, folder: Path) -> dict[str, list[tuple[str, str | None]]]:
    """By label: each run's folder as text, and its report relative to the page where there is one."""
    found: dict[str, list[tuple[str, str | None]]] = {}
    for group in comparison.groups:
        found[group.label] = []
        for run in group.runs:
            report = run.path / "report.html"
            link = Path(os.path.relpath(report, folder)).as_posix() if report.exists() else None
            found[group.label].append((run.path.name, link))
    return found


def build_comparison(
    groups: Sequence[Group], folder: Path, *, title: str, baselines: Mapping[str, str] | None = None, command: str = ""
) -> Comparison:
    """Compares the groups and writes the page into `folder`."""
    comparison = compare(groups, title=title, baselines=baselines, command=command)
    write_page(comparison, folder)
    return comparison


Table = tuple[str, list[str], list[list[str]]]
"""Title, headings, rows."""


def table_rows(comparison: Comparison) -> list[Table]:
    """The figures and the differences, as text."""
    columns = [(s, key) for key in ("average_accuracy", "forgetting") for s in comparison.settings]
    names = [f"{s.upper()}{' forgetting' if key == 'forgetting' else ''}" for s, key in columns]
    step, process = comparison.has_step_memory, comparison.has_process_memory
    memory = ["step memory (MiB)"] * step + ["process memory (MiB)"] * process
    rows = []
    for group in comparison.groups:
        cells = [group.label, group.seeds_text, str(len(group.devices))]
        cells += [_mean_text(group.mean(s, key)) for s, key in columns]
        cells += [f"{group.step_bytes / MIB:.1f}" if group.step_bytes else DASH] * step
        cells += [f"{group.process_mib:.0f}" if group.process_mib else DASH] * process
        cells += [_energy_text(group.joules)] * comparison.has_energy
        rows.append([*cells, size(group.bytes_down), size(group.bytes_up), duration(group.seconds)])
    spent = ["energy per learned task"] * comparison.has_energy
    headings = ["run", "seeds", "devices", *names, *memory, *spent, "down", "up", "time per run"]
    tables = [("Percent; mean ± standard error over devices and seeds", headings, rows)]
    if comparison.differences:
        rows = []
        for label, found in comparison.differences.items():
            shown = [found[f"{s} {key}"] for s, key in columns]
            count = next((f"{d.count}" if d.paired else "unpaired" for d in shown if d), DASH)
            rows.append([label, comparison.baselines[label], count, *map(interval_text, shown)])
        title = "Difference in percentage points, with its 95 % interval (Student's t)"
        tables.append((title, ["run", "minus", "pairs", *names], rows))
    if comparison.over_seeds:
        rows = []
        for label, found in comparison.over_seeds.items():
            shown = [found[f"{s} {key}"] for s, key in columns]
            count = next((str(d.count) for d in shown if d), DASH)
            rows.append([label, comparison.baselines[label], count, *map(interval_text, shown)])
        title = "The same over the means of each seed: devices that share weights are not independent"
        tables.append((title, ["run", "minus", "seeds", *names], rows))
    return tables


def markdown(comparison: Comparison, more: Sequence[Table] = ()) -> str:
    """The tables, `more` tables and the warnings as Markdown."""
    lines = [f"# {comparison.title}"]
    for title, headings, rows in [*table_rows(comparison), *more]:
        lines += ["", f"{title}:", "", f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [line for text in comparison.warnings for line in ("", f"Warning: {text}.")]
    return "\n".join(lines) + "\n"


def mean_interval(mean: Mean) -> str:
    """In percent, with half of its 95 % interval."""
    return percent(mean.mean) + (f" ± {percent(mean.margin)}" if mean.margin == mean.margin else "")


def _energy_text(mean: Mean | None) -> str:
    if mean is None:
        return DASH
    return energy(mean.mean) + (f" ± {energy(mean.error)}" if mean.error == mean.error else "")


def _mean_text(mean: Mean | None) -> str:
    if mean is None:
        return DASH
    return f"{100 * mean.mean:.1f}" + (f" ± {100 * mean.error:.1f}" if mean.error == mean.error else "")

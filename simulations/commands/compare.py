"""`lightcl compare`: finished or unfinished runs side by side, as a table and a page."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lightcl.errors import RequestError
from simulations.options import Plugins, command_line, console, use_plugins
from simulations.tables import print_table


class By(StrEnum):
    """What sets devices apart (simulations/reports/breakdown.py)."""

    images = "images"
    tasks = "tasks"


MARKDOWN, RECORDS = "comparison.md", "comparison.json"


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or sweep folders (all their runs)")
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", help="Folder for the page, the table and the pictures; replaced if it holds those")
    ] = Path("runs/comparison"),
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="NAME",
            help="Run that the others are compared with, by its name in the table or its folder; default: the first",
        ),
    ] = None,
    by: Annotated[
        By | None, typer.Option("--by", help="Break figures and differences down by the devices' images or tasks")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the memory of a training step in fresh processes")
    ] = False,
    plugins: Plugins = None,
) -> None:
    """Compare runs: accuracy, forgetting, memory, bytes and time, with paired differences and 95 % intervals."""
    use_plugins(plugins or [])
    from lightcl.storage.files import names_in, writable, write_atomically
    from simulations.reports.breakdown import break_down, breakdown_drawings, breakdown_json, breakdown_tables
    from simulations.reports.comparison import PAGE, Group, markdown, to_json, write_page
    from simulations.reports.comparison import compare as compare_groups

    out = console()
    groups, baselines = collect(runs), sweep_baselines(runs)
    if len(groups) < 2:
        raise RequestError(
            f"compare: needs at least two scenarios, found {len(groups)} (runs of one scenario, with other seeds or "
            "for other devices alone, are one)"
        )
    if baseline is not None:
        baselines = dict.fromkeys([group.label for group in groups], find_baseline(baseline, groups))
    replaced = names_in(out_folder, (PAGE, MARKDOWN, RECORDS, "plots"))
    if measure:
        groups = [Group(g.label, g.runs, g.step_bytes or _step_bytes(g, out)) for g in groups]
    title = groups[0].scenario.name if len({g.scenario.name for g in groups}) == 1 else "Comparison of runs"
    comparison = compare_groups(groups, title=title, baselines=baselines, command=command_line())
    found = break_down(comparison, by.value) if by else None
    tables = breakdown_tables(comparison, found) if found else []
    drawings = breakdown_drawings(comparison, found) if found else []
    values = to_json(comparison) | ({f"by_{found.by}": breakdown_json(found)} if found else {})
    with writable(out_folder):
        out_folder.mkdir(parents=True, exist_ok=True)
        page = write_page(comparison, out_folder, tables, drawings)
        write_atomically(out_folder / MARKDOWN, markdown(comparison, tables))
        write_atomically(out_folder / RECORDS, json.dumps(values, indent=2))
    print_comparison(comparison, out, tables)
    note = " (replaces the comparison that was there)" if replaced else ""
    out.print(f"page: {os.path.relpath(page)}{note}", highlight=False, markup=False, soft_wrap=True)


def find_baseline(given: str, groups: Sequence[Any]) -> str:
    """The label of the group that has this name, or a run in this folder, given by its name or path.

    Raises RequestError where none has, or several have.
    """
    from lightcl.errors import nearest

    labels = [group.label for group in groups]
    if given in labels:
        return given
    path = Path(given).resolve()
    found = [group.label for group in groups if any(run.path.resolve() == path for run in group.runs)]
    found = found or [group.label for group in groups if any(run.path.name == given for run in group.runs)]
    if len(found) == 1:
        return str(found[0])
    allowed = f"allowed: {', '.join(map(repr, labels))}, or the folder of one of their runs"
    if found:
        raise RequestError(f"--baseline: {given!r} is the folder of several; give its path ({allowed})")
    raise RequestError(f"--baseline: there is no {given!r}{nearest(given, labels)} ({allowed})")


def collect(paths: list[Path]) -> list[Any]:
    """The groups of runs in these run and sweep folders. Raises RequestError."""
    from simulations.reports.comparison import Group, group_runs
    from simulations.reports.run_figures import read_figures

    alone, groups = [], []
    for path in paths:
        if (path / "sweep.json").exists():
            groups += _sweep_groups(path)
        else:
            alone.append(read_figures(path))
    groups += group_runs(alone)
    labels = [group.label for group in groups]
    if len(set(labels)) < len(labels):  # the same name in two sweeps
        groups = [
            Group(f"{group.runs[0].path.parent.parent.name}: {group.label}", group.runs, group.step_bytes)
            if labels.count(group.label) > 1
            else group
            for group in groups
        ]
    return groups


def sweep_baselines(paths: list[Path]) -> dict[str, str]:
    """The baseline that a sweep has for each of its points, by label; none for several folders, or an older sweep."""
    if len(paths) != 1 or not (paths[0] / "sweep.json").exists():
        return {}
    points = json.loads((paths[0] / "sweep.json").read_text(encoding="utf-8"))["points"]
    return {point["label"]: point["baseline"] for point in points if "baseline" in point}


def _sweep_groups(folder: Path) -> list[Any]:
    """One group for each point of a sweep that has a run: its complete runs or, while there are none, those begun."""
    from simulations.reports.comparison import Group
    from simulations.reports.run_figures import read_figures

    try:
        points = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["points"]
        file = folder / "footprint.json"
        footprints = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        runs = {point["label"]: [folder / str(run) for run in point["runs"]] for point in points}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{folder / 'sweep.json'}: cannot be read ({error!r})") from error
    groups = []
    for label, paths in runs.items():
        begun = tuple(read_figures(path) for path in paths if (path / "run.json").exists())
        found = tuple(run for run in begun if run.complete) or begun
        if found:
            footprint = footprints.get(label)
            groups.append(Group(label, found, footprint["measured"]["training"] if footprint else None))
    if not groups:
        raise RequestError(f"{folder}: no run of this sweep has begun")
    return groups


def _step_bytes(group: Any, console: Console) -> int | None:
    from lightcl.analysis.footprint.comparison import footprint_of
    from lightcl.data.sources import load_source

    console.print(f"measuring the memory of {group.label} in a fresh process", style="dim", highlight=False)
    source = load_source(group.scenario.source_request())
    device = group.devices[0] if group.devices else None
    found = footprint_of(group.scenario, source, device, measuring=True, process=False)
    return found.measured.training if found.measured else None


def print_comparison(comparison: Any, console: Console, more: Sequence[Any] = ()) -> None:
    """Prints the comparison, and more tables, as tables."""
    from simulations.reports.comparison import table_rows

    for title, headings, rows in [*table_rows(comparison), *more]:
        console.print(title, style="italic", highlight=False, markup=False)
        print_table(console, headings, rows)
    for line in comparison.warnings:
        console.print(f"warning: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)

"""The work of `lightcl footprint` and `lightcl plan`: training cost per method, and settings that fit a budget."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lightcl.analysis.footprint import CATEGORIES
from lightcl.analysis.footprint.comparison import MethodFootprint, footprint_of, image_of
from lightcl.analysis.footprint.paper import DATA, Cell, Row, table1
from lightcl.analysis.footprint.shapes import MIB, Image
from lightcl.analysis.footprint.theory import MEANINGS
from lightcl.analysis.planning import Candidate, candidates, choose
from lightcl.assembly import stream_to_count
from lightcl.data.sources import load_source
from lightcl.device.hardware import choose_accelerator
from lightcl.errors import RequestError, required
from lightcl.scenario import Scenario, load_scenario, method_names
from lightcl.scenario.variants import as_method
from lightcl.storage.files import writable
from simulations.options import methods_named
from simulations.tables import print_table

BASELINE = "sgd"
ROWS_OF_A_PLAN = 20


def footprint_run(
    scenario: Scenario, scenario_file: Path, *, methods: str | None, all_methods: bool, device: int | None,
    measuring: bool, json_to: str | None, picture: Path | None, overwrite: bool, command: str, console: Console,
) -> None:  # fmt: skip
    """Counts FLOPs and memory and, if `measuring`, measures memory.

    Raises RequestError for a wrong request before anything is written.
    """
    if methods is not None and all_methods:
        raise RequestError("--methods and --all-methods: choose one")
    named = methods_named(methods) if methods is not None else [scenario.method.name]
    names = method_names() if all_methods else named
    _check_places({"--json": _file(json_to), "--picture": picture}, scenario_file, overwrite=overwrite)
    if picture:
        if picture.suffix.lower() != ".png":
            raise RequestError(f"--picture {picture}: expected a file name that ends in .png")
        required("matplotlib", "simulation", "for --picture")
    source = load_source(scenario.source_request())
    results = []
    for name in names:
        if measuring:
            console.print(f"measuring {name} in fresh processes ...", style="dim", highlight=False)
        results.append(footprint_of(as_method(scenario, name), source, device, measuring))
    image = image_of(source)
    if json_to:
        _write_json({"command": command, "image": image, "methods": [r.to_json() for r in results]}, json_to)
    if json_to != "-":
        _print_memory(results, image, scenario, console)
    if picture:
        from simulations.reports.plots import LIGHT, footprint_bars, png

        parts = {r.method: {str(c): n for c, n in r.shown.memory.items()} for r in results}
        dots = {r.method: r.measured.training for r in results if r.measured}
        _write_files({"--picture": (picture, png(footprint_bars(parts, dots, LIGHT)))})
        if json_to != "-":
            console.print(f"picture: {picture}", highlight=False, markup=False, soft_wrap=True)


def _file(to: str | None) -> Path | None:
    """The file that --json names; None without one or for `-`."""
    return Path(to) if to and to != "-" else None


def _check_places(files: Mapping[str, Path | None], scenario: Path | None, *, overwrite: bool) -> None:
    """Raises RequestError for a file that cannot or must not be written, before hours of measuring would be lost."""
    taken = {scenario.resolve(): "is the scenario itself"} if scenario else {}
    for option, file in files.items():
        if file is None:
            continue
        with writable(file, option):
            if not file.parent.is_dir():
                raise RequestError(f"{option} {file}: there is no folder {file.parent}")
            if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
                raise RequestError(f"{option} {file}: cannot be written to")
            if (place := file.resolve()) in taken:
                raise RequestError(f"{option}: {file} {taken[place]}; name another file")
            if file.is_file() and not overwrite:  # a pipe or /dev/stdout loses nothing
                raise RequestError(f"{option}: {file} exists; replace it with --overwrite")
        taken[place] = f"is also the file of {option}"


def _write_files(files: Mapping[str, tuple[Path, bytes]]) -> None:
    """Writes all files; if one cannot be written, removes the new ones again. Raises RequestError."""
    new = []
    try:
        for option, (file, content) in files.items():
            with writable(file, option):
                if not file.exists():
                    new.append(file)
                file.write_bytes(content)
    except RequestError:
        for file in new:
            file.unlink(missing_ok=True)
        raise


def _write_json(values: Any, to: str) -> None:
    file, text = _file(to), _json_text(values)
    if file:
        _write_files({"--json": (file, text.encode())})
    else:
        sys.stdout.write(text)


def _json_text(values: Any) -> str:
    return json.dumps(values, indent=2) + "\n"


def _print_memory(results: Sequence[MethodFootprint], image: Image, scenario: Scenario, console: Console) -> None:
    """Methods side by side, as many as fit into the terminal; the others follow in more tables below."""
    channels, height, width = image
    about = f"{height}x{width}x{channels}, batch {scenario.training.batch_size}, {scenario.device.precision}"
    moment = "second task, as measured" if results[0].measured else "last task"
    console.print(f"Memory of a training step, MiB ({about}; {moment})", style="bold", highlight=False)
    reference = next((r for r in results if r.method == BASELINE), None)
    column = max(7, *(len(r.method) for r in results)) + 2
    at_once = max(1, (console.width - 22) // column)
    for first in range(0, len(results), at_once):
        console.print(_memory_table(results[first : first + at_once], reference))
    for result in results:
        console.print(f"{result.method}: the peak is at {result.shown.moment}", style="dim", highlight=False)
    used = [category for category in CATEGORIES if any(r.shown.memory[category] for r in results)]
    console.print("; ".join(f"{category}: {MEANINGS[category]}" for category in used), style="dim", highlight=False)


def _memory_table(results: Sequence[MethodFootprint], reference: MethodFootprint | None) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("", no_wrap=True)
    for result in results:
        table.add_column(result.method, justify="right", no_wrap=True)
    for category in CATEGORIES:
        cells = [result.shown.memory[category] for result in results]
        if any(cells):
            table.add_row(category, *(f"{cell / MIB:.1f}" if cell else "" for cell in cells))
    table.add_section()
    table.add_row("[bold]theory[/]", *(f"[bold]{r.shown.peak / MIB:.1f}[/]" for r in results))
    pairs = [(r.measured, r.shown) for r in results if r.measured]
    if pairs:
        table.add_row("[bold]measured[/]", *(f"[bold]{m.training / MIB:.1f}[/]" for m, _ in pairs))
        table.add_row("measured / theory", *(f"{m.training / t.peak:.2f}" for m, t in pairs))
    if reference and reference.measured:
        base = reference.measured.training
        table.add_row(f"measured / {BASELINE}'s", *(f"{m.training / base:.2f}" for m, _ in pairs))
    elif reference:
        table.add_row(f"theory / {BASELINE}'s", *(f"{r.shown.peak / reference.shown.peak:.2f}" for r in results))
    if pairs:
        table.add_row("while testing", *(f"{m.evaluation / MIB:.1f}" for m, _ in pairs))
        table.add_row("process above idle", *(_mib(m.resident) for m, _ in pairs))
    table.add_section()
    table.add_row("FLOPs of a step", *(f"{r.shown.step_flops:.3g}" for r in results))
    table.add_row("FLOPs of training", *(f"{r.counted.training_flops:.3g}" for r in results))
    table.add_row("frozen up to", *(r.freeze for r in results))
    return table


def _mib(amount: int | None) -> str:
    return "" if amount is None else f"{amount / MIB:.1f}"


# -- the paper's table ---------------------------------------------------------------------------------------------


def table1_run(*, json_to: str | None, overwrite: bool, console: Console) -> None:
    """The FLOPs and memory columns of the paper's Table 1: its value, theory by its rule, their ratio, our count."""
    _check_places({"--json": _file(json_to)}, None, overwrite=overwrite)
    cells = table1()
    if json_to:
        _write_json([_cell_values(cell) for cell in cells], json_to)
    if json_to == "-":
        return
    for data in dict.fromkeys(cell.data for cell in cells):
        power = 15 if data == DATA[0] else 16  # as the paper writes them
        title = f"Table 1 of the paper, {data}: memory in MiB, then FLOPs of training in 1e{power}"
        console.print(title, style="bold", highlight=False)
        rows = []
        for cell in (c for c in cells if c.data == data):
            memory, flops = cell.memory / cell.paper_memory, cell.flops / cell.paper_flops
            own = cell.own
            rows.append([
                _label(cell.row),
                f"{cell.paper_memory / MIB:.1f}", f"{cell.memory / MIB:.1f}", f"{memory:.3f}",
                f"{own.peak / MIB:.1f}" if own else "",
                *(f"{value / 10**power:.2f}" for value in (cell.paper_flops, cell.flops)), f"{flops:.3f}",
                f"{own.training_flops / 10**power:.2f}" if own else "",
            ])  # fmt: skip
        columns = [f"{kind} {unit}" for unit in ("MiB", "FLOPs") for kind in ("paper", "theory", "ratio of", "own")]
        print_table(console, ("method", *columns), rows)
    for row in dict.fromkeys(cell.row for cell in cells):
        if row.note:
            console.print(f"[bold]{_label(row)}[/]: {row.note}.", highlight=False)
    console.print(
        "theory: the paper's rule (lightcl/analysis/footprint/paper.py). own: this project's count of the same "
        "training; memory is the peak of a real step, with temporaries and all maps that batch-norm and ReLU keep; "
        "masked weights (SparCL) save no memory.",
        style="dim", highlight=False,
    )  # fmt: skip


def _label(row: Row) -> str:
    """The paper gives both forms of LightCL the same label."""
    return "LightCL, sparse" if row.method == "lightcl-sparse" else row.label


def _cell_values(cell: Cell) -> dict[str, Any]:
    return {
        "method": cell.row.method, "label": cell.row.label, "sparsity": cell.row.sparsity, "data": cell.data,
        "memory": {"paper": cell.paper_memory, "theory": cell.memory, "ratio": cell.memory / cell.paper_memory},
        "flops": {"paper": cell.paper_flops, "theory": cell.flops, "ratio": cell.flops / cell.paper_flops},
        "own": cell.own.to_json() if cell.own else None, "note": cell.row.note,
    }  # fmt: skip


# -- a budget ------------------------------------------------------------------------------------------------------


def plan_run(
    scenario: Scenario, scenario_file: Path, budget: float, *, file: Path | None, overwrite: bool, print_all: bool,
    json_to: str | None, console: Console,
) -> None:  # fmt: skip
    """Chooses a setting for `budget` MiB and writes it as a scenario file.

    Raises RequestError, before anything is written, where nothing fits or the file exists.
    """
    file = file or Path(f"{scenario.name}-{budget:g}mb.yaml")
    if not isfinite(budget):
        raise RequestError(f"--budget-mb {budget}: expected a number of MiB")
    _check_places({"--out": file, "--json": _file(json_to)}, scenario_file, overwrite=overwrite)
    source = load_source(scenario.source_request())
    image = image_of(source)
    stream = stream_to_count(scenario, source)
    accelerator = choose_accelerator(scenario.device.accelerator).type
    found = candidates(scenario, stream, image, accelerator)
    chosen = choose(found, budget * MIB)
    peak = chosen.footprint.peak / MIB
    heading = f"# {scenario.name}, fitted to {budget:g} MiB: {peak:.1f} MiB predicted (lightcl plan)\n"
    table = _json_text([c.to_json() | {"chosen": c is chosen} for c in found])
    files = {"--json": (json_file, table.encode())} if (json_file := _file(json_to)) else {}
    _write_files(files | {"--out": (file, (heading + chosen.scenario.to_yaml()).encode())})
    load_scenario(file)
    if json_to == "-":
        sys.stdout.write(table)
    else:
        _print_plan(found, chosen, budget, print_all, console)
        console.print(f"scenario: {file}", highlight=False, markup=False, soft_wrap=True)


def _print_plan(found: list[Candidate], chosen: Candidate, budget: float, print_all: bool, console: Console) -> None:
    """The candidates around the chosen one, in order of preference; all of them with `print_all`."""
    console.print(f"Settings in order of preference, for {budget:g} MiB", style="italic", highlight=False)
    place = found.index(chosen)
    first = 0 if print_all else max(0, place - ROWS_OF_A_PLAN + 5)
    shown = found if print_all else found[first : first + ROWS_OF_A_PLAN]
    rows = []
    for candidate in shown:
        keys, peak = candidate.keys, candidate.footprint.peak / MIB
        sparsity = f" x{candidate.sparsity:g}" if candidate.sparsity else ""
        rows.append([
            keys["method.name"] + sparsity, keys["network.freeze"], str(keys["training.batch_size"]),
            str(keys["method.memory_size"]), f"{peak:.1f}",
            "chosen" if candidate is chosen else "fits" if peak <= budget else "",
        ])  # fmt: skip
    headings = ("method", "freeze", "batch", "memory", "MiB", "")
    print_table(console, headings, rows, left=(0, 1, 5), bold=[n for n, c in enumerate(shown) if c is chosen])
    if any(candidate.sparsity for candidate in shown):
        console.print("x0.5, x1: channel sparsity as a multiple of the method's own", style="dim", highlight=False)
    if len(shown) < len(found):
        console.print(f"{len(shown)} of {len(found)} settings; all of them with --all", style="dim", highlight=False)

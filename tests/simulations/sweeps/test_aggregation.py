"""The aggregation study at a toy size: every way of sharing, real fleets in this process, summary and breakdown."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from lightcl.preparation import open_run
from lightcl.records.folder import RunFolder
from lightcl.scenario import find_scenario
from server.rounds import Coordinator
from simulations.commands.compare import By, compare
from simulations.sweeps.description import load_description, presets
from simulations.sweeps.engine import RECORD, run_sweep
from simulations.sweeps.grid import Cell, make_sweep
from tests.inprocess import InProcessGrid, Silent

TOY = [
    "data.source=digits", "fleet.devices=3", "fleet.test_images=20", "stream.held_out=0.1", "stream.tasks=2",
    "network.weights=none", "network.width=4", "training.epochs=2", "device.precision=fp32", "device.prefix_cache=off",
]  # fmt: skip
QUIET = Console(quiet=True)


def simulate(cell: Cell, path: Path) -> None:
    """What `lightcl simulate` does, without its worker processes."""
    folder = RunFolder(path)
    prepared = open_run(folder, cell.scenario, "lightcl simulate", "fleet", resume=False, overwrite=False)
    run, grid = str(folder.read()["run"]), InProcessGrid(path / "devices", 3)
    Coordinator(prepared.scenario, folder, run, Silent(), prepared.tasks, durable=False).run(grid)


def test_the_study_plans_ninety_runs_and_says_what_it_leaves_out(tmp_path):
    description = load_description(presets()["aggregation"])
    sweep = make_sweep(description, find_scenario(Path(str(description.scenario))), [], tmp_path)
    assert len(sweep.cells) == 90
    assert sweep.scenario.fleet.devices == 100
    assert all("class sums" in line for line in sweep.skipped)
    assert {cell.scenario.method.sums_statistics for cell in sweep.cells if cell.point.variant == "LightCL-plus"} == {
        True, False,
    }  # fmt: skip
    for point in sweep.points:
        base = sweep.baseline_of(point)
        assert base.label == point.label.replace(dict(point.axes)["sharing"], "isolated")


def test_gains_over_learning_alone_of_every_way_of_sharing(tmp_path, monkeypatch, capsys):
    description = load_description(presets()["aggregation"]).model_copy(update={"seeds": [0, 1]})
    only, out = ("LightCL-plus", "Dirichlet 0.5"), tmp_path / "out"
    sweep = make_sweep(description, find_scenario(Path(str(description.scenario))), TOY, out, only)
    assert len(sweep.cells) == 8

    def run_cells(sweep, jobs, console):
        for cell in sweep.cells:
            simulate(cell, sweep.run_folder(cell))
        return {}

    monkeypatch.setattr("simulations.sweeps.engine.run_cells", run_cells)  # each would be two processes and a Ray
    run_sweep(sweep, jobs=1, resume=False, overwrite=False, only_table=False, command="lightcl sweep", console=QUIET)
    text = (out / "summary.md").read_text()
    assert "Left out: only lightcl-plus has class sums" not in text, "none of the runs asked for"
    record = json.loads((out / RECORD).read_text())
    assert {point["baseline"] for point in record["points"]} == {"LightCL-plus, isolated, Dirichlet 0.5"}

    compare([out], out_folder=tmp_path / "compared", by=By.images)
    values = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    alone, suffix, head, sums = values["groups"]
    assert alone["baseline"] is None
    for group in (suffix, head, sums):
        found = group["differences"]["cil average_accuracy"]
        assert (found["count"], found["paired"]) == (6, True), "three devices, two seeds"
        assert group["differences_over_seeds"]["cil average_accuracy"]["count"] == 2
    # One head from all sums: the seeds' mean is that of the pairs, since every seed has as many.
    over = sums["differences_over_seeds"]["cil average_accuracy"]["mean"]
    assert abs(over - sums["differences"]["cil average_accuracy"]["mean"]) < 1e-9
    counts = [
        found["count"] for found in values["by_images"]["differences"]["cil average_accuracy"][sums["name"]] if found
    ]
    assert sum(counts) == 6, "every pair is in one class"
    assert "by training images of the device" in (tmp_path / "compared" / "comparison.md").read_text()

"""`lightcl sweep`: what it runs, what it refuses, and the summary it makes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from lightcl.errors import RequestError
from lightcl.metrics import Spread
from lightcl.records import DeviceRow, Figures, Results, RoundRow
from lightcl.records.folder import DEVICES, ROUNDS, RunFolder
from lightcl.scenario import Scenario
from simulations.sweeps.description import SweepDescription
from simulations.sweeps.engine import run_sweep
from simulations.sweeps.grid import Sweep, make_sweep
from simulations.sweeps.processes import command_of, run_cells
from simulations.sweeps.summary import Row, table

QUIET = Console(quiet=True)
SHARING = {"name": "lightcl-plus", "share_statistics": True}
TIL = {("sgd", 0): [0.4, 0.6], ("sgd", 1): [0.6, 0.8], ("pnn", 0): [0.8, 0.8], ("pnn", 1): [0.8, 0.8]}
"""TIL accuracy on two tasks at the end. sgd: 50 and 70 on average; pnn: 80 both times."""


def scenario(**sections) -> Scenario:
    small = {"network": {"weights": "none", "width": 4}, "stream": {"tasks": 2}, "fleet": {"devices": 1}}
    training = {"training": {"epochs": 1, "batch_size": 64}}
    return Scenario.model_validate(small | training | sections)


def plan(folder: Path, *methods: str, given: Scenario | None = None, **keys) -> Sweep:
    """A sweep over methods, footprints counted, two seeds; its scenario file lies beside the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / "small.yaml"
    file.write_text((given or scenario()).to_yaml())
    values = {"methods": list(methods) or ["sgd", "pnn"], "seeds": 2, "footprint": True, "baseline": "sgd"} | keys
    if "baseline" not in keys and "sgd" not in values["methods"]:
        values.pop("baseline")
    return make_sweep(SweepDescription.model_validate(values), file, [], folder)


def run(sweep: Sweep, **options) -> None:
    given = {"jobs": 1, "resume": False, "overwrite": False, "only_table": False, "command": "lightcl sweep ..."}
    run_sweep(sweep, console=QUIET, **(given | options))


def make_run(sweep: Sweep, method: str, seed: int) -> None:
    """A complete run folder of one device: TIL as above, CIL half of it, 40 % forgetting in CIL of the first task."""
    cell = next(c for c in sweep.cells if c.point.label == method and c.seed == seed)
    folder = RunFolder(sweep.run_folder(cell))
    folder.begin(cell.scenario, {"run": "r", "kind": "device 0"}, [{"device": 0, "train": [1], "test": [2]}])
    til = [[0.9], TIL[method, seed]]
    rows = []
    for task in range(2):
        row = {"round": task + 1, "device": 0, "name": "d", "task": task, "epochs": 1, "bytes_down": 0, "bytes_up": 0}
        row |= {"timing": {"peak_memory_mib": 400.0 + task}, "examples": 5, "loss": 1.0, "til": til[task]}
        if method != "pnn":
            row["cil"] = [value / 2 for value in til[task]]
        rows.append(row)
    folder.append(DEVICES, [DeviceRow.from_json(row) for row in rows])
    timing = {"train_seconds": 3.0, "seconds": 4.0}
    sent = {"bytes_down": 0, "bytes_up": 0, "timing": timing, "failed": 0, "devices": 1, "devices_finished": 0}
    folder.append(ROUNDS, [RoundRow.from_json({"round": n, "task": n - 1} | sent) for n in (1, 2)])
    average = sum(TIL[method, seed]) / 2
    lost = 0.9 - TIL[method, seed][0]

    def figures(factor: float) -> Figures:
        return Figures(Spread.of([factor * average]), Spread.of([factor * lost]), Spread.of([-factor * lost]))

    folder.finish(Results(1, 1, {}, 2, figures(1.0), None if method == "pnn" else figures(0.5), 0, 0, 8.0))


def made(folder: Path) -> Sweep:
    """A sweep whose runs are complete, with figures that are easy to check."""
    sweep = plan(folder)
    for method, seed in TIL:
        make_run(sweep, method, seed)
    (folder / "scenarios").mkdir()
    for cell in sweep.cells:
        (folder / "scenarios" / f"{cell.name}.json").write_text(cell.scenario.model_dump_json())
    start = {"command": "lightcl sweep x", "git_commit": "abc", "libraries": {"torch": "2"}, "machine": "Linux"}
    points = [{"label": p.label, "runs": [f"runs/{c.name}" for c in sweep.of(p)]} for p in sweep.points]
    (folder / "sweep.json").write_text(json.dumps({"starts": [start], "points": points}))
    mib = 2**20
    sizes = {
        name: {"theory": {"training_flops": flops, "peak": 10 * mib}, "measured": {"training": measured * mib}}
        for name, flops, measured in (("sgd", 4.123e10, 10), ("pnn", 3e12, 25))
    }
    (folder / "footprint.json").write_text(json.dumps(sizes))
    return sweep


def test_the_summary_by_hand(tmp_path):
    sweep = made(tmp_path / "out")
    run(sweep, only_table=True)
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "    lightcl sweep x" in text
    assert (
        "digits, 2 tasks x 2 classes, 1 epoch per task, batch 64, fp32, device 0 of 1, seeds 0, 1; commit abc" in text
    )
    assert "Changed from the scenario" not in text
    # sgd: TIL 50 and 70, standard error of two: half of the difference, 10; forgetting 50 and 30; CIL is half of all.
    assert (
        "| sgd | 2 | 30.00 ± 5.00 | 60.00 ± 10.00 | 20.00 ± 5.00 | 40.00 ± 10.00 | 0.0412 | 10.0 | 10.0 | 1.00 |"
        in text
    )
    assert "| pnn | 2 | – | 80.00 ± 0.00 | – | 10.00 ± 0.00 | 3 | 10.0 | 25.0 | 2.50 | 2.50 | 8 |" in text
    # Pairs: 80 - 50 and 80 - 70: mean 20, standard error 10; t(0.975, 1) = 12.7062.
    assert "| pnn | sgd | 2 | – | +20.00 [-107.06, +147.06] | – | -30.00 [-157.06, +97.06] |" in text
    assert (tmp_path / "out" / "summary.png").read_bytes().startswith(b"\x89PNG")
    first, second = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (first["name"], first["memory_measured_bytes"], first["baseline"]) == ("sgd", 10 * 2**20, None)
    assert first["til average_accuracy"]["standard_error"] == pytest.approx(0.1)
    assert second["differences"]["til average_accuracy"]["mean"] == pytest.approx(0.2)
    assert "LightCL-Fleet comparison" in (tmp_path / "out" / "comparison.html").read_text()
    lines = list(csv.DictReader((tmp_path / "out" / "summary.csv").open()))
    assert [(line["variant"], line["seed"]) for line in lines] == [
        ("sgd", "0"),
        ("pnn", "0"),
        ("sgd", "1"),
        ("pnn", "1"),
    ]
    assert float(lines[0]["til average_accuracy"]) == pytest.approx(0.5)
    assert lines[1]["cil average_accuracy"] == ""


def test_the_standard_deviation_where_the_description_asks_for_it(tmp_path):
    made(tmp_path / "out")
    run(plan(tmp_path / "out", spread="standard-deviation"), only_table=True)
    # Deviation of a sample of two: half of the difference times the root of two.
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| sgd | 2 | 30.00 ± 7.07 | 60.00 ± 14.14 |" in text
    assert "mean ± standard deviation over the seeds" in text


def test_the_interval_where_the_description_asks_for_it(tmp_path):
    made(tmp_path / "out")
    run(plan(tmp_path / "out", spread="interval"), only_table=True)
    # TIL: standard error 10, t(0.975, 1) = 12.7062.
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| sgd | 2 | 30.00 ± 63.53 | 60.00 ± 127.06 |" in text
    assert "mean ± half of the 95 % interval (Student's t) over the seeds" in text


def test_runs_that_dropped_devices_are_named_in_the_summary_and_continued(tmp_path, monkeypatch):
    sweep = made(tmp_path / "out")
    file = tmp_path / "out" / "runs" / "sgd-seed-1-device-0" / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dropped": {"4": "why", "3": "why", "10": "why"}}))
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    lost = "\nsgd, seed 1, device 0: without devices 3–4, 10, dropped from the run; `--resume` tries again\n"
    assert table(sweep, record, [], {}).endswith(lost)
    asked = []
    name = "simulations.sweeps.processes.ProcessRunner.run"
    (tmp_path / "out" / "logs").mkdir()
    monkeypatch.setattr(name, lambda self, command, log: asked.append(log.stem) or 0)
    assert run_cells(sweep, 1, QUIET) == {}, "it may lose them again"
    assert asked == ["sgd-seed-1-device-0"]


def test_the_summary_lists_the_keys_that_a_method_does_not_support(tmp_path):
    made(tmp_path / "out")
    given = scenario(server={"aggregation": "suffix"}, fleet={"devices": 2})
    sweep = plan(tmp_path / "out", given=given)
    record = json.loads((tmp_path / "out" / "sweep.json").read_text())
    text = table(sweep, record, [], {})
    assert "Changed from the scenario: server.aggregation is none instead of suffix for pnn." in text


def test_missing_figures_in_the_summary_are_dashes(tmp_path):
    sweep = plan(tmp_path / "out", "er")
    start = {"command": "c", "git_commit": None, "libraries": {"torch": "2"}, "machine": "Linux"}
    empty = Row("er", 0, {f"{s} {k}": None for s in ("cil", "til") for k in ("average_accuracy", "forgetting")})
    text = table(sweep, {"starts": [start]}, [empty], {})
    assert "| er | 0 | – | – | – | – | – | – | – | – | – | – |" in text
    assert "commit unknown" in text


def test_energy_has_a_column_where_a_run_measured_it(tmp_path):
    sweep = plan(tmp_path / "out", "er", "sgd")
    start = {"command": "c", "git_commit": None, "libraries": {"torch": "2"}, "machine": "Linux"}
    figures = {f"{s} {k}": None for s in ("cil", "til") for k in ("average_accuracy", "forgetting")}
    rows = [Row("er", 1, figures, joules=1234.5), Row("sgd", 1, figures)]
    text = table(sweep, {"starts": [start]}, rows, {})
    assert "| J per learned task | seconds per run |" in text
    assert [line.split("|")[-3].strip() for line in text.splitlines() if line.startswith(("| er", "| sgd"))] == [
        "1230",
        "–",
    ]


def test_complete_runs_are_not_run_again_and_begun_ones_continue(tmp_path):
    assert run_cells(made(tmp_path / "out"), 1, QUIET) == {}  # nothing is left to run
    begun = plan(tmp_path / "other", "sgd")
    cell = begun.cells[0]
    assert "--resume" not in command_of(begun, cell)
    begun.run_folder(cell).mkdir(parents=True)
    (begun.run_folder(cell) / "run.json").write_text("{}")
    assert command_of(begun, cell)[-1] == "--resume"


def test_a_fleet_is_simulated_and_a_device_trained(tmp_path):
    fleet = plan(tmp_path / "a", "sgd", given=scenario(fleet={"devices": 2}))
    assert command_of(fleet, fleet.cells[1])[3:5] == ["simulate", str(tmp_path / "a/scenarios/sgd-seed-1.yaml")]
    alone = plan(tmp_path / "a", "sgd", given=scenario(fleet={"devices": 2}), devices=[1])
    assert command_of(alone, alone.cells[0])[3:6] == ["train", "--device", "1"]


@pytest.mark.parametrize(
    ("given", "keys", "message"),
    [
        ({"stream": {"tasks": 6}}, {"methods": ["sgd"]}, "cell 'sgd, seed 0, device 0': .*need 12 classes"),
        (
            {"network": {"freeze": "auto"}},
            {"methods": ["lightcl"], "baseline": None},
            "may choose another block for every seed",
        ),
        ({"method": SHARING}, {"methods": ["lightcl-plus"], "baseline": None}, "share_statistics needs a fleet"),
    ],
)
def test_a_cell_that_cannot_run_is_refused_and_nothing_is_written(tmp_path, given, keys, message):
    sweep = plan(tmp_path / "out", given=scenario(**given), **keys)
    with pytest.raises(RequestError, match=message):
        run(sweep)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"resume": True}, {"only_table": True}])
def test_there_must_be_a_sweep_to_continue(tmp_path, options):
    with pytest.raises(RequestError, match="holds no sweep to continue"):
        run(plan(tmp_path / "out", "sgd"), **options)
    assert not (tmp_path / "out").exists()


def test_another_sweep_is_neither_overwritten_nor_resumed(tmp_path):
    made(tmp_path / "out")
    with pytest.raises(RequestError, match="holds a sweep; continue it with --resume or replace it"):
        run(plan(tmp_path / "out"))
    other = scenario(training={"epochs": 3})
    with pytest.raises(RequestError, match=r"run of another scenario for cell 'sgd, seed 0, device 0'"):
        run(plan(tmp_path / "out", given=other), resume=True)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.tex").write_text("")
    with pytest.raises(RequestError, match=r"holds other files \(thesis.tex\)"):
        run(plan(tmp_path / "strange"))


def test_cells_can_be_added_to_a_sweep(tmp_path):
    made(tmp_path / "out")
    run(plan(tmp_path / "out", seeds=3), only_table=True)
    assert "| sgd | 2 | 30.00" in (tmp_path / "out" / "summary.md").read_text(), "the third seed has not run yet"


def test_a_record_that_is_damaged_is_refused(tmp_path):
    sweep = made(tmp_path / "out")
    (tmp_path / "out" / "sweep.json").write_text("{")
    with pytest.raises(RequestError, match=r"sweep.json cannot be read"):
        run(sweep, resume=True)


@pytest.mark.parametrize("name", ["n" * 300, "file/below"])
def test_a_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "small.yaml").write_text(scenario().to_yaml())
    sweep = make_sweep(SweepDescription(), tmp_path / "small.yaml", [], tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot be written to"):
        run(sweep)


def test_the_remains_of_a_half_replaced_sweep_are_not_results(tmp_path, monkeypatch):
    """`--overwrite` was killed after sweep.json was gone: the old results must not enter the new summary."""
    sweep = made(tmp_path / "out")
    (tmp_path / "out" / "sweep.json").unlink()
    with pytest.raises(RequestError, match="holds other files"):  # without our marker it may be the user's
        run(sweep)
    assert RunFolder(sweep.run_folder(sweep.cells[0])).results() is not None
    (tmp_path / "out" / ".lock").touch()
    seen = []
    monkeypatch.setattr("simulations.sweeps.engine.run_cells", lambda sweep, jobs, console: seen.append(sweep) or {})
    monkeypatch.setattr("simulations.sweeps.engine._measure_memory", lambda sweep, console: {})
    run(sweep)
    assert len(seen) == 1
    assert RunFolder(sweep.run_folder(sweep.cells[0])).results() is None
    assert "| sgd | 0 | –" in (tmp_path / "out" / "summary.md").read_text()


def test_a_sweep_that_another_process_runs_is_left_alone(tmp_path):
    sweep = made(tmp_path / "out")
    with (
        RunFolder(tmp_path / "out").locked(),
        pytest.raises(RequestError, match="another process is working on this run"),
    ):
        run(sweep, overwrite=True)
    assert (tmp_path / "out" / "sweep.json").exists()


@pytest.mark.slow
def test_a_killed_sweep_continues_and_ends_with_the_summary(tmp_path):
    """Real runs in real processes: two methods, two seeds, killed after the first run."""
    file, out = tmp_path / "tiny.yaml", tmp_path / "sweep"
    file.write_text(scenario().to_yaml())
    command = [sys.executable, "-m", "simulations.main", "sweep", str(file), "--preset", "table1", "--seeds", "2"]
    command += ["--only", "er", "--only", "lightcl", "--out", str(out)]
    first = out / "runs" / "er-seed-0-device-0" / "results.json"
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 300
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()  # the sweep alone: its run must not live on
    process.wait()
    before = first.stat().st_mtime
    assert not (out / "summary.md").exists()
    subprocess.run([*command, "--resume"], check=True)
    assert first.stat().st_mtime == before
    rows = json.loads((out / "summary.json").read_text())
    assert [(row["name"], row["seeds"]) for row in rows] == [("er", 2), ("lightcl", 2)]
    assert all(row["memory_measured_bytes"] > 0 and row["cil average_accuracy"]["mean"] > 0 for row in rows)

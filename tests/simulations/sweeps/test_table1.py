"""`lightcl bench table1`: what it runs, what it refuses, and the table it makes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from lightcl.errors import RequestError
from lightcl.metrics import Spread
from lightcl.records import Figures, Results
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario, method_names
from simulations.reports.plots import LIGHT, accuracy_over_memory, png
from simulations.sweeps.table1 import Plan, Row, _carry_out, _command, bench_run, table

QUIET = Console(quiet=True)
SHARING = {"name": "lightcl-plus", "share_statistics": True}


def scenario(**sections) -> Scenario:
    small = {"network": {"weights": "none", "width": 4}, "stream": {"tasks": 2}, "fleet": {"devices": 1}}
    training = {"training": {"epochs": 1, "batch_size": 64}}
    return Scenario.model_validate(small | training | sections)


def plan(folder: Path, *methods: str, seeds: int = 2, device: int | None = 0) -> Plan:
    return Plan(scenario(), methods, tuple(range(seeds)), device, folder)


def bench(folder: Path, **options) -> None:
    given = {"seeds": 1, "methods": "sgd", "device": None, "jobs": 1, "resume": False, "overwrite": False}
    given |= {"only_table": False, "command": "lightcl bench table1 ..."}
    bench_run(options.pop("scenario", scenario()), out_folder=folder, console=QUIET, **(given | options))


def results(til: float, cil: float | None) -> str:
    def figures(mean: float) -> Figures:
        spreads = (Spread(value, 0.0, value, value) for value in (mean, 0.5 - mean / 2, 0.0))
        return Figures(*spreads)

    found = Results(
        devices=1, devices_finished=1, dropped={}, rounds=1, til=figures(til),
        cil=None if cil is None else figures(cil), bytes_down=0, bytes_up=0, seconds=8.0,
    )  # fmt: skip
    return json.dumps(found.to_json())


def made(folder: Path) -> Plan:
    """A benchmark whose runs are complete, with figures that are easy to check."""
    planned = plan(folder, "sgd", "pnn")
    for (method, seed), text in {
        ("sgd", 0): results(0.5, 0.2), ("sgd", 1): results(0.7, 0.3),
        ("pnn", 0): results(0.8, None), ("pnn", 1): results(0.8, None),
    }.items():  # fmt: skip
        planned.run_folder(method, seed).mkdir(parents=True)
        (planned.run_folder(method, seed) / "results.json").write_text(text)
    start = {"command": "lightcl bench table1 x", "git_commit": "abc", "libraries": {"torch": "2"}, "machine": "Linux"}
    about = {"starts": [start], "scenario": planned.scenario.model_dump(mode="json"), "device": 0}
    (folder / "bench.json").write_text(json.dumps(about))
    mib = 2**20
    sizes = {
        name: {"theory": {"training_flops": 3e12, "peak": 10 * mib}, "measured": {"training": measured * mib}}
        for name, measured in (("sgd", 10), ("pnn", 25))
    }
    (folder / "footprint.json").write_text(json.dumps(sizes))
    return planned


def test_the_table_by_hand(tmp_path):
    made(tmp_path)
    bench(tmp_path, methods="sgd,pnn", seeds=2, only_table=True)
    text = (tmp_path / "table1.md").read_text()
    assert "    lightcl bench table1 x" in text
    assert "digits, 2 tasks x 2 classes, 1 epoch a task" in text
    assert "Not as in the scenario" not in text
    # sgd: CIL 20 and 30, TIL 50 and 70; deviations of a sample of two: half the difference times the root of two.
    assert "| sgd | 2 | 25.00 ± 7.07 | 60.00 ± 14.14 | 37.50 ± 3.54 | 20.00 ± 7.07 | 3.0 | 10.0 | 10.0 | 1.00 |" in text
    assert "| pnn | 2 | – | 80.00 ± 0.00 | – | 10.00 ± 0.00 | 3.0 | 10.0 | 25.0 | 2.50 | 2.50 | 8 |" in text
    assert (tmp_path / "table1.png").read_bytes().startswith(b"\x89PNG")
    assert [row["method"] for row in json.loads((tmp_path / "table1.json").read_text())] == ["sgd", "pnn"]


def test_runs_that_lost_devices_are_named_in_the_table_and_tried_again(tmp_path, monkeypatch):
    planned = made(tmp_path)
    file = planned.run_folder("sgd", 1) / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dropped": {"4": "why", "3": "why", "10": "why"}}))
    said = table(planned, [])
    assert said.endswith("\nsgd, seed 1: without devices 3–4, 10, dropped from the run; `--resume` tries again\n")
    asked = []
    monkeypatch.setattr("simulations.sweeps.table1._Runner.run", lambda self, command, log: asked.append(log.stem) or 0)
    assert _carry_out(planned, 1, QUIET) == {}, "it may lose them again"
    assert asked == ["sgd-seed-1"]


def test_the_table_says_what_of_the_scenario_a_method_could_not_keep(tmp_path):
    planned = made(tmp_path)
    given = scenario(server={"aggregation": "suffix"})
    told = table(Plan(given, planned.methods, planned.seeds, None, tmp_path), [])
    assert "Not as in the scenario: server.aggregation is none, not suffix, for pnn." in told


def test_what_is_missing_in_the_table_is_a_dash(tmp_path):
    planned = made(tmp_path)
    empty = Row(
        "er", 0, {f"{s} {k}": None for s in ("cil", "til") for k in ("average_accuracy", "forgetting")}, *[None] * 4
    )
    assert "| er | 0 | – | – | – | – | – | – | – | – | – | – |" in table(planned, [empty])


def test_every_method_is_a_column_by_default_and_takes_its_own_defaults(tmp_path):
    planned = plan(tmp_path, *method_names())
    assert [planned.variant(name).method.name for name in planned.methods] == method_names()
    assert planned.variant("sgd").network.freeze is None


def test_complete_runs_are_not_run_again_and_begun_ones_go_on(tmp_path):
    planned = made(tmp_path)
    assert _carry_out(planned, 1, QUIET) == {}  # nothing is left to run
    begun = plan(tmp_path / "other", "sgd")
    assert "--resume" not in _command(begun, "sgd", 0)
    begun.run_folder("sgd", 0).mkdir(parents=True)
    (begun.run_folder("sgd", 0) / "run.json").write_text("{}")
    assert _command(begun, "sgd", 0)[-1] == "--resume"


def test_a_fleet_is_simulated_and_a_device_trained(tmp_path):
    assert _command(plan(tmp_path, "sgd", device=None), "sgd", 1)[3:5] == [
        "simulate",
        str(tmp_path / "scenarios/sgd.yaml"),
    ]
    assert _command(plan(tmp_path, "sgd", device=0), "sgd", 1)[3:6] == ["train", "--device", "0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "sdg"}, "unknown method 'sdg', did you mean 'sgd'"),
        ({"methods": ""}, "unknown method ''"),
        ({"device": 1}, r"--device 1: the fleet has 1 device \(allowed: 0 to 0\)"),
        ({"resume": True}, "holds no benchmark to go on with"),
        ({"only_table": True}, "holds no benchmark to go on with"),
        ({"scenario": scenario(stream={"tasks": 6})}, "need 12 classes"),
        ({"scenario": scenario(network={"freeze": "auto"}), "methods": "lightcl"}, "chosen anew for every seed"),
        ({"scenario": scenario(method=SHARING), "methods": "lightcl-plus"}, "share_statistics needs a fleet"),
    ],
)
def test_wrong_requests_are_refused_and_nothing_is_written(tmp_path, options, message):
    with pytest.raises(RequestError, match=message):
        bench(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_another_benchmark_is_neither_overwritten_nor_resumed(tmp_path):
    made(tmp_path)
    with pytest.raises(RequestError, match="holds a benchmark; go on with --resume or replace it"):
        bench(tmp_path)
    with pytest.raises(RequestError, match="another scenario"):
        bench(tmp_path, resume=True, scenario=scenario(seed=3))
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.tex").write_text("")
    with pytest.raises(RequestError, match=r"holds other files \(thesis.tex\)"):
        bench(tmp_path / "strange")


@pytest.mark.parametrize("name", ["n" * 300, "file/below"])
def test_a_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot be written to"):
        bench(tmp_path / name)


def test_what_a_half_replaced_benchmark_left_is_no_result(tmp_path, monkeypatch):
    """`--overwrite` was killed after bench.json was gone: the old results must not enter the new table."""
    planned = made(tmp_path)
    (tmp_path / "bench.json").unlink()
    with pytest.raises(RequestError, match="holds other files"):  # without our marker it may be the user's
        bench(tmp_path, methods="sgd,pnn", seeds=2)
    assert planned.results("sgd", 0) is not None
    (tmp_path / ".lock").touch()
    seen = []
    monkeypatch.setattr("simulations.sweeps.table1._carry_out", lambda plan, jobs, console: seen.append(plan) or {})
    monkeypatch.setattr("simulations.sweeps.table1._measure", lambda plan, console: {})
    bench(tmp_path, methods="sgd,pnn", seeds=2)
    assert len(seen) == 1
    assert planned.results("sgd", 0) is None
    assert "| sgd | 0 | –" in (tmp_path / "table1.md").read_text()


def test_a_benchmark_that_another_process_runs_is_left_alone(tmp_path):
    made(tmp_path)
    with RunFolder(tmp_path).held(), pytest.raises(RequestError, match="another process is at work"):
        bench(tmp_path, methods="sgd,pnn", seeds=2, overwrite=True)
    assert (tmp_path / "bench.json").exists()


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_and_ends_with_the_table(tmp_path):
    """Real runs in real processes: two methods, two seeds, killed after the first run."""
    file, out = tmp_path / "tiny.yaml", tmp_path / "bench"
    file.write_text(scenario().to_yaml())
    command = [sys.executable, "-m", "simulations.main", "bench", "table1", str(file), "--seeds", "2"]
    command += ["--methods", "er,lightcl", "--out", str(out)]
    first = out / "runs" / "er-seed-0" / "results.json"
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 300
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()  # the benchmark alone: its run must not live on
    process.wait()
    before = first.stat().st_mtime
    assert not (out / "table1.md").exists()
    subprocess.run([*command, "--resume"], check=True)
    assert first.stat().st_mtime == before
    rows = json.loads((out / "table1.json").read_text())
    assert [(row["method"], row["seeds"]) for row in rows] == [("er", 2), ("lightcl", 2)]
    assert all(row["memory_measured_bytes"] > 0 and row["cil average_accuracy"]["mean"] > 0 for row in rows)


def test_the_pictures_panels_keep_apart_and_every_point_lies_between_two_ticks():
    accuracies = {"sgd": 0.4396, "joint": 0.7528, "lightcl-sparse": 0.2275}
    points = {s: {name: (30.0, mean, 0.02) for name, mean in accuracies.items()} for s in ("cil", "til")}
    figure = accuracy_over_memory(points, LIGHT)
    assert png(figure)  # draws it
    left, right = figure.axes
    assert right.get_tightbbox().x0 - left.get_window_extent().x1 > 20  # pixels, at 192 an inch
    for axes in figure.axes:
        shown = [tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
        assert shown[0] <= 20.75
        assert shown[-1] >= 77.28


def test_a_perfect_accuracy_ends_the_axis_at_100():
    figure = accuracy_over_memory({"til": {"sgd": (3.0, 1.0, 0.0), "er": (4.0, 0.97, 0.01)}}, LIGHT)
    assert figure.axes[0].get_ylim()[1] == 100
    alone = accuracy_over_memory({"til": {"sgd": (3.0, 0.0, float("nan"))}}, LIGHT).axes[0].get_ylim()
    assert alone[0] == 0 < alone[1]

"""Runs side by side, from run folders made by hand; every expected figure is worked out from the rows below."""

from __future__ import annotations

import html
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightcl.errors import RequestError
from lightcl.metrics import Spread
from lightcl.records import DeviceRow, Figures, Results, RoundRow
from lightcl.records.folder import DEVICES, ROUNDS, RunFolder
from lightcl.scenario import Scenario, Stream
from simulations.commands.compare import By, collect, compare, find_baseline, print_comparison
from simulations.reports.comparison import (
    Group,
    build_comparison,
    difference,
    drawings_of,
    group_runs,
    markdown,
    pairing_problems,
    to_json,
)
from simulations.reports.comparison import compare as compare_groups
from simulations.reports.run_figures import read_figures
from simulations.reports.statistics import Difference

ENDS = {"sgd": [[0.4, 0.8], [0.2, 0.6]], "lightcl": [[0.8, 0.8], [0.5, 0.7]]}
"""`[device]`: TIL accuracies at the end; CIL is half of them. Both tasks were learned to 0.9 at first.

SGD: 0.6 and 0.4 on average, forgetting 0.5 and 0.7. LightCL: 0.8 and 0.6, forgetting 0.1 and 0.4.
"""


def make_run(path: Path, method: str, *, seed: int = 0, alpha: float | None = None, dropped: tuple[int, ...] = (),
             finish: bool = True, shift: float = 0.0, train: int = 0, aggregation: str = "none",
             images: tuple[int, int] = (5, 5), joules: float = 0.0) -> Path:  # fmt: skip
    """`images[device]`: training images of each task. `joules`: of device 0 per task; device 1 has half of it."""
    fleet = {"devices": 2} | ({"partition": "dirichlet", "alpha": alpha} if alpha else {})
    scenario = Scenario.model_validate(
        {
            "name": "by-hand",
            "seed": seed,
            "stream": {"tasks": 2},
            "fleet": fleet,
            "method": {"name": method},
            "server": {"aggregation": aggregation},
        }
    )
    folder = RunFolder(path)
    partition = [{"device": d, "train": [train, d], "test": [9]} for d in range(2)]
    folder.begin(scenario, {"run": "r", "kind": "fleet", "command": "lightcl simulate x"}, partition)
    for task in range(2):
        rows: list[dict[str, Any]] = []
        for device, end in enumerate(ENDS[method]):
            row = {"round": task + 1, "device": device, "name": f"d{device}", "task": task, "epochs": 1}
            row |= {"bytes_down": 0, "bytes_up": 0, "timing": {"peak_memory_mib": 500.0 + device + task}}
            if joules:
                row["timing"]["energy_joules"] = joules / (device + 1)
            if device not in dropped:
                til = [value + shift for value in ([0.9], end)[task]]
                row |= {"examples": images[device], "loss": 1.0, "til": til, "cil": [v / 2 for v in til]}
            rows.append(row)
        folder.append(DEVICES, [DeviceRow.from_json(row) for row in rows])
        timing = {"train_seconds": 3.0, "seconds": 5.0}
        row = {"round": task + 1, "task": task, "devices": 2, "failed": 0, "devices_finished": 0, "timing": timing}
        folder.append(ROUNDS, [RoundRow.from_json(row | {"bytes_down": 1_000_000, "bytes_up": 2_000_000})])
    if finish:
        spread = Spread.of([0.5])
        folder.finish(
            Results(2, 2, dict.fromkeys(dropped, "why"), 2, Figures(spread, spread, spread), None, 0, 0, 10.0)
        )
    return path


def group(*paths: Path, label: str = "g", step: int | None = None) -> Group:
    return Group(label, tuple(map(read_figures, paths)), step)


def text_of(page: Path) -> str:
    source = re.sub(r"<style>.*?</style>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", source)).split())


def test_energy_per_learned_task_is_compared_where_it_was_measured(tmp_path):
    measured = group(make_run(tmp_path / "a", "sgd", joules=3000.0), label="sgd")
    other = group(make_run(tmp_path / "b", "lightcl"), label="lightcl")
    assert measured.runs[0].joules == {0: 3000.0, 1: 1500.0}
    comparison = build_comparison([measured, other], tmp_path / "c", title="t")
    (first, second) = to_json(comparison)["groups"]
    assert (first["joules_per_task"]["mean"], second["joules_per_task"]) == (2250.0, None)
    table = markdown(comparison)
    assert "| energy per learned task |" in table
    assert "| 2.25\u00a0kJ ± 750.0\u00a0J |" in table
    assert "2.25 kJ ± 750.0 J" in text_of(tmp_path / "c" / "comparison.html")
    without = compare_groups([other, group(make_run(tmp_path / "d", "sgd"), label="sgd")], title="t")
    assert "energy" not in markdown(without)


def test_a_run_is_read(tmp_path):
    run = read_figures(make_run(tmp_path / "a", "sgd"))
    assert run.figures["til average_accuracy"] == pytest.approx({0: 0.6, 1: 0.4})
    assert run.figures["til forgetting"] == pytest.approx({0: 0.5, 1: 0.7})
    assert run.figures["cil average_accuracy"] == pytest.approx({0: 0.3, 1: 0.2})
    assert run.curve("til") == pytest.approx([0.9, 0.5])
    assert (run.bytes_down, run.bytes_up, run.seconds, run.process_mib) == (2_000_000, 4_000_000, 10.0, 502.0)
    assert (run.device, run.complete, run.devices) == (None, True, [0, 1])


def test_pairs_of_device_and_seed_by_hand(tmp_path):
    sgd = group(make_run(tmp_path / "a", "sgd"))
    lightcl = group(make_run(tmp_path / "b", "lightcl"))
    assert pairing_problems(lightcl, sgd) == []
    found = difference(lightcl, sgd, "til", "forgetting")
    # 0.1 - 0.5 and 0.4 - 0.7: mean -0.35, error 0.05; t(0.975, 1) = 12.7062.
    assert found is not None
    assert (found.paired, found.count) == (True, 2)
    assert found.mean == pytest.approx(-0.35)
    assert found.low == pytest.approx(-0.35 - 12.7062 * 0.05, abs=1e-4)
    gained = difference(lightcl, sgd, "til", "average_accuracy")
    assert gained is not None
    assert gained.mean == pytest.approx(0.2)
    assert gained.clear, "both devices gain 20 points"


def test_runs_that_differ_only_in_seed_are_one_group(tmp_path):
    paths = [make_run(tmp_path / f"{m}-{s}", m, seed=s, shift=s / 100) for m in ENDS for s in (0, 1)]
    groups = group_runs([read_figures(path) for path in paths])
    assert [(g.label, g.seeds) for g in groups] == [("sgd", [0, 1]), ("lightcl", [0, 1])]
    mean = groups[0].mean("til", "average_accuracy")
    # 0.6, 0.4 and one point more each: 0.505 over four.
    assert mean is not None
    assert (mean.mean, mean.count) == (pytest.approx(0.505), 4)
    twice = group_runs([read_figures(paths[0]), read_figures(make_run(tmp_path / "again", "sgd"))])
    assert [g.label for g in twice] == ["sgd-0", "again"], "the same seed again is another group"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"alpha": 0.5}, "fleet.partition is dirichlet and iid"),
        ({"seed": 1}, "the seeds are 1 and 0"),
        ({"train": 7}, "partition.json assigns different images to the devices"),
    ],
)
def test_incomparable_runs_are_compared_without_pairs_and_with_a_warning(tmp_path, options, problem):
    sgd = group(make_run(tmp_path / "a", "sgd"), label="sgd")
    other = group(make_run(tmp_path / "b", "lightcl", **options), label="lightcl")
    assert problem in pairing_problems(other, sgd)
    found = difference(other, sgd, "til", "average_accuracy")
    assert found is not None
    assert not found.paired
    assert found.mean == pytest.approx(0.2)
    # Variances 0.02 each, over two: together 0.02; Welch's 2 degrees of freedom: t(0.975, 2) = 4.302653.
    assert found.high == pytest.approx(0.2 + 4.302653 * 0.02**0.5, abs=1e-5)
    comparison = build_comparison([sgd, other], tmp_path / "out", title="t")
    assert problem in comparison.warnings[0]
    assert "unpaired" in text_of(tmp_path / "out" / "comparison.html")


def test_a_dropped_device_leaves_the_other_pairs(tmp_path):
    sgd = group(make_run(tmp_path / "a", "sgd"), label="sgd")
    other = group(make_run(tmp_path / "b", "lightcl", dropped=(1,)), label="lightcl")
    comparison = build_comparison([sgd, other], tmp_path / "out", title="t")
    found = comparison.differences["lightcl"]["til average_accuracy"]
    assert found is not None
    assert (found.count, found.paired) == (1, True)
    assert comparison.warnings == [
        "lightcl and sgd: 1 results have no partner (a device or a seed that did not finish); 1 pairs are left",
        "lightcl: b dropped device 1",
    ]


def sharing(folder: Path) -> tuple[Group, Group]:
    """Isolated SGD, and LightCL that shares its suffix, over two seeds; the second seed of LightCL is 10 points higher.

    LightCL gains 20 points on each device with seed 0, 30 with seed 1. Device 0 has 10 images, device 1 80.
    """
    images = (5, 40)
    alone = [make_run(folder / f"a{s}", "sgd", seed=s, images=images) for s in (0, 1)]
    together = [
        make_run(folder / f"b{s}", "lightcl", seed=s, images=images, shift=0.1 * s, aggregation="suffix")
        for s in (0, 1)
    ]
    return group(*alone, label="SGD, isolated"), group(*together, label="SGD, suffix")


def test_where_devices_share_weights_the_seeds_are_compared_too(tmp_path):
    alone, together = sharing(tmp_path)
    comparison = build_comparison([alone, together], tmp_path / "out", title="t")
    found = comparison.over_seeds["SGD, suffix"]["til average_accuracy"]
    # Seeds' means: +20 and +30: 25, standard error 5; t(0.975, 1) = 12.7062.
    assert found is not None
    assert (found.mean, found.count) == (pytest.approx(0.25), 2)
    assert found.low == pytest.approx(0.25 - 12.7062 * 0.05, abs=1e-5)
    pairs = comparison.differences["SGD, suffix"]["til average_accuracy"]
    assert pairs is not None
    assert (pairs.count, pairs.clear, found.clear) == (4, True, False)
    assert "SGD, suffix SGD, isolated 2 +25.0 −38.5 … +88.5" in text_of(tmp_path / "out" / "comparison.html")
    assert comparison.short_label("SGD, suffix") == "suffix"
    nothing_shared = compare_groups([alone, group(make_run(tmp_path / "c", "lightcl"))], title="t")
    assert nothing_shared.over_seeds == {}


def test_a_breakdown_by_images_by_hand(tmp_path):
    from simulations.reports.breakdown import break_down, breakdown_tables

    comparison = compare_groups(list(sharing(tmp_path)), title="t")
    found = break_down(comparison, "images")
    assert [c.name for c in found.classes] == ["10–19", "50–99"]
    few, many = found.levels["til average_accuracy"]["SGD, suffix"]
    # LightCL's ends are 80 and 60 % for the two devices, with seed 1 ten points more.
    assert few is not None
    assert many is not None
    assert (few.mean, many.mean, few.count) == (pytest.approx(0.85), pytest.approx(0.65), 2)
    gained = found.gains["til forgetting"]["SGD, suffix"][0]
    # SGD forgets 50 points on device 0, LightCL 10; with seed 1 everything is ten points higher: 10 as well.
    assert gained is not None
    assert (gained.mean, gained.count) == (pytest.approx(-0.4), 2)
    title, headings, rows = breakdown_tables(comparison, found)[1]
    assert "TIL average accuracy by training images of the device: difference" in title
    assert headings == ["run", "minus", "10–19", "50–99"]
    assert rows == [["SGD, suffix", "SGD, isolated", *["+25.0 [−38.5, +88.5] (2)"] * 2]]
    tasks = break_down(comparison, "tasks")
    assert [c.name for c in tasks.classes] == ["2"]


def test_differences_are_drawn_over_pairs_and_over_seeds():
    from simulations.reports.plots import DARK, LIGHT, differences_of_runs, gains_by_class, png

    pairs = Difference(0.1, 0.01, 0.08, 0.12, 300, paired=True)
    seeds = Difference(0.1, 0.05, -0.02, 0.22, 3, paired=True)
    rows = {"A, suffix": (pairs, seeds), "A, head": (pairs, None), "B, suffix": (pairs, pairs)}
    labels = {"A, suffix": "suffix", "A, head": "head", "B, suffix": "suffix"}
    baselines = {"A, suffix": "A, alone", "A, head": "A, alone", "B, suffix": "B, alone"}
    figure = differences_of_runs({"til": rows, "cil": {"A, head": (pairs, None)}}, labels, baselines, LIGHT)
    assert png(figure)
    left = figure.axes[0]
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "suffix", "head", "suffix", "A, alone", "B, alone",
    ]  # fmt: skip
    colors = [line.get_color() for line in left.lines if line.get_marker() == "o"]
    assert colors[0] == LIGHT.muted, "the seeds leave it open"
    assert colors[1] == colors[2] != LIGHT.muted
    figure = gains_by_class({"A": {"x": [pairs, None], "y": [None, seeds]}}, ["1–9", "10+"], "images", "gain", DARK)
    assert png(figure)


def test_a_seed_that_one_side_lacks_leaves_the_pairs_of_the_others(tmp_path):
    sgd = group(*(make_run(tmp_path / f"a{s}", "sgd", seed=s) for s in (0, 1)), label="sgd")
    other = group(make_run(tmp_path / "b", "lightcl", seed=1), label="lightcl")
    comparison = compare_groups([sgd, other], title="t")
    found = comparison.differences["lightcl"]["til average_accuracy"]
    assert found is not None
    assert (found.paired, found.count) == (True, 2)
    assert "2 results have no partner" in comparison.warnings[0]


def test_the_page_and_its_numbers(tmp_path):
    groups = [group(make_run(tmp_path / "a", "sgd"), label="sgd", step=2**20 * 30)]
    groups += [group(make_run(tmp_path / "b", "lightcl"), label="lightcl", step=2**20 * 15)]
    (tmp_path / "a" / "report.html").touch()
    comparison = build_comparison(groups, tmp_path / "out", title="Ten <devices>", command="lightcl compare a b")
    page = text_of(tmp_path / "out" / "comparison.html")
    assert "Ten <devices>" in page
    # TIL, CIL, forgetting of both; 30 MiB; bytes and time. Where a step was measured the process is not shown.
    assert "sgd 1 (0) 2 50.0 ± 10.0 25.0 ± 5.0 60.0 ± 10.0 30.0 ± 5.0 30.0 2.0 MB, 4.0 MB 10.0 s" in page
    assert "lightcl sgd 2 +20.0 +20.0 … +20.0 +10.0 +10.0 … +10.0 −35.0 −98.5 … +28.5 −17.5 −49.3 … +14.3" in page
    assert "method.name sgd lightcl" in page
    source = (tmp_path / "out" / "comparison.html").read_text()
    assert 'href="../a/report.html"' in source
    assert source.count("data:image/png") == 16, "four pictures, light and dark, wide and narrow"
    assert "http" not in re.sub(r"data:image[^\"]*", "", source), "the page needs nothing but itself"
    names = sorted(file.name for file in (tmp_path / "out" / "plots").iterdir())
    assert names == [
        "compare-accuracy.png", "compare-differences.png", "compare-forgetting.png", "compare-memory.png",
    ]  # fmt: skip
    values = json.loads(json.dumps(to_json(comparison), allow_nan=False))
    assert values["groups"][1]["differences"]["til forgetting"]["mean"] == pytest.approx(-0.35)
    assert values["groups"][0]["differences"] == {}


def test_the_page_claims_no_pairs_and_no_common_stream_where_there_are_none(tmp_path):
    runs = [make_run(tmp_path / "a", "sgd"), make_run(tmp_path / "b", "lightcl", alpha=0.5)]
    build_comparison([group(run, label=run.name) for run in runs], tmp_path / "out", title="t")
    page = text_of(tmp_path / "out" / "comparison.html")
    assert "2 tasks of 2 classes" in page
    assert "Dots: difference in average accuracy. Thick lines: its 95 % interval, over pairs where the table" in page
    assert "on the same device and seed" not in page

    one, other = (read_figures(run) for run in runs)
    scenario = other.scenario.model_copy(update={"stream": Stream(tasks=2, classes_per_task=3)})
    groups = [Group("a", (one,)), Group("b", (replace(other, scenario=scenario),))]
    build_comparison(groups, tmp_path / "out", title="t")
    page = text_of(tmp_path / "out" / "comparison.html")
    assert "2 tasks" in page
    assert "classes" not in page.partition("2 variants")[0]
    paired = [group(make_run(tmp_path / "c", "lightcl"), label="c"), group(runs[0], label="a")]
    build_comparison(paired, tmp_path / "out", title="t")
    assert "on the same device and seed" in text_of(tmp_path / "out" / "comparison.html")


def test_the_command(tmp_path, capsys):
    runs = [make_run(tmp_path / m, m) for m in ENDS]
    compare(runs, out_folder=tmp_path / "out")
    out = " ".join(capsys.readouterr().out.split())
    assert "lightcl" in out
    assert "page: " in out
    assert "| lightcl | sgd | 2 | +20.0 [+20.0, +20.0] |" in (tmp_path / "out" / "comparison.md").read_text()
    assert "replaces" not in out
    compare(runs, out_folder=tmp_path / "out", baseline="lightcl")  # a comparison can be made again
    assert "| sgd | lightcl | 2 | −20.0" in (tmp_path / "out" / "comparison.md").read_text()
    assert "comparison.html (replaces the comparison that was there)" in " ".join(capsys.readouterr().out.split())


def test_the_baseline_by_the_name_or_the_path_of_its_folder(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / "one" / "first", "sgd"), make_run(tmp_path / "two" / "second", "lightcl")]
    runs.append(make_run(tmp_path / "two" / "first", "lightcl", alpha=0.5))
    groups = collect(runs)
    labels = [g.label for g in groups]
    assert find_baseline("second", groups) == labels[1]
    assert find_baseline(str(runs[2]), groups) == labels[2]
    monkeypatch.chdir(tmp_path)
    assert find_baseline("one/first/", groups) == labels[0]
    with pytest.raises(RequestError, match="--baseline: 'first' is the folder of several; give its path"):
        find_baseline("first", groups)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_headings_and_names_are_not_cut_off_in_the_terminal(tmp_path, width):
    groups = [group(make_run(tmp_path / "a", "sgd"), label="sgd", step=2**20 * 30)]
    groups += [group(make_run(tmp_path / "b", "lightcl"), label="lightcl-quickstart-sparse", step=2**20 * 15)]
    console = Console(width=width, record=True, file=io.StringIO())
    print_comparison(build_comparison(groups, tmp_path / "out", title="t"), console)
    lines = console.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    words = " ".join(lines).split()
    for word in ("seeds", "devices", "forgetting", "memory", "(MiB)", "lightcl-quickstart-sparse", "pairs", "minus"):
        assert word in words
    assert "±" in words
    assert sum("time" in line for line in lines) == 1, "every column stands in one table"


def test_wrong_requests_are_refused(tmp_path):
    run = make_run(tmp_path / "a", "sgd")
    with pytest.raises(
        RequestError,
        match=r"at least two .*\(runs of one scenario, with other seeds or for other devices alone, are one\)",
    ):
        compare([run], out_folder=tmp_path / "out")
    with pytest.raises(RequestError, match=r"nothing does not exist; name a run folder"):
        compare([run, tmp_path / "nothing"], out_folder=tmp_path / "out")
    other = make_run(tmp_path / "b", "lightcl")
    with pytest.raises(RequestError, match="--baseline: there is no 'lightcl2', did you mean 'lightcl'"):
        compare([run, other], out_folder=tmp_path / "out", baseline="lightcl2")
    with pytest.raises(RequestError, match="holds other files"):
        compare([run, other], out_folder=tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_runs_of_a_sweep_folder(tmp_path):
    sweep = tmp_path / "sweep"
    runs = [make_run(sweep / "runs" / f"{m}-seed-0", m) for m in ENDS]
    points = [{"label": m, "runs": [f"runs/{m}-seed-0", f"runs/{m}-seed-1"]} for m in ENDS]
    (sweep / "sweep.json").write_text(json.dumps({"points": points, "starts": []}))
    sizes = {"sgd": {"measured": {"training": 30 * 2**20}}}
    (sweep / "footprint.json").write_text(json.dumps(sizes))
    groups = collect([sweep])
    assert [(g.label, len(g.runs), g.step_bytes) for g in groups] == [("sgd", 1, 30 * 2**20), ("lightcl", 1, None)]
    assert groups[0].runs[0].path == runs[0]
    for point, base in zip(points, ("lightcl", "lightcl"), strict=True):
        point["baseline"] = base
    (sweep / "sweep.json").write_text(json.dumps({"points": points, "starts": []}))
    compare([sweep], out_folder=tmp_path / "out", by=By.images)
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| sgd | lightcl | 2 | −20.0" in text, "the sweep says what its points are compared with"
    assert "| sgd | lightcl | −20.0 [−20.0, −20.0] (2) |" in text
    values = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert values["by_images"]["classes"] == ["10–19"]
    assert values["by_images"]["differences"]["til forgetting"]["sgd"][0]["count"] == 2
    names = [file.name for file in (tmp_path / "out" / "plots").iterdir()]
    assert {"compare-til-by-images.png", "compare-cil-by-images.png"} < set(names)
    assert "TIL average accuracy by training images of the device" in text_of(tmp_path / "out" / "comparison.html")
    (sweep / "sweep.json").write_text("{}")
    with pytest.raises(RequestError, match=r"sweep.json: cannot be read"):
        collect([sweep])


def test_a_panel_for_each_setting_and_a_bar_for_each_run():
    from simulations.reports.plots import DARK, LIGHT, accuracy_of_runs, accuracy_over_memory, forgetting_of_runs, png

    curves = {"til": {"a": [0.9, 0.8], "b": [float("nan"), 0.7]}, "cil": {"a": [0.5, 0.4]}}
    figure = accuracy_of_runs(curves, {"til": 0.5, "cil": 0.1}, LIGHT)
    assert png(figure)
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines[:2]] == [[90.0, 80.0], [70.0]]
    assert len(right.lines) == 2, "one run and the chance line"
    bars = forgetting_of_runs({"til": {"a": (0.1, 0.02), "b": (0.3, float("nan"))}}, DARK)
    assert [round(bar.get_width(), 6) for bar in bars.axes[0].patches] == [10.0, 30.0]
    accuracies = {"sgd": 0.4396, "joint": 0.7528, "lightcl-sparse": 0.2275}
    points = {s: {name: (30.0, mean, 0.02) for name, mean in accuracies.items()} for s in ("cil", "til")}
    figure = accuracy_over_memory(points, LIGHT)
    assert png(figure)  # draws it
    left, right = figure.axes
    assert right.get_tightbbox().x0 - left.get_window_extent().x1 > 20  # pixels, at 192 per inch
    for axes in figure.axes:
        shown = [tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
        assert shown[0] <= 20.75
        assert shown[-1] >= 77.28


def test_panels_stand_one_below_the_other_on_a_narrow_screen(tmp_path):
    from simulations.reports.plots import LIGHT

    groups = [group(make_run(tmp_path / m, m), label=m, step=2**20) for m in ENDS]
    drawings = drawings_of(compare_groups(groups, title="t"))
    assert len(drawings) == 4
    for drawing in drawings:
        wide, narrow = drawing.draw(LIGHT), drawing.draw_narrow(LIGHT)
        assert narrow.get_figwidth() < 5 < wide.get_figwidth()
        for figure, stacked in ((wide, False), (narrow, True)):
            places = [axes.get_position() for axes in figure.axes]
            assert bool(places[0].x0 == places[1].x0) is stacked, drawing.name
            assert bool(places[0].y0 > places[1].y0) is stacked
    build_comparison(groups, tmp_path / "out", title="t")
    assert (tmp_path / "out" / "comparison.html").read_text().count('media="(max-width: 600px)') == 8


def test_a_perfect_accuracy_ends_the_axis_at_100():
    from simulations.reports.plots import LIGHT, accuracy_over_memory

    figure = accuracy_over_memory({"til": {"sgd": (3.0, 1.0, 0.0), "er": (4.0, 0.97, 0.01)}}, LIGHT)
    assert figure.axes[0].get_ylim()[1] == 100
    alone = accuracy_over_memory({"til": {"sgd": (3.0, 0.0, float("nan"))}}, LIGHT).axes[0].get_ylim()
    assert alone[0] == 0 < alone[1]

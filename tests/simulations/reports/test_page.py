"""The report of hand-made run folders; every expected figure is worked out by hand from the rows below."""

from __future__ import annotations

import base64
import csv
import html
import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lightcl.analysis.generalizability import BlockFigures, Generalizability
from lightcl.errors import RequestError
from lightcl.metrics import AccuracyMatrix, Spread
from lightcl.records import DeviceHistory, DeviceRow, Failure, Results, RoundRow, load_run
from lightcl.records.folder import ANALYSIS, RunFolder
from lightcl.scenario import Fleet, Scenario, Server, Stream
from simulations.options import number_ranges
from simulations.reports import plots
from simulations.reports.devices import Column, columns_of, devices_csv, named_devices
from simulations.reports.figures import (
    chance,
    mean_matrix,
    reported,
    spread_of_forgetting,
    spread_over_tasks,
)
from simulations.reports.page import build_report
from simulations.reports.plots.style import PIXELS_PER_INCH, SIZE
from simulations.reports.wording import duration, percent, points, size
from tests.simulations.reports.synthetic import write_fleet

Rows = list[dict[str, Any]]

# Device 0: TIL 0.75 on average at the end, forgetting 0.2; device 1: 0.80 and 0. CIL: 0.3 and 0.4; forgetting 0.4 both.
TIL = [[[0.8], [0.6, 0.9]], [[0.9], [0.9, 0.7]]]
CIL = [[[0.5], [0.1, 0.5]], [[0.7], [0.3, 0.5]]]


def device_row(device: int, task: int, **more: Any) -> dict[str, Any]:
    """A round in which the device learned the task and was tested; `round` follows the task."""
    return {
        "round": task + 1, "device": device, "name": f"board-{device}", "task": task, "epochs": 2,
        "bytes_down": 0, "bytes_up": 0, "timing": {"train_seconds": 10.0, "evaluate_seconds": 2.5},
        "examples": 50 + task, "loss": 0.5, "til": TIL[device % 2][task], "cil": CIL[device % 2][task],
        "images": [20] * (task + 1),
    } | more  # fmt: skip


def failed_row(device: int, round_number: int, error: str) -> dict[str, Any]:
    return {
        "round": round_number, "device": device, "name": "", "task": 0, "epochs": 0, "bytes_down": 0, "bytes_up": 0,
        "timing": {}, "error": error,
    }  # fmt: skip


def round_row(number: int, sent: int = 0) -> dict[str, Any]:
    return {
        "round": number, "task": number - 1, "devices": 2, "failed": 0, "devices_finished": 0, "loss": 0.5, "til": None,
        "cil": None, "bytes_down": sent, "bytes_up": 2 * sent, "timing": {"train_seconds": 60.0, "seconds": 75.0},
    }  # fmt: skip


def results(devices: int = 2, dropped: dict[int, str] | None = None) -> Results:
    return Results.of([], 2, devices=devices, dropped=dropped or {}, rounds=[])


def make_run(
    path: Path, rows: Rows, rounds: Rows, end: Results | None, *, tasks: int = 2, devices: int = 2
) -> RunFolder:
    scenario = Scenario(
        name="by-hand", seed=7, stream=Stream(tasks=tasks), fleet=Fleet(devices=devices), server=Server(max_failures=2)
    )
    about = {"run": "r", "command": "lightcl simulate by-hand.yaml", "libraries": {"torch": "2.5", "ray": None}}
    folder = RunFolder(path / "run")
    folder.begin(scenario, about, [{"device": d, "train": list(range(120 + d)), "test": []} for d in range(devices)])
    folder.append("devices.jsonl", [DeviceRow.from_json(row) for row in rows])
    folder.append("rounds.jsonl", [RoundRow.from_json(row) for row in rounds])
    if end is not None:
        folder.finish(end)
    return folder


def text_of(page: Path) -> str:
    """What a reader sees of the page, on one line; without styles, scripts and images."""
    source = re.sub(r"<(style|script)>.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    source = re.sub(r"</?b>", "", source)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", source)).split())


def matrix(rows: Sequence[Sequence[float]], tasks: int = 2) -> AccuracyMatrix:
    return AccuracyMatrix.from_rows(dict(enumerate(rows)), tasks)


@pytest.fixture
def _unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the painting of the PNG files, nearly all of a report's time."""
    monkeypatch.setattr(plots, "png", lambda figure: b"png")


TWO_DEVICES = [device_row(d, t) for t in range(2) for d in range(2)]
TWO_ROUNDS = [round_row(1), round_row(2)]


# -- the page ------------------------------------------------------------------------------------------------------


def test_page_and_pictures_are_complete(tmp_path: Path) -> None:
    folder = make_run(tmp_path, TWO_DEVICES, [round_row(1, 500_000), round_row(2, 500_000)], results())
    page = build_report(folder)
    assert page == folder.path / "report.html"
    names = {"accuracy", "bytes", "forgetting", "matrix-cil", "matrix-til", "time"}
    assert {file.stem for file in (folder.path / "plots").iterdir()} == names
    source = page.read_text(encoding="utf-8")
    for file in (folder.path / "plots").iterdir():
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert struct.unpack(">I", data[16:20])[0] == round(SIZE[0] * PIXELS_PER_INCH - 0.5)
        assert base64.b64encode(data).decode() in source
    # One image for light and one for dark pages, and nothing that would have to be fetched.
    links = re.findall(r'(?:src|srcset|href)="([^"]*)"', source)
    assert [link for link in links if not link.startswith("data:image/png;base64,")] == ["devices.csv"]
    assert len(links) == 2 * len(names) + 1
    assert "url(" not in source


@pytest.mark.usefixtures("_unpainted")
def test_devices_without_a_task_are_of_the_fleet_and_not_of_the_figures(tmp_path: Path) -> None:
    end = Results.of([], 2, devices=5, dropped={}, rounds=[], without_tasks=3)
    text = text_of(build_report(make_run(tmp_path, TWO_DEVICES, TWO_ROUNDS, end, devices=5)))
    assert "5 devices (3 without a task), iid" in text
    assert "2 of 2 devices are tested on fewer than 50 images" in text


@pytest.mark.usefixtures("_unpainted")
def test_figures_of_a_completed_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path, TWO_DEVICES, TWO_ROUNDS, results())
    text = text_of(build_report(folder))
    assert "by-hand completed lightcl on digits 2 tasks of 2 classes 2 devices, iid" in text
    assert "seed 7 2 rounds in 2 min 30 s" in text
    # TIL: (75 + 80) / 2 = 77.5; std 5 / √2 = 3.5; percentiles 75 + 0.1 · 5 and 75 + 0.9 · 5.
    assert "Average accuracy 77.5 % ± 3.5 % std over devices 75.5 … 79.5 % 10th–90th percentile" in text
    assert "Forgetting 10.0 pp ± 14.1 pp" in text
    assert "Backward transfer −10.0 pp" in text
    assert "Average accuracy 35.0 % ± 7.1 %" in text
    assert "Forgetting 40.0 pp ± 0.0 pp std over devices 40.0 … 40.0 pp" in text
    # Device, name, tasks learned, TIL, CIL, both forgettings, samples 50 + 51, images, 2 · 20 test images, 2 · 12.5 s,
    # failures.
    assert "0 board-0 2 75.0 30.0 20.0 40.0 101 120 40 25.0 0" in text
    assert "1 board-1 2 80.0 40.0 0.0 40.0 101 121 40 25.0 0" in text
    assert "2 of 2 devices are tested on fewer than 50 images (fewest: device 0 with 40)" in text
    assert "Only metrics left the devices." in text
    assert "None: every device answered every request." in text
    assert "Distribution over the fleet" not in text
    table = (folder.path / "devices.csv").read_text().splitlines()
    assert table[0] == (
        "device,name,tasks_learned,til_average_accuracy,cil_average_accuracy,til_forgetting,cil_forgetting,"
        "training_samples,training_images,test_images,seconds,failures"
    )
    assert table[1].split(",")[:4] == ["0", "board-0", "2", "0.75"]
    assert "lightcl simulate by-hand.yaml" in text
    assert "Git commit not recorded" in text
    assert "Libraries torch 2.5 The complete scenario name: by-hand seed: 7 data: source: digits" in text


@pytest.mark.usefixtures("_unpainted")
def test_bytes_are_reported_where_tensors_were_sent(tmp_path: Path) -> None:
    text = text_of(build_report(make_run(tmp_path, TWO_DEVICES, [round_row(1, 700), round_row(2, 900)], results())))
    assert "Only metrics left" not in text
    assert "1.6 kB down and 3.2 kB up over the run, on average 400 bytes and 800 bytes per device and round" in text


@pytest.mark.usefixtures("_unpainted")
def test_what_boards_measured_is_shown_where_a_run_has_it(tmp_path: Path) -> None:
    rows = [device_row(d, t) for t in range(2) for d in range(2)]
    for number, row in enumerate(rows):
        row["timing"] |= {"energy_joules": 100.0 * (number + 1), "power_source": "VDD_IN", "temperature_c": 60.0}
    rows[3]["timing"] |= {"backed_off_seconds": 90.0, "backed_off_reason": "gpu has 90 °C", "throttled": 0.5}
    rows[2]["timing"].pop("energy_joules")  # device 0 did not measure its second task
    folder = make_run(tmp_path, rows, TWO_ROUNDS, results())
    text = text_of(build_report(folder))
    # Device 1 used 200 and 400 J for its two tasks.
    assert "Training took 600.0 J, 300.0 J per learned task (measured by: VDD_IN). The server waited 90.0 s" in text
    assert "last: gpu has 90 °C" in text
    drawn = {file.stem for file in (folder.path / "plots").iterdir()}
    assert {name for name in drawn if name.startswith("board-")} == {"board-temperature", "board-energy"}
    table = list(csv.DictReader((folder.path / "devices.csv").open(encoding="utf-8")))
    assert [row["joules_per_task"] for row in table] == ["", "300.0"]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)"])
def test_the_name_of_a_board_is_no_formula_in_a_spreadsheet(tmp_path: Path, name: str) -> None:
    rows = [device_row(d, t) | {"name": name if d else "board = 0"} for t in range(2) for d in range(2)]
    folder = make_run(tmp_path, rows, TWO_ROUNDS, results())
    run = load_run(folder.path)
    named = Column("name", "Name", lambda d: d.name, None)
    loss = Column("change", "Change", lambda d: -1.5)
    assert list(csv.reader(devices_csv([named, loss], run.histories).splitlines())) == [
        ["name", "change"], ["board = 0", "-1.5"], [f"'{name}", "-1.5"],
    ]  # fmt: skip


@pytest.mark.usefixtures("_unpainted")
def test_single_device_has_no_spread(tmp_path: Path) -> None:
    folder = make_run(tmp_path, [device_row(0, 0), device_row(0, 1)], TWO_ROUNDS, results(1), devices=1)
    text = text_of(build_report(folder))
    assert "One device, so there is no spread to report." in text
    assert "Average accuracy 75.0 % Forgetting 20.0 pp Backward transfer −20.0 pp" in text
    assert "std over devices" not in text
    assert "1 device 50 epochs per task" in text


@pytest.mark.usefixtures("_unpainted")
def test_single_task_has_no_forgetting(tmp_path: Path) -> None:
    folder = make_run(tmp_path, [device_row(0, 0), device_row(1, 0)], [round_row(1)], results(), tasks=1)
    text = text_of(build_report(folder))
    assert "After the only task; mean over the 2 devices that finished. Task known at test (TIL) Average" in text
    assert "There is a single task, so there is nothing to forget." in text
    assert "Backward transfer" not in text
    assert {file.name for file in (folder.path / "plots").iterdir()} == {"accuracy.png", "time.png"}


@pytest.mark.usefixtures("_unpainted")
def test_an_incomplete_run_is_reported_up_to_its_last_round(tmp_path: Path) -> None:
    rows = [device_row(0, 0), device_row(1, 0), device_row(0, 1)]
    folder = make_run(tmp_path, rows, [round_row(1)], None)
    with (folder.path / "devices.jsonl").open("a") as file:
        file.write('{"round": 2, "device": 1, "na')  # killed while writing
    text = text_of(build_report(folder))
    assert "by-hand still running or killed" in text
    assert "2 devices have been tested so far, after 1 to 2 of 2 tasks." in text
    # Device 0 after two tasks 75 %, device 1 after one 90 %.
    assert "Average accuracy 82.5 %" in text
    assert "1 board-1 1 90.0 70.0 – – 50" in text


@pytest.mark.usefixtures("_unpainted")
def test_run_that_was_killed_before_its_first_round(tmp_path: Path) -> None:
    folder = make_run(tmp_path, [], [], None)
    text = text_of(build_report(folder))
    assert "No device has finished a task" in text
    assert "No round has been finished." in text
    assert list((folder.path / "plots").iterdir()) == []


@pytest.mark.usefixtures("_unpainted")
def test_failures_and_dropped_devices(tmp_path: Path) -> None:
    refused = "its <b>loss</b> is nan"
    rows = [
        *TWO_DEVICES,
        failed_row(2, 1, refused),
        failed_row(2, 2, refused),
        failed_row(3, 2, refused),
        failed_row(0, 3, "late"),
    ]
    end = results(5, {2: refused, 4: "not connected for 600 s"})
    page = build_report(make_run(tmp_path, rows, TWO_ROUNDS, end, devices=5))
    text = text_of(page)
    assert "completed without 2 of 5 devices" in text
    assert "mean over the 2 devices that finished" in text
    assert "Dropped from the run: device 2. its <b>loss</b> is nan" in text
    assert "Dropped from the run: device 4. not connected for 600 s" in text
    # Reason, times, devices, rounds; the most frequent one first.
    assert "its <b>loss</b> is nan 3 2–3 1–2 late 1 0 3" in text
    assert "2 0 – – – – 0 122 – 0.0 2 dropped" in text
    assert "3 0 – – – – 0 123 – 0.0 1 " in text
    assert refused not in page.read_text()  # what a device says is escaped


def test_a_freeze_point_that_was_chosen_is_explained(tmp_path: Path) -> None:
    folder = make_run(tmp_path, TWO_DEVICES, TWO_ROUNDS, results())
    stability = {"stem": 0.98, "layer1": 0.95, "layer2": 0.7}
    blocks = {name: BlockFigures([value], [0.99], [0.9]) for name, value in stability.items()}
    (folder.path / ANALYSIS).write_text(json.dumps(Generalizability(0, 3, blocks, (1,)).record(0.9)))
    text = text_of(build_report(folder))
    assert "froze the network up to layer1." in text
    assert "the stream of device 0 (3 epochs per task)" in text
    assert "are at least 0.9." in text
    assert (folder.path / "plots" / "generalizability.png").read_bytes().startswith(b"\x89PNG")
    (folder.path / ANALYSIS).write_text('{"freeze": "layer1", "blocks": {"stem": {}}}')
    with pytest.raises(RequestError, match=r"generalizability.json: not the record of an analysis"):
        build_report(folder)


@pytest.mark.usefixtures("_unpainted")
def test_a_run_that_dropped_every_device_says_so(tmp_path: Path) -> None:
    rows = [failed_row(device, number, "gone") for number in (1, 2) for device in (0, 1)]
    folder = make_run(tmp_path, rows, TWO_ROUNDS, None)
    assert load_run(folder.path).dropped == {0: "gone", 1: "gone"}
    folder.fail(Failure("no device finished its stream: gone", {0: "gone", 1: "gone"}))
    text = text_of(build_report(folder))
    assert "stopped: every device was dropped from the run" in text
    folder.reopen()  # by --resume: those rows are the last that there are, but every device is to be asked again
    assert "still running or killed" in text_of(build_report(folder))
    folder.fail(Failure("a Ray worker died", {}))
    assert "stopped: a Ray worker died" in text_of(build_report(folder))
    assert "Dropped from the run: devices 0–1. gone" in text


@pytest.mark.usefixtures("_unpainted")
def test_more_than_fifty_devices_are_shown_as_distributions_and_by_name(tmp_path: Path) -> None:
    rows = [device_row(device, 0, til=[device / 1000], images=[20 + device]) for device in range(300)]
    folder = make_run(tmp_path, rows, [round_row(1)], results(300), tasks=1, devices=300)
    page = build_report(folder)
    text = text_of(page)
    # Devices 0 to 29 have 20 to 49 test images.
    assert "30 of 300 devices are tested on fewer than 50 images (fewest: device 0 with 20)" in text
    assert "Worst 0 board-0 1 0.0 " in text
    assert "Median 149 board-149 1 14.9 " in text
    assert "Best 299 board-299 1 29.9 " in text
    names = {file.stem for file in (folder.path / "plots").iterdir()}
    assert names == {"accuracy", "time", "accuracy-distribution", "accuracy-by-images"}
    # All devices: as data for the page's table, and in a file.
    data = json.loads(re.findall(r'<script type="application/json" id="devices">(.*?)</script>', page.read_text())[0])
    assert [row[:4] for row in data] == [[d, f"board-{d}", 1, d / 10] for d in range(300)]
    assert len((folder.path / "devices.csv").read_text().splitlines()) == 301


def test_a_large_fleet_with_skipped_tasks(tmp_path: Path) -> None:
    folder = write_fleet(tmp_path / "run", 1000, tasks=3)
    page = build_report(folder)
    assert page.stat().st_size < 3_000_000
    names = {file.stem for file in (folder.path / "plots").iterdir()}
    assert {"accuracy-distribution", "forgetting-distribution", "accuracy-by-images", "accuracy-by-tasks"} <= names
    assert "skipped" in names
    run = reported(load_run(folder.path))
    assert len(run.finished) == 1000, "a device that skips tasks has finished after its last one"
    assert {d: len(skipped) + run.learned[d] for d, skipped in run.skipped.items()} == dict.fromkeys(run.skipped, 3)
    RunFolder(folder.path).prepare(resume=False, overwrite=True)
    assert not (folder.path / "devices.csv").exists(), "the report's files belong to the run folder"


@pytest.mark.usefixtures("_unpainted")
def test_a_name_cannot_leave_the_data_of_the_table(tmp_path: Path) -> None:
    rows = [device_row(device, 0, name="</script><b>") for device in range(201)]
    page = build_report(make_run(tmp_path, rows, [round_row(1)], results(201), tasks=1, devices=201))
    assert "</script><b>" not in page.read_text()


def test_holes_of_a_matrix_are_dashes() -> None:
    """Device 0 skips task 1 of three; device 1 learns task 2 alone."""
    holes = AccuracyMatrix(3)
    holes.values[0, 0], holes.values[2, [0, 2]] = 0.9, [0.7, 0.5]
    single = AccuracyMatrix(3)
    single.values[2, 2] = 0.8
    first, second, third = spread_over_tasks([holes, single])
    assert (first.mean, third.mean, third.p10) == pytest.approx((0.9, 0.7, 0.62))  # (0.6 + 0.8) / 2
    assert np.isnan(second.mean)
    forgotten = spread_of_forgetting([holes, single])
    assert forgotten[0].mean == pytest.approx(0.2)
    assert np.isnan(forgotten[1].mean)
    assert plots.png(plots.accuracy_over_tasks({"til": [first, second, third]}, {}, plots.LIGHT))
    assert plots.png(plots.forgetting_per_task({"til": forgotten}, plots.LIGHT))
    device = DeviceHistory(1, "", single, single, samples=5, seconds=1.0, failures=0, tasks=(0,))
    forgetting = {c.name: c for c in columns_of(reported_with([device]))}["til_forgetting"]
    assert (forgetting.text(device), forgetting.known(device)) == ("–", None)


def reported_with(devices: list[DeviceHistory]) -> Any:
    scenario = Scenario(stream=Stream(tasks=3))
    run = SimpleNamespace(
        histories=devices, dropped={}, partition={}, devices=[], results=None, scenario=scenario, analysis=None
    )
    return reported(run)  # type: ignore[arg-type]


def test_folder_without_a_valid_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"holds no readable run\.json"):
        build_report(RunFolder(tmp_path))
    with pytest.raises(RequestError, match=rf"^{tmp_path}/nodir does not exist; name a run folder"):
        build_report(RunFolder(tmp_path / "nodir"))
    (tmp_path / "run.json").write_text(json.dumps({"scenario": {"sed": 3}}))
    with pytest.raises(RequestError, match=r"run\.json: the scenario in it is not valid(?s:.*)sed"):
        build_report(RunFolder(tmp_path))


# -- figures -------------------------------------------------------------------------------------------------------


def test_device_that_lost_its_state_counts_from_where_it_began_again(tmp_path: Path) -> None:
    rows = [device_row(0, 0), device_row(0, 1), failed_row(0, 3, "lost"), device_row(0, 0, round=4, til=[0.4])]
    (device,) = load_run(make_run(tmp_path, rows, TWO_ROUNDS, None).path).histories
    assert device.tasks_done == 1
    assert device.figures["til"]["average_accuracy"] == pytest.approx(0.4)
    assert (device.samples, device.seconds, device.failures) == (101, 37.5, 1)


def test_spreads_over_devices_at_different_tasks() -> None:
    matrices = [matrix(TIL[0]), matrix(TIL[1][:1]), AccuracyMatrix(2)]
    first, second = spread_over_tasks(matrices)
    assert (first.mean, first.p10, first.p90) == pytest.approx((0.85, 0.81, 0.89))
    assert (second.mean, second.std) == pytest.approx((0.75, 0.0))
    (forgotten,) = spread_of_forgetting(matrices)
    assert forgotten.mean == pytest.approx(0.2)
    np.testing.assert_allclose(mean_matrix(matrices), [[0.85, np.nan], [0.6, 0.9]])
    assert spread_over_tasks([]) == []
    assert spread_of_forgetting([matrix(TIL[0][:1])]) == []


def test_chance() -> None:
    scenario = Scenario(stream=Stream(tasks=3, classes_per_task=4))
    assert chance(scenario) == {"til": 1 / 4, "cil": 1 / 12}
    assert chance(scenario, 12) == chance(scenario)
    own = Scenario(stream=Stream(tasks=3, classes_per_task=4, cut="own"))
    assert chance(own) == {"til": 1 / 4}, "nobody recorded the classes of the fleet"
    assert chance(own, 20) == {"til": 1 / 4, "cil": 1 / 20}


def test_worst_median_and_best() -> None:
    devices = [
        DeviceHistory(n, "", matrix([[n / 10]], 3), matrix([[0.0]], 3), 0, 0.0, 0, (0, 1, 2)) for n in (3, 1, 2, 9)
    ]
    assert [(label, d.number) for label, d in named_devices(reported_with(devices))] == [
        ("Worst", 1), ("Median", 2), ("Best", 9)
    ]  # fmt: skip
    assert named_devices(reported_with([])) == []


def test_units() -> None:
    assert [percent(v) for v in (0.64169, 1.0, float("nan"))] == ["64.2", "100.0", "–"]
    assert [points(v) for v in (0.041, -0.016, -0.0001, float("nan"))] == ["4.1", "−1.6", "0.0", "–"]
    spoken = [duration(v).replace("\u00a0", " ") for v in (4.25, 131.4, 4230, 7500)]
    assert spoken == ["4.2 s", "2 min 11 s", "70 min 30 s", "2 h 05 min"]
    assert [size(v).replace("\u00a0", " ") for v in (999, 529_408, 2_117_632)] == ["999 bytes", "529.4 kB", "2.1 MB"]
    assert number_ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert number_ranges(range(0, 60, 2)) == "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22 … (30 in all)"


# -- plots of a fleet ----------------------------------------------------------------------------------------------


def test_distribution_counts_every_device_once() -> None:
    values = {"til": np.array([0.2, 0.2, 0.4, np.nan]), "cil": np.array([0.1, 0.3, 0.3, 0.3])}
    figure = plots.distribution(values, "final accuracy (%)", plots.LIGHT)
    (axes,) = figure.axes
    medians = [line.get_xdata()[0] for line in axes.get_lines()]
    assert medians == pytest.approx([20, 30])
    assert axes.get_ylim()[1] >= 3, "three devices share a bin"
    plots.distribution({"til": np.array([0.5])}, "x", plots.DARK)


def test_accuracy_by_images_draws_medians_of_groups() -> None:
    images = np.repeat(np.arange(1, 13) * 10, 3)
    accuracy = np.tile([0.1, 0.2, 0.6], 12)
    (axes,) = plots.accuracy_by_images(images, {"til": accuracy}, plots.LIGHT).axes
    dots, median = axes.get_lines()
    assert len(dots.get_xdata()) == 36
    assert list(median.get_xdata()) == pytest.approx(list(range(10, 121, 10)))
    assert list(median.get_ydata()) == pytest.approx([20] * 12)
    assert axes.get_xscale() == "log"


def test_accuracy_by_tasks_learned_names_the_devices() -> None:
    learned, accuracy = np.array([1, 1, 3]), np.array([0.2, 0.4, 0.9])
    (axes,) = plots.accuracy_by_tasks_learned(learned, {"til": accuracy}, plots.LIGHT).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1\n2", "3\n1"]
    assert [line.get_ydata()[0] for line in axes.get_lines()] == pytest.approx([30, 90])


def test_skipped_tasks_plot() -> None:
    (axes,) = plots.skipped_tasks(np.array([0.0, 0.25]), plots.LIGHT).axes
    assert [bar.get_height() for bar in axes.patches] == [0, 25]


# -- plots ---------------------------------------------------------------------------------------------------------


def test_accuracy_plot_draws_means_and_chance_in_percent() -> None:
    curves = {"til": [Spread(0.9, 0.1, 0.8, 0.95), Spread(0.8, 0.1, 0.7, 0.9)]}
    (axes,) = plots.accuracy_over_tasks(curves, {"til": 0.5}, plots.LIGHT).axes
    mean, guess = axes.get_lines()
    assert list(mean.get_ydata()) == pytest.approx([90, 80])
    assert list(guess.get_ydata()) == pytest.approx([50, 50])
    assert guess.get_linestyle() == "--"
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((70, 95))
    assert [label.get_text() for label in axes.get_legend().get_texts()] == ["TIL", "10th–90th percentile", "chance"]
    assert axes.get_ylabel() == "average accuracy (%)"


def test_matrix_plot_annotates_tested_cells() -> None:
    values = np.array([[0.925, np.nan], [0.5, 1.0]])
    axes = plots.accuracy_matrix(values, plots.DARK).axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "92.5", (0, 1): "50.0", (1, 1): "100.0"}
    assert axes.images[0].get_clim() == (0, 100)


def test_forgetting_plot_has_a_bar_a_task_and_setting() -> None:
    bars = {"til": [Spread(0.1, 0.02, 0, 0), Spread(-0.05, 0.01, 0, 0)], "cil": [Spread(0.6, 0, 0, 0)] * 2}
    (axes,) = plots.forgetting_per_task(bars, plots.LIGHT).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([10, -5, 60, 60])


def test_round_plots_choose_their_unit() -> None:
    (axes,) = plots.bytes_per_round([1, 2], [2e6, 0], [1e6, 3e6], plots.LIGHT).axes
    assert axes.get_ylabel() == "sent (MB)"
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(0, 2), (0, 0), (2, 1), (0, 3)]
    (axes,) = plots.seconds_per_round([1], [540.0], [60.0], plots.LIGHT).axes
    assert axes.get_ylabel() == "time (min)"
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(0, 9), (9, 1)]
    (axes,) = plots.seconds_per_round([1], [100.0], [50.0], plots.LIGHT).axes
    assert axes.get_ylabel() == "time (s)"

"""`load_run`: its results, its requirements, and runs of earlier versions."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightcl.errors import RequestError
from lightcl.preparation import open_run
from lightcl.records import DeviceRow, Results, RoundRow, load_run
from lightcl.records.folder import DEVICES, ROUNDS, RunFolder
from lightcl.scenario import Fleet, Scenario, Server, Stream

TIL = {0: [[0.8], [0.6, 0.9]], 1: [[0.9], [0.9, 0.7]]}
PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "read-a-run.md"


def row(device: int, task: int) -> DeviceRow:
    return DeviceRow(
        task + 1, device, f"board-{device}", task, 2, bytes_up=5, examples=50, loss=0.5, til=TIL[device][task],
        images=[20] * (task + 1), train_seconds=10.0, peak_memory_mib=1.0, evaluate_seconds=2.5,
    )  # fmt: skip


def make_run(path: Path) -> RunFolder:
    scenario = Scenario(stream=Stream(tasks=2), fleet=Fleet(devices=2), server=Server(max_failures=2))
    folder = RunFolder(path)
    shares = [{"device": d, "train": [1, 2, 3], "test": [4]} for d in range(2)]
    folder.begin(scenario, {"run": "r", "command": "lightcl simulate x.yaml"}, shares)
    for task in range(2):
        rows = [row(device, task) for device in range(2)]
        folder.append(DEVICES, rows)
        folder.append(ROUNDS, [RoundRow.of(rows, 2 * task, 20.0, 25.0)])
    til = [{"til": dict(enumerate(TIL[device])), "cil": {}} for device in range(2)]
    folder.finish(Results.of(til, 2, devices=2, dropped={}, rounds=folder.rounds()))
    return folder


def test_rows_matrices_and_results(tmp_path: Path) -> None:
    make_run(tmp_path)
    run = load_run(str(tmp_path))
    assert run.scenario.stream.tasks == 2
    assert run.about["command"] == "lightcl simulate x.yaml"
    assert run.devices == [row(device, task) for task in range(2) for device in range(2)]
    assert [round_row.round for round_row in run.rounds] == [1, 2]
    assert run.results is not None
    assert run.results.til.average_accuracy.mean == pytest.approx(0.775)
    assert run.failure is None
    assert run.partition[1]["train"] == [1, 2, 3]
    matrices = run.matrices("til")
    assert list(matrices) == [0, 1]
    np.testing.assert_array_equal(matrices[0].values, [[0.8, np.nan], [0.6, 0.9]])
    assert run.matrices("cil") == {}
    with pytest.raises(RequestError, match="setting is 'both'; allowed: til, cil"):
        run.matrices("both")


def test_frames_for_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    make_run(tmp_path)
    run = load_run(tmp_path)
    devices, rounds = run.devices_frame(), run.rounds_frame()
    assert isinstance(devices, pandas.DataFrame)
    assert devices[devices.device == 0].til_mean.tolist() == pytest.approx([0.8, 0.75])
    assert devices.cil_mean.isna().all()
    assert rounds.til_mean.tolist() == pytest.approx([0.85, 0.775])
    assert rounds.bytes_up.tolist() == [10, 10]
    assert {"til_p10", "cil_mean", "train_seconds"} <= set(rounds.columns)


def test_frames_without_pandas_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "pandas", None)
    for frame in (load_run(tmp_path).devices_frame, load_run(tmp_path).rounds_frame):
        with pytest.raises(RequestError, match="needs pandas: pip install pandas"):
            frame()


def test_the_script_in_the_docs_draws_its_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    (script,) = re.findall(r"```python\n(# plot\.py\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(sys, "argv", ["plot.py", "run"])
    (tmp_path / "plot.py").write_text(script)
    runpy.run_path("plot.py", run_name="__main__")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def old_style(folder: RunFolder, **runtime: Any) -> None:
    """Turns run.json into what earlier versions wrote."""
    file = folder.path / "run.json"
    about = json.loads(file.read_text())
    scenario = about["scenario"]
    device, simulation = scenario.pop("device"), scenario.pop("simulation")
    scenario["training"]["precision"] = "bf16"
    scenario["server"].pop("compression", None)
    scenario["runtime"] = {
        "workers": simulation["workers"], "threads": 3, "accelerator": device["accelerator"], **runtime
    }  # fmt: skip
    file.write_text(json.dumps(about))


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    old_style(make_run(tmp_path), workers=7)
    run = load_run(tmp_path)
    assert run.scenario.device.threads == 3
    assert run.scenario.device.precision == "bf16"
    assert run.scenario.simulation.workers == 7
    assert len(run.devices) == 4


def test_a_run_of_an_earlier_version_is_not_continued(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    old_style(folder)
    with pytest.raises(RequestError, match="by an earlier version; it can be read and reported, but not continued"):
        open_run(folder, Scenario(), "lightcl simulate", "fleet", resume=True, overwrite=False)


def test_an_old_key_that_is_not_known_is_named(tmp_path: Path) -> None:
    old_style(make_run(tmp_path))
    file = tmp_path / "run.json"
    about = json.loads(file.read_text())
    about["scenario"]["training"]["speed"] = 3
    file.write_text(json.dumps(about))
    with pytest.raises(RequestError, match=r"run\.json: the scenario in it is not valid: .*training\.speed"):
        load_run(tmp_path)

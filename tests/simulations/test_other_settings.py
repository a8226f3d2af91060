"""Fleets whose devices are not tested for everything, or not after every task: to the results and the report."""

from pathlib import Path

import pytest
from rich.console import Console

from lightcl.preparation import open_run
from lightcl.records.folder import RunFolder
from server.rounds import Coordinator
from simulations.progress import print_accuracies
from simulations.reports.page import build_report
from tests.inprocess import InProcessGrid, Silent, small


def run(path: Path, **sections) -> RunFolder:
    scenario = small(fleet={"devices": 2, "test_data": "whole"}, **sections)
    folder = RunFolder(path / "run")
    open_run(folder, scenario, "test", "fleet", resume=False, overwrite=False)
    listener = Silent()
    Coordinator(scenario, folder, "run1", listener).run(InProcessGrid(path / "state", nodes=2))
    assert listener.refusals == []
    return folder


def printed(folder: RunFolder) -> str:
    console = Console(width=100, record=True, quiet=False, file=None)
    with console.capture() as captured:
        print_accuracies(console, folder.results())
    return captured.get()


@pytest.mark.parametrize("sections", [{"method": {"name": "pnn"}}, {"stream": {"settings": "til"}}])
def test_a_fleet_that_is_tested_for_til_alone(tmp_path, sections):
    folder = run(tmp_path, **sections)
    results = folder.results()
    assert results.cil is None
    assert 0 < results.til.average_accuracy.mean <= 1
    rows = folder.devices()
    assert len(rows) == 4  # two devices, two tasks
    assert all(row.til and row.cil is None for row in rows)
    assert all(row.cil is None for row in folder.rounds())
    page = build_report(folder).read_text()
    assert "Task known at test (TIL)" in page
    assert "Accuracy matrix, CIL" not in page
    assert not (folder.path / "plots" / "matrix-cil.png").exists()
    assert "CIL" not in printed(folder)


def test_a_fleet_that_learns_all_tasks_jointly(tmp_path):
    folder = run(tmp_path, method={"name": "joint"}, server={"rounds_per_task": 2})
    results = folder.results()
    assert (results.rounds, results.devices_finished) == (2, 2)
    assert results.cil.forgetting.mean == 0
    (last,) = {len(row.til) for row in folder.devices() if row.til}
    assert last == 2
    page = build_report(folder).read_text()
    assert "there is nothing to forget" in page
    assert not (folder.path / "plots" / "forgetting.png").exists()
    assert "CIL" in printed(folder)


@pytest.mark.parametrize(
    ("method", "server", "message"),
    [("pnn", {"aggregation": "suffix"}, "cannot be averaged"), ("sparcl-er", {"aggregation": "suffix"}, "averaged")],
)
def test_what_cannot_be_shared_is_refused(method, server, message):
    with pytest.raises(ValueError, match=message):
        small(method={"name": method}, server=server)


def test_cil_of_a_method_that_needs_the_task_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"settings asks for cil, but method pnn answers only where the task is"):
        small(method={"name": "pnn"}, stream={"settings": "til+cil"})

"""Each script and notebook of examples/ runs from first line to last at a toy size, in a separate process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

CHECKOUT = Path(__file__).parents[2]
SCRIPTS = sorted((CHECKOUT / "examples").glob("*.py"))
NOTEBOOKS = sorted((CHECKOUT / "examples").glob("*.ipynb"))
TOY = {  # further options of a script; all have --tasks and --epochs
    "fleet": ["--devices", "2"],
}
SHOWN = {  # what the last line of a script's output must look like
    "one_device": r"predicted as \[\d, .*\]",
    "a_new_method": r"hold-head +task known 0\.\d\d +task not known 0\.\d\d",
    "a_new_network": r"after task 1: accuracy per task \[0\.\d+, [01]\.\d+\]",
    "fleet": r"forgetting: -?\d+\.\d points",
}
ENVIRONMENT = {
    "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip


def test_all_examples_are_found() -> None:
    assert {file.stem for file in SCRIPTS} == SHOWN.keys()
    assert NOTEBOOKS


@pytest.mark.parametrize(
    "script",
    [pytest.param(file, id=file.stem, marks=[pytest.mark.ray] if file.stem == "fleet" else []) for file in SCRIPTS],
)
def test_a_script_runs(script: Path, tmp_path: Path) -> None:
    words = [sys.executable, script, "--tasks", "2", "--epochs", "1", *TOY.get(script.stem, [])]
    done = subprocess.run(
        words, cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(SHOWN[script.stem], done.stdout.splitlines()[-1]), done.stdout
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind unless it is asked to"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_a_script_opens_with_its_purpose_and_its_command(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert re.match(r'"""[A-Z].+[.:]\n', text)
    assert f"python examples/{script.name}" in text.split('"""')[1]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LIGHTCL_EXAMPLE_TASKS", "2")
    monkeypatch.setenv("LIGHTCL_EXAMPLE_EPOCHS", "1")
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "did you mean 'epochs'?" in printed
    assert re.search(r"after task 1: \[[01]\.\d+, [01]\.\d+\]", printed), printed


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_kept_without_outputs(file: Path) -> None:
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert cells

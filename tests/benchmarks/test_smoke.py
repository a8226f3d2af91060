"""Each script in benchmarks/ runs from first line to last at its smallest size, `--toy`. Its figures mean nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
SLOW = {"board_process", "fleet_rival", "fleet_runtime", "fleet_scale"}
"""They start Ray several times, or a SuperLink with boards, so that they take a minute or more."""
SCRIPTS = sorted(file for file in (CHECKOUT / "benchmarks").glob("*.py") if file.name != "__init__.py")


def test_there_are_scripts() -> None:
    assert SCRIPTS


@pytest.mark.parametrize(
    "script",
    [pytest.param(file, id=file.stem, marks=[pytest.mark.slow] if file.stem in SLOW else []) for file in SCRIPTS],
)
def test_a_benchmark_runs_and_prints_a_table(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, script, "--toy"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) >= 3, f"expected a heading, a rule and at least one row\n{done.stdout}"

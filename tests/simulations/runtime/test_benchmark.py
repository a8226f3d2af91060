"""benchmarks/fleet_runtime.py at toy size: every row has figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "fleet_runtime.py"


@pytest.mark.slow  # tests/benchmarks runs the same script at toy size
@pytest.mark.parametrize(("app", "engines"), [("echo", ["ray", "flower"]), ("real", ["ray"])])
def test_the_benchmark_measures_both_engines(app: str, engines: list[str]) -> None:
    words = ["--toy", "--app", app, "--engines", *engines]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[str(n), engine] for n in (4, 100) for engine in engines]
    for row in rows:
        first, later, rate = (float(cell.split()[0]) for cell in row[2:5])
        assert first > 0
        assert later > 0
        assert rate == pytest.approx(4 / later, rel=0.3)  # `later` is printed in milliseconds

"""The output of a run, on a terminal and elsewhere. Devices are real, in this process."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from rich.console import Console

from lightcl.metrics import Spread
from lightcl.records import Figures, Results
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from server.rounds import Coordinator
from simulations.progress import LiveProgress, print_accuracies
from tests.inprocess import InProcessGrid, small


class Killed(BaseException):
    """Like SIGKILL: no code of the server runs after it."""


class KilledAt(RunFolder):
    """Dies before it writes the rows of a round: its training is saved as pending, its end is not."""

    def __init__(self, path: Path, round_number: int) -> None:
        super().__init__(path)
        self.last = round_number

    def append(self, name: str, rows: Any) -> None:
        if any(row.round == self.last for row in rows):
            raise Killed
        super().append(name, rows)


def shown(scenario: Scenario, folder: RunFolder, grid: InProcessGrid, terminal: bool = False) -> tuple[Results, str]:
    """Begins or continues the run; returns the results and the output."""
    if not folder.exists:
        folder.begin(scenario, {"run": "r"}, [])
    console = Console(file=StringIO(), force_terminal=terminal, width=200)
    with LiveProgress(console, 6) as progress:
        results = Coordinator(scenario, folder, "r", progress).run(grid)
    assert isinstance(console.file, StringIO)
    return results, console.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("dies", ["while testing", "with nothing left to test"])
def test_a_run_killed_after_the_training_of_a_round_goes_on(tmp_path: Path, terminal: bool, dies: str) -> None:
    def kill(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "evaluate" and message.content["instruction"]["round"] == 4:
            raise Killed
        return reply

    scenario = small(server={"aggregation": "suffix", "rounds_per_task": 2})  # rounds 1 and 3 end without a test
    folder = RunFolder(tmp_path / "run")
    dying = folder if dies == "while testing" else KilledAt(tmp_path / "run", 3)
    with pytest.raises(Killed):
        shown(scenario, dying, InProcessGrid(tmp_path / "s", 3, kill))
    results, printed = shown(scenario, folder, InProcessGrid(tmp_path / "s", 3), terminal)
    assert (results.devices_finished, results.rounds) == (3, 4)
    if not terminal:
        resumed_at = 4 if dies == "while testing" else 3
        lines = [line for line in printed.splitlines() if line.startswith("round")]
        assert [line.partition(":")[0] for line in lines] == [f"round {n}/4" for n in range(resumed_at, 5)]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_reason_is_printed_unchanged(terminal: bool) -> None:
    """Texts of pydantic and paths of a user may look like markup."""
    console = Console(file=StringIO(), force_terminal=terminal, width=200, color_system=None)
    reason = "data.path: photos[/old] [type=int_parsing, input_value='[bold]']"
    with LiveProgress(console, 6) as progress:
        progress.refused(3, reason)
    assert isinstance(console.file, StringIO)
    assert f"device 3: {reason}" in console.file.getvalue()


def test_differences_are_points_and_zero_has_no_sign() -> None:
    console = Console(width=120, file=StringIO(), record=True)
    figures = Figures(Spread.of([0.5, 0.7]), Spread.of([-0.0004, 0.0002]), Spread.of([-0.25, -0.15]))
    print_accuracies(console, Results(2, 2, {}, 2, figures, None, 0, 0, 1.0))
    words = " ".join(console.export_text().split())
    assert "60.0% ± 14.1% 0.0 ± 0.0 -20.0 ± 7.1" in words
    assert words.count("(points)") == 2

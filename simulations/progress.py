"""Progress of a run on the console: a live line on a terminal, one line per round elsewhere."""

from __future__ import annotations

import time
from math import isnan
from statistics import fmean
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lightcl.analysis.generalizability import Generalizability
from lightcl.metrics import Spread
from lightcl.records import Results, RoundRow
from server.listeners import Listener
from simulations.options import amount
from simulations.tables import print_table


class LiveProgress(Listener):
    """A listener on a console; use it in a `with`."""

    def __init__(self, console: Console, device_rounds: int, starting: str = "starting Flower and Ray") -> None:
        self.console = console
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._bar: TaskID = self._live.add_task(starting, total=device_rounds * 2, note="")
        self._accuracy = self._phase = ""
        self._started: float | None = None
        self._done = self._phase_done = self._phase_total = self._round = self._rounds = 0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def connected(self, devices: int, wanted: int) -> None:
        if devices:  # until the first one the runtime is still starting
            self._live.update(self._bar, description=f"{devices} of {wanted} devices connected")

    def round_started(self, number: int, rounds_left: int, devices: int) -> None:
        self._started = self._started or time.monotonic()
        self._round, self._rounds = number, number + rounds_left - 1
        # Two steps per device and round: training and testing. The estimate improves with every round.
        self._live.update(self._bar, total=self._done + 2 * devices * rounds_left)

    def phase_started(self, phase: str, devices: int) -> None:
        self._phase, self._phase_done, self._phase_total = phase, 0, devices
        self._show()

    def device_done(self, device: int, phase: str) -> None:
        self._phase_done += 1
        self._done += 1
        self._live.advance(self._bar)
        self._show()

    def epoch_done(self, task: int, epochs: int, loss: float) -> None:
        """For a single device, whose rounds are long."""
        self._live.update(self._bar, description=f"task {task}, epoch {epochs}, loss {loss:.3f}")

    def round_finished(self, row: RoundRow) -> None:
        tested = [(setting, spread) for setting in ("til", "cil") if (spread := row.accuracy(setting))]
        if tested:
            self._accuracy = "  ".join(f"{setting.upper()} {spread.mean:.1%}" for setting, spread in tested)
        if not self.console.is_terminal:
            failed = f", {row.failed} failed" if row.failed else ""
            self.console.print(
                f"round {row.round}/{self._rounds}: task {row.task}, {amount(row.devices, 'device')}{failed}, "
                f"{self._accuracy or 'not tested yet'}, {row.seconds:.1f} s",
                highlight=False,
            )

    def refused(self, device: int, reason: str) -> None:
        self.console.print(f"[yellow]device {device}:[/] {escape(reason)}", highlight=False)

    def backed_off(self, device: int, reason: str, seconds: float) -> None:
        self.console.print(f"device {device} backs off for {seconds:.0f} s: {escape(reason)}", highlight=False)

    def _show(self) -> None:
        verb = "training" if self._phase == "train" else "testing"
        self._live.update(
            self._bar,
            description=f"round {self._round}/{self._rounds}, {verb} {self._phase_done}/{self._phase_total} devices",
            note=f"{self._accuracy}  {self._time_left()}",
        )

    def _time_left(self) -> str:
        total = self._live.tasks[0].total or 0
        if self._started is None or self._done == 0 or total <= self._done:
            return ""
        seconds = (time.monotonic() - self._started) / self._done * (total - self._done)
        return f"about {seconds:.0f} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"


class AnalysisProgress:
    """Progress of an analysis of the blocks on a console; use it in a `with`. The bar appears after the first epoch."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left:"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True,
        )  # fmt: skip
        self._bar: TaskID | None = None
        self._what = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def step(self, what: str, done: int, total: int) -> None:
        """Called after every epoch: what is being trained, epochs done, epochs in total."""
        if self._bar is None:
            self._live.start()
            self._bar = self._live.add_task("", total=total)
        self._live.update(self._bar, description=f"analyzing the blocks: {what}", completed=done)
        if not self.console.is_terminal and what != self._what:
            self.console.print(f"analyzing the blocks: {what} (epoch {done} of {total})", highlight=False)
        self._what = what


def print_blocks(console: Console, found: Generalizability, threshold: float) -> None:
    """The figures of an analysis: the mean over the tasks and the worst task of every block."""
    point = found.freeze_point(threshold)
    names = list(found.blocks)
    frozen = names[: names.index(point) + 1] if point != "none" else []
    tasks = len(found.blocks[names[0]].stability)
    console.print(
        f"How general each block is, over {tasks} {'tasks' if tasks > 1 else 'task'} after the first",
        style="italic", highlight=False,
    )  # fmt: skip
    rows = []
    for name, block in found.blocks.items():
        kinds = (block.stability, block.plasticity)
        figures = [f"{value:.3f}" for kind in kinds for value in (fmean(kind), min(kind))]
        rows.append([name, *figures, f"{fmean(block.readiness):.3f}", "frozen" if name in frozen else "trained"])
    headings = ("block", "memory stability", "lowest", "learning plasticity", "lowest", "readiness", "")
    print_table(console, headings, rows, left=(0, 6))


def print_accuracies(console: Console, results: Results) -> None:
    """The final figures of a run, accuracy in percent, differences in points; the report has the percentiles."""
    devices = results.devices_finished
    of = f"mean ± standard deviation over {devices} devices" if devices > 1 else "one device"
    console.print(f"After the last task, {of}", style="italic", highlight=False)
    rows = []
    for name, figures in (("TIL (task known)", results.til), ("CIL (task not known)", results.cil)):
        if figures is None:  # the method answers only where the task is known
            continue
        accuracy = _spread_text(figures.average_accuracy, devices, "%")
        others = [_spread_text(spread, devices) for spread in (figures.forgetting, figures.backward_transfer)]
        rows.append([name, accuracy, *others])
    print_table(console, ("", "average accuracy", "forgetting (points)", "backward transfer (points)"), rows)


def _spread_text(spread: Spread, devices: int, unit: str = "") -> str:
    """Mean and standard deviation times 100; a dash where no device has the figure (forgetting after one task)."""
    if isnan(spread.mean):
        return "–"
    mean = round(100 * spread.mean, 1) + 0.0  # turns a rounded -0.0 into 0.0
    return f"{mean:.1f}{unit}" + (f" ± {100 * spread.std:.1f}{unit}" if devices > 1 else "")

"""Runs the cells of a sweep, each as `lightcl simulate` or `lightcl train` in a separate process.

Each cell has its own run folder and log file. A child process is killed with its parent, so that a killed sweep leaves
no process behind that keeps its run folder locked.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightcl.records.folder import RunFolder
from simulations.options import number_ranges
from simulations.reports.run_figures import read_results
from simulations.sweeps.grid import Cell, Sweep

PR_SET_PDEATHSIG = 1


class ProcessRunner:
    """Runs commands as child processes and ends them with this process."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, command: Sequence[str], log: Path) -> int:
        """Waits for the command and returns its exit code; its output is appended to `log`."""
        with log.open("ab") as output:
            with self._lock:
                if self._stopped:
                    return 130
                child = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    preexec_fn=self._die_with_parent,
                )
                self._children.add(child)
            code = child.wait()
        with self._lock:
            self._children.discard(child)
        return code

    def _die_with_parent(self) -> None:
        """Called in the child, whose progress is on disk. Linux only; elsewhere it does nothing."""
        with suppress(AttributeError):
            self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def stop(self) -> None:
        """Interrupts all children and starts no more."""
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.send_signal(signal.SIGTERM)


def run_cells(sweep: Sweep, jobs: int, console: Console) -> dict[str, str]:
    """Runs the cells that are not complete, `jobs` at a time; returns the reasons for failures, by cell.

    A run that dropped devices is not complete: it is continued, which gives those devices another chance.
    """
    left = [cell for cell in sweep.cells if not RunFolder(sweep.run_folder(cell)).completed]
    failures: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runner = ProcessRunner()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("runs", total=len(sweep.cells), completed=len(sweep.cells) - len(left))
        started = time.monotonic()

        def run_one(cell: Cell) -> None:
            log = sweep.folder / "logs" / f"{cell.name}.log"
            code = runner.run(command_of(sweep, cell), log)
            results = read_results(sweep.run_folder(cell))
            if results is None:
                failures[cell.title] = f"exit code {code}; {_last_line(log)} ({log})"
            outcome = _outcome(results) if results else f"[red]failed[/], see {escape(str(log))}"
            progress.advance(bar)
            finished = progress.tasks[0].completed - (len(sweep.cells) - len(left))
            minutes = (time.monotonic() - started) / finished * (len(left) - finished) / 60
            progress.update(bar, description=f"runs, about {minutes:.0f} min left")
            console.print(f"{escape(cell.title)}: {outcome}", highlight=False, soft_wrap=True)

        with ThreadPoolExecutor(jobs) as pool:
            try:
                list(pool.map(run_one, left))
            except BaseException:
                runner.stop()
                pool.shutdown(cancel_futures=True)
                raise
    return failures


def command_of(sweep: Sweep, cell: Cell) -> list[str]:
    """The command of a cell; a run that has begun is continued."""
    out = sweep.run_folder(cell)
    kind = ["simulate"] if cell.device is None else ["train", "--device", str(cell.device)]
    command = [sys.executable, "-m", "simulations.main", *kind, str(sweep.folder / "scenarios" / f"{cell.name}.yaml")]
    command += ["--out", str(out), "--no-report"]  # `lightcl report` builds the page of a run on request
    return command + (["--resume"] if (out / "run.json").exists() else [])


def dropped_devices(results: Mapping[str, Any]) -> str:
    """Which devices were dropped from a run, as text."""
    numbers = sorted(map(int, results["dropped"]))
    return f"without device{'s' * (len(numbers) > 1)} {number_ranges(numbers)}, dropped from the run"


def _outcome(results: Mapping[str, Any]) -> str:
    accuracies = [f"{s.upper()} {results[s]['average_accuracy']['mean']:.1%}" for s in ("til", "cil") if results[s]]
    lost = f", [yellow]{dropped_devices(results)}[/]" if results["dropped"] else ""
    return f"{', '.join(accuracies)}, {results['seconds']:.0f} s{lost}"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"

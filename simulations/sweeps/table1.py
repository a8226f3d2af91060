"""`lightcl bench table1`: every method on the same stream and weights, over seeds; a table and a picture.

Each run is `lightcl train` (one device) or `lightcl simulate` (a fleet) in a process of its own, in a folder of its
own, so a killed benchmark goes on where it was and every figure can be looked up in a report.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightcl.analysis.footprint.comparison import footprint_of
from lightcl.analysis.footprint.measured import MeasurementFailure
from lightcl.analysis.footprint.shapes import MIB
from lightcl.data.sources import load_source
from lightcl.errors import RequestError
from lightcl.preparation import prepare
from lightcl.records import Results
from lightcl.records.folder import RunFolder
from lightcl.records.provenance import describe_run
from lightcl.scenario import Scenario, method_names, scenario_from_json
from lightcl.scenario.digest import scenario_digest
from lightcl.scenario.variants import as_method, resets
from lightcl.storage.files import LOCK, names_in, writable, write_atomically
from server.aggregation import Aggregator
from server.rounds import RunFailure
from simulations.options import amount, check_device, methods_named, number_ranges

FIGURES = (("cil", "average_accuracy"), ("til", "average_accuracy"), ("cil", "forgetting"), ("til", "forgetting"))
OWN = ("bench.json", "footprint.json", "table1.md", "table1.json", "table1.png", "scenarios", "logs", "runs", LOCK)
BASELINE = "sgd"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Plan:
    """What is to be run: one scenario under several methods and seeds, on one device or the whole fleet."""

    scenario: Scenario
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    device: int | None
    """None: the whole fleet."""
    folder: Path

    def run_folder(self, method: str, seed: int) -> Path:
        return self.folder / "runs" / f"{method}-seed-{seed}"

    def variant(self, method: str) -> Scenario:
        return as_method(self.scenario, method)

    @property
    def cells(self) -> list[tuple[str, int]]:
        """Seed by seed, so that a benchmark that is stopped early has whole rows of the first seeds."""
        return [(method, seed) for seed in self.seeds for method in self.methods]

    def results(self, method: str, seed: int) -> Results | None:
        return RunFolder(self.run_folder(method, seed)).results()


def bench_run(
    scenario: Scenario, *, seeds: int, methods: str | None, device: int | None, out_folder: Path, jobs: int,
    resume: bool, overwrite: bool, only_table: bool, command: str, console: Console,
) -> None:  # fmt: skip
    """Runs what is not there yet, then writes the table. Raises RequestError before anything is written."""
    names = tuple(methods_named(methods) if methods is not None else method_names())
    if device is None and scenario.fleet.devices == 1:
        device = 0
    if device is not None:
        check_device(device, scenario)
    numbers = tuple(range(scenario.seed, scenario.seed + seeds))
    plan = Plan(scenario, names, numbers, device, out_folder.absolute())
    _check_folder(plan, resume=resume or only_table, overwrite=overwrite)
    if only_table:
        _write(plan, console)
        return
    for name in names:
        _check_variant(plan, name)
    for line in resets(scenario, names):
        console.print(line, style="yellow", highlight=False)
    with writable(plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
    with RunFolder(plan.folder).held():
        _begin(plan, command, overwrite=overwrite)
        failures = _measure(plan, console)  # first: it is quick, and a table of what there is so far then has it
        failures |= _carry_out(plan, jobs, console)
        _write(plan, console)
    if failures:
        told = "\n".join(f"{cell}: {reason}" for cell, reason in failures.items())
        raise RunFailure(
            f"{len(failures)} of {len(plan.cells)} runs or measurements failed; go on with --resume\n{told}"
        )


def _check_variant(plan: Plan, method: str) -> None:
    """Raises RequestError for what a run of this method would refuse."""
    variant = plan.variant(method)
    if variant.network.freeze == "auto":
        raise RequestError(
            "network.freeze is 'auto', which would be chosen anew for every seed: write the block that "
            "`lightcl analyze` names into network.freeze"
        )
    if plan.device is not None and variant.method.sums_statistics:
        raise RequestError("method.share_statistics needs a fleet: leave out --device, or set it to false")
    Aggregator.check(variant.server)
    prepare(variant)


# -- the folder ----------------------------------------------------------------------------------------------------


def _check_folder(plan: Plan, *, resume: bool, overwrite: bool) -> None:
    """Raises RequestError where the folder holds something that this benchmark must not go on with or replace."""
    folder, about = plan.folder, plan.folder / "bench.json"
    if resume and overwrite:
        raise RequestError("--resume and --overwrite: choose one")
    names_in(folder, OWN, about)
    if resume and not about.exists():
        raise RequestError(f"--out: {folder} holds no benchmark to go on with")
    if about.exists() and not resume and not overwrite:
        raise RequestError(f"--out: {folder} holds a benchmark; go on with --resume or replace it with --overwrite")
    if resume:
        try:
            before = json.loads(about.read_text())
            earlier = scenario_from_json(json.dumps(before["scenario"]))
        except (OSError, ValueError, KeyError) as error:
            raise RequestError(f"{about} cannot be read ({error}); replace it with --overwrite") from error
        same = scenario_digest(earlier) == scenario_digest(plan.scenario)
        if not same or before["device"] != plan.device:
            raise RequestError(
                f"--resume: {folder} holds the benchmark of another scenario or device; name another --out"
            )


def _begin(plan: Plan, command: str, *, overwrite: bool) -> None:
    file = plan.folder / "bench.json"
    if overwrite:
        file.unlink(missing_ok=True)  # first: a benchmark that is half gone is none
    if not file.exists():  # also what one left that was killed while it was replaced
        for name in set(OWN) - {LOCK}:
            shutil.rmtree(plan.folder / name, ignore_errors=True)
            (plan.folder / name).unlink(missing_ok=True)
    for name in ("scenarios", "logs", "runs"):
        (plan.folder / name).mkdir(parents=True, exist_ok=True)
    for method in plan.methods:
        write_atomically(plan.folder / "scenarios" / f"{method}.yaml", plan.variant(method).to_yaml())
    about = json.loads(file.read_text()) if file.exists() else {"device": plan.device, "starts": []}
    about["scenario"] = plan.scenario.model_dump(mode="json")
    about["starts"].append(describe_run(command, "bench"))
    write_atomically(file, json.dumps(about, indent=2))


# -- the runs ------------------------------------------------------------------------------------------------------


class _Runner:
    """Runs commands as child processes, and ends them with the benchmark."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, command: Sequence[str], log: Path) -> int:
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
        """In the child: it must not outlive a benchmark that was killed, or it would hold its folder against --resume.

        What it had reported is on disk. Linux only; elsewhere nothing happens.
        """
        with suppress(AttributeError):
            self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.send_signal(signal.SIGTERM)


def _carry_out(plan: Plan, jobs: int, console: Console) -> dict[str, str]:
    """Runs what is left of the cells, `jobs` at a time; returns the reasons of those that failed."""
    left = [cell for cell in plan.cells if not RunFolder(plan.run_folder(*cell)).whole]
    failures: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    runner = _Runner()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("runs", total=len(plan.cells), completed=len(plan.cells) - len(left))
        started = time.monotonic()

        def one(cell: tuple[str, int]) -> None:
            method, seed = cell
            log = plan.folder / "logs" / f"{method}-seed-{seed}.log"
            code = runner.run(_command(plan, method, seed), log)
            done = plan.results(method, seed)
            if done is None:
                failures[f"{method}, seed {seed}"] = f"exit code {code}; {_last_line(log)} ({log})"
            said = _said(done) if done else f"[red]failed[/], see {escape(str(log))}"
            progress.advance(bar)
            finished = progress.tasks[0].completed - (len(plan.cells) - len(left))
            minutes = (time.monotonic() - started) / finished * (len(left) - finished) / 60
            progress.update(bar, description=f"runs, about {minutes:.0f} min left")
            console.print(f"{method}, seed {seed}: {said}", highlight=False, soft_wrap=True)

        with ThreadPoolExecutor(jobs) as pool:
            try:
                list(pool.map(one, left))
            except BaseException:
                runner.stop()
                pool.shutdown(cancel_futures=True)
                raise
    return failures


def _command(plan: Plan, method: str, seed: int) -> list[str]:
    out = plan.run_folder(method, seed)
    kind = ["simulate"] if plan.device is None else ["train", "--device", str(plan.device)]
    command = [sys.executable, "-m", "simulations.main", *kind, str(plan.folder / "scenarios" / f"{method}.yaml")]
    command += ["--set", f"seed={seed}", "--out", str(out)]
    return command + (["--resume"] if (out / "run.json").exists() else [])


def _said(results: Results) -> str:
    tested = [(setting, figures) for setting in ("til", "cil") if (figures := results.figures(setting))]
    accuracies = ", ".join(f"{setting.upper()} {figures.average_accuracy.mean:.1%}" for setting, figures in tested)
    lost = f", [yellow]{_dropped(results)}[/]" if results.dropped else ""
    return f"{accuracies}, {results.seconds:.0f} s{lost}"


def _dropped(results: Results) -> str:
    numbers = sorted(results.dropped)
    return f"without device{'s' * (len(numbers) > 1)} {number_ranges(numbers)}, dropped from the run"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _measure(plan: Plan, console: Console) -> dict[str, str]:
    """Counts FLOPs and memory, and measures memory, where that is not done yet; returns the reasons of failures."""
    file = plan.folder / "footprint.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    failures: dict[str, str] = {}
    missing = [method for method in plan.methods if method not in known]
    if not missing:
        return failures
    source = load_source(plan.scenario.source_request())
    for method in missing:
        console.print(f"measuring the memory of {method} in a fresh process", style="dim", highlight=False)
        try:
            known[method] = footprint_of(plan.variant(method), source, plan.device or 0, measuring=True).to_json()
        except MeasurementFailure as error:
            failures[f"memory of {method}"] = str(error)
        else:
            write_atomically(file, json.dumps(known, indent=2))
    return failures


# -- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One method: accuracies in 0..1 as mean and standard deviation over the seeds, memory in bytes."""

    method: str
    seeds: int
    figures: Mapping[str, tuple[float, float] | None]
    """By "cil average_accuracy" and so on; None where the method is not tested for it or no run is complete."""
    flops: float | None
    counted: int | None
    measured: int | None
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "seeds": self.seeds,
            "flops": self.flops,
            "memory_theory_bytes": self.counted,
            "memory_measured_bytes": self.measured,
            "seconds": self.seconds,
        } | {
            name: {"mean": f[0], "std": None if isnan(f[1]) else f[1]} if f else None
            for name, f in self.figures.items()
        }


def _row(plan: Plan, method: str) -> Row:
    complete = [r for seed in plan.seeds if (r := plan.results(method, seed)) is not None]
    figures: dict[str, tuple[float, float] | None] = {}
    for setting, key in FIGURES:
        values = [getattr(found, key).mean for r in complete if (found := r.figures(setting))]
        spread = stdev(values) if len(values) > 1 else nan
        joint = key == "forgetting" and plan.variant(method).method.joint
        figures[f"{setting} {key}"] = (fmean(values), spread) if values and not joint else None
    file = plan.folder / "footprint.json"
    size = (json.loads(file.read_text()) if file.exists() else {}).get(method)
    return Row(
        method,
        len(complete),
        figures,
        size["theory"]["training_flops"] if size else None,
        (size.get("theory_second_task") or size["theory"])["peak"] if size else None,
        size["measured"]["training"] if size else None,
        fmean(r.seconds for r in complete) if complete else None,
    )


def table(plan: Plan, rows: Sequence[Row]) -> str:
    """Markdown, with what it is a table of."""
    about = json.loads((plan.folder / "bench.json").read_text())
    scenario = plan.scenario
    whom = f"device {plan.device} of {scenario.fleet.devices}" if plan.device is not None else "all devices"
    commits = ", ".join(dict.fromkeys((start["git_commit"] or "unknown")[:12] for start in about["starts"]))
    base = next((row.measured for row in rows if row.method == BASELINE), None)
    departures = resets(scenario, plan.methods)
    lines = [
        f"# All methods on {scenario.name}",
        "",
        *dict.fromkeys(f"    {start['command']}" for start in about["starts"]),
        "",
        f"{scenario.data.source}, {amount(scenario.stream.tasks, 'task')} x "
        f"{amount(scenario.stream.classes_per_task, 'class', 'classes')}, "
        f"{amount(scenario.training.epochs, 'epoch')} a task, batch {scenario.training.batch_size}, "
        f"{scenario.device.precision}, {whom}, seeds {', '.join(map(str, plan.seeds))}; commit {commits}, "
        f"torch {about['starts'][-1]['libraries']['torch']}, {about['starts'][-1]['machine']}.",
        "",
        *(f"Not as in the scenario: {line}." for line in departures),
        *([""] if departures else []),
        "Accuracy and forgetting in percent, mean ± standard deviation over the seeds. FLOPs: the "
        "training steps of a whole stream, counted (for a fleet, device 0's; what methods do between tasks is not in "
        "it). Memory: peak of a training step of the second task in MiB (2^20 bytes), by our count and as "
        "measured (tensors).",
        "",
        "| method | seeds | CIL | TIL | CIL forgetting | TIL forgetting | TFLOPs | MiB, theory | MiB, measured "
        "| measured / theory | measured / SGD | seconds a run |",
        "|" + "---|" * 12,
    ]
    for row in rows:
        cells = [row.method, str(row.seeds), *(_percent(row.figures[f"{s} {key}"]) for s, key in FIGURES)]
        cells += [_number(row.flops, 1e12, 1), _number(row.counted, MIB, 1), _number(row.measured, MIB, 1)]
        ratios = (
            row.measured / row.counted if row.measured and row.counted else None,
            row.measured / base if row.measured and base else None,
        )
        cells += [*(_number(ratio, 1, 2) for ratio in ratios), _number(row.seconds, 1, 0)]
        lines.append(f"| {' | '.join(cells)} |")
    lost = [
        f"{method}, seed {seed}: {_dropped(found)}; `--resume` tries again"
        for method, seed in plan.cells
        if (found := plan.results(method, seed)) and found.dropped
    ]
    lines += [line for text in lost for line in ("", text)]
    return "\n".join(lines) + "\n"


def _percent(figure: tuple[float, float] | None) -> str:
    if figure is None:
        return "–"
    mean, deviation = (100 * value for value in figure)
    return f"{mean:.2f}" + (f" ± {deviation:.2f}" if not isnan(deviation) else "")


def _number(value: float | None, unit: float, digits: int) -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}"


def _write(plan: Plan, console: Console) -> None:
    """The table of what there is, as Markdown, JSON and picture."""
    from simulations.reports.plots import LIGHT, accuracy_over_memory, png

    rows = [_row(plan, name) for name in plan.methods]
    text = table(plan, rows)
    write_atomically(plan.folder / "table1.md", text)
    write_atomically(plan.folder / "table1.json", json.dumps([row.to_json() for row in rows], indent=2))
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    points = {
        s: {r.method: (r.measured / MIB, *f) for r in rows if r.measured and (f := r.figures[f"{s} average_accuracy"])}
        for s in ("cil", "til")
    }
    if any(points.values()):
        (plan.folder / "table1.png").write_bytes(png(accuracy_over_memory(points, LIGHT)))
    for name in ("table1.md", "table1.png"):
        if (plan.folder / name).exists():
            console.print(f"{os.path.relpath(plan.folder / name)}", highlight=False, markup=False, soft_wrap=True)

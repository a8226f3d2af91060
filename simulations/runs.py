"""From a checked scenario to files: a simulated fleet, one device, an analysis of the blocks, or pre-training."""

from __future__ import annotations

import json
import os
import time
from math import isfinite
from pathlib import Path
from typing import cast, get_args

import torch
from rich.console import Console

from lightcl.analysis.generalizability import analyse, analysed_scenario
from lightcl.data.sources import SourceName, SourceRequest, load_source
from lightcl.device.device import EdgeDevice
from lightcl.errors import RequestError, nearest
from lightcl.networks.resnet import Stem
from lightcl.preparation import Prepared, open_run, prepare
from lightcl.pretraining import EpochReport, Recipe
from lightcl.pretraining import pretrain as run_pretraining
from lightcl.records.folder import ANALYSIS, RunFolder
from lightcl.records.rows import add_test_, add_training_, device_row, round_row, run_results
from lightcl.scenario import Scenario
from lightcl.storage.files import names_in, writable, write_atomically
from server.aggregation import Aggregator
from simulations.options import amount
from simulations.progress import AnalysisProgress, LiveProgress, accuracy_table, block_table
from simulations.runtime import check_cluster

ANALYSIS_PICTURE = "generalizability.png"


def simulate_run(
    scenario: Scenario, path: Path, *, command: str, resume: bool, overwrite: bool, console: Console
) -> None:
    """A fleet in Flower's simulation runtime. Raises RequestError before anything is written, RunFailure later."""
    check_cluster(scenario)
    folder = RunFolder(path.absolute())
    prepared = _open(folder, scenario, command, "fleet", resume, overwrite, console)
    with folder.held():
        _simulate(prepared.scenario, folder, console)
    _conclude(folder, console)


def _open(
    folder: RunFolder, scenario: Scenario, command: str, kind: str, resume: bool, overwrite: bool, console: Console
) -> Prepared:
    Aggregator.check(scenario.server)
    with AnalysisProgress(console) as progress:
        prepared = open_run(
            folder, scenario, command, kind, resume=resume, overwrite=overwrite, on_step=progress.step
        )  # fmt: skip
    if scenario.network.freeze == "auto":
        console.print(f"network.freeze: auto chose {prepared.scenario.network.freeze}", highlight=False)
    return prepared


def _simulate(scenario: Scenario, folder: RunFolder, console: Console) -> None:
    from server.app import make_app
    from server.rounds import Coordinator, RunFailure
    from simulations.runtime import simulate

    if folder.whole:
        console.print("the run was complete already", highlight=False)
    else:
        rounds = scenario.stream.tasks * scenario.server.rounds_per_task * scenario.fleet.devices
        with LiveProgress(console, rounds) as progress:
            coordinator = Coordinator(scenario, folder, str(folder.read()["run"]), progress)
            try:
                simulate(make_app(coordinator), folder.path / "devices", scenario)
            except RunFailure:
                _report(folder, console)  # it shows how far the run came, and why no farther
                raise
            finally:
                coordinator.stop.set()  # the server runs in a thread of this process and must end with it


def train_run(
    scenario: Scenario, number: int, path: Path, *, command: str, resume: bool, overwrite: bool, console: Console
) -> None:
    """One device's stream in this process; its rows are the server's, with all of a task in one round."""
    if scenario.method.sums_statistics:
        raise RequestError(
            "method.share_statistics needs a fleet, whose server adds up the sums: use lightcl simulate, or "
            "--set method.share_statistics=false"
        )
    folder = RunFolder(path.absolute())
    prepared = _open(folder, scenario, command, f"device {number}", resume, overwrite, console)
    with folder.held():
        if folder.whole:
            console.print("the run was complete already", highlight=False)
        else:
            _train(prepared, number, folder, console)
    _conclude(folder, console)


def _train(prepared: Prepared, number: int, folder: RunFolder, console: Console) -> None:
    scenario = prepared.scenario
    first, tasks, epochs = scenario.first_task, scenario.stream.tasks, scenario.training.epochs
    device = EdgeDevice(
        scenario, number, folder.path / "devices" / f"device-{number:05d}", source=prepared.source,
        share=prepared.shares[number],
    )  # fmt: skip
    # The device may be one task ahead of the rows: it repeats no work, it only says again what came out.
    learned, told = len(device.rows["til"]), len(folder.rows("rounds.jsonl"))
    if learned > told + 1:
        raise RequestError(
            f"--resume: {folder.path / 'rounds.jsonl'} tells of {told} tasks, but the device has learned {learned}; "
            "put its rows back, or begin anew with --overwrite"
        )
    done = min(learned, told)
    folder.forget_after(done)
    with LiveProgress(console, tasks - first) as progress:
        for task in range(first + done, tasks):
            start, number_of_round = time.monotonic(), task - first + 1
            progress.round_started(number_of_round, tasks - task, 1)
            progress.phase_started("train", 1)
            row = device_row(number_of_round, number, f"device-{number}", task, epochs)
            trained = device.train(task, epochs, progress.epoch_done)
            training_seconds = time.monotonic() - start
            progress.device_done(number, "train")
            progress.phase_started("evaluate", 1)
            tested = device.evaluate()
            progress.device_done(number, "evaluate")
            add_training_(row, trained)
            add_test_(row, tested)
            folder.append("devices.jsonl", [row])
            summary = round_row([row], int(task == tasks - 1), training_seconds, time.monotonic() - start)
            folder.append("rounds.jsonl", [summary])
            progress.round_finished(summary)
    folder.finish(run_results([device.rows], tasks, devices=1, dropped={}, rounds=folder.rows("rounds.jsonl")))


def analyse_run(
    scenario: Scenario, number: int, path: Path, *, command: str, overwrite: bool, console: Console
) -> None:
    """Measures how general every block is on one device's stream; writes figures and a picture, names a freeze point.

    Raises RequestError before anything is written, TrainingFailure later.
    """
    file, picture = path / ANALYSIS, path / ANALYSIS_PICTURE
    if names_in(path, (ANALYSIS, ANALYSIS_PICTURE)) and not overwrite:
        raise RequestError(f"--out: {path} holds an analysis; replace it with --overwrite")
    analysed_scenario(scenario)
    prepared = prepare(scenario)
    with writable(path):
        path.mkdir(parents=True, exist_ok=True)
    with AnalysisProgress(console) as progress:
        found = analyse(scenario, number, prepared.source, prepared.shares[number], progress.step)
    from simulations.reports import plots

    threshold = scenario.network.freeze_threshold
    about = {"command": command, "scenario": scenario.model_dump(mode="json")}
    write_atomically(file, json.dumps(found.record(threshold) | about, indent=2))
    picture.write_bytes(plots.png(plots.generalizability(found, threshold, plots.LIGHT)))
    console.print(block_table(found, threshold))
    console.print(
        f"freeze point at threshold {threshold:g}: {found.freeze_point(threshold)}\n"
        f"figures: {os.path.relpath(file)}; picture: {os.path.relpath(picture)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _conclude(folder: RunFolder, console: Console) -> None:
    results = folder.results()
    if results:
        console.print(accuracy_table(results))
        if results["dropped"]:
            lost = amount(len(results["dropped"]), "device")
            console.print(f"[yellow]put out of the run: {lost}[/]", highlight=False)
    _report(folder, console)


def _report(folder: RunFolder, console: Console) -> None:
    from simulations.reports.page import build_report

    page = os.path.relpath(build_report(folder))
    console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)


def pretrain_run(
    *, source: str, path: Path | None, data_name: str, file: Path, width: int, stem: str, image_size: int | None,
    epochs: int, batch_size: int, learning_rate: float, fp32: bool, flip: bool, seed: int, threads: int | None,
    overwrite: bool, command: str, console: Console,
) -> None:  # fmt: skip
    """Pre-trains and says what came out. Raises RequestError for a wrong request before anything is written."""
    for given, allowed, option in ((source, get_args(SourceName), "source"), (stem, get_args(Stem), "stem")):
        if given not in allowed:
            raise RequestError(
                f"--{option} {given!r}: unknown{nearest(given, allowed)} (allowed: {', '.join(allowed)})"
            )
    if not (isfinite(learning_rate) and learning_rate > 0):
        raise RequestError(f"--learning-rate {learning_rate:g}: expected a number above 0")
    for written in (file, file.with_suffix(".md")):  # the weights and their card
        if written.is_dir():
            raise RequestError(f"--out: {written} is a folder")
        if written.exists() and not overwrite:
            raise RequestError(f"--out: {written} exists; replace it with --overwrite")
    if threads:
        torch.set_num_threads(threads)
    images = load_source(SourceRequest(cast(SourceName, source), path, image_size))
    recipe = Recipe(
        width=width, stem=cast(Stem, stem), epochs=epochs, batch_size=batch_size, peak_learning_rate=learning_rate,
        bf16=not fp32, flip=flip, seed=seed,
    )  # fmt: skip

    def report(epoch: EpochReport) -> None:
        left = epoch.seconds * (epoch.epochs - epoch.epoch) / 60
        console.print(
            f"epoch {epoch.epoch}/{epoch.epochs}: loss {epoch.loss:.3f}, top-1 {epoch.accuracy:.1%}, "
            f"{epoch.seconds:.0f} s, about {left:.0f} min left",
            highlight=False,
        )

    name = data_name or (path.name if path else source)
    accuracy = run_pretraining(images, recipe, file, data=name, command=command, report=report)
    card = file.with_suffix(".md")
    console.print(f"top-1 {accuracy:.2%}; weights: {file}; card: {card}", highlight=False, markup=False)

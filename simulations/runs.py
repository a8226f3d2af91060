"""From a checked scenario to a run folder with a report: a simulated fleet, one device, or pre-training."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import cast, get_args

import torch
from rich.console import Console

from lightcl.data.sources import SourceName, SourceRequest, load_source
from lightcl.device import EdgeDevice, scenario_digest
from lightcl.errors import RequestError, nearest
from lightcl.networks.resnet import Stem
from lightcl.pretraining import EpochReport, Recipe
from lightcl.pretraining import pretrain as run_pretraining
from lightcl.scenario import Scenario
from server.provenance import describe_run
from server.records import RunFolder, device_row, round_row, run_results
from simulations.preparation import Prepared, prepare
from simulations.progress import LiveProgress, accuracy_table


def simulate_run(
    scenario: Scenario, path: Path, *, command: str, resume: bool, overwrite: bool, console: Console
) -> None:
    """A fleet in Flower's simulation runtime. Raises RequestError before anything is written, RunFailure later."""
    from server.app import make_app
    from server.coordinator import Coordinator, RunFailure
    from simulations.runtime import simulate

    folder = RunFolder(path.absolute())
    prepared = _open_run(folder, scenario, command, resume=resume, overwrite=overwrite)
    if folder.completed:
        console.print("the run was complete already", highlight=False)
    else:
        rounds = scenario.stream.tasks * scenario.server.rounds_per_task * scenario.fleet.devices
        with LiveProgress(console, rounds) as progress:
            coordinator = Coordinator(prepared.scenario, folder, str(folder.read()["run"]), progress)
            try:
                simulate(make_app(coordinator), folder.path / "devices", scenario.fleet.devices, scenario.runtime)
            except RunFailure:
                _report(folder, console)  # it shows how far the run came, and why no farther
                raise
            finally:
                coordinator.stop.set()  # the server runs in a thread of this process and must end with it
    _conclude(folder, console)


def train_run(
    scenario: Scenario, number: int, path: Path, *, command: str, resume: bool, overwrite: bool, console: Console
) -> None:
    """One device's stream in this process; the rows are those the server would write of it."""
    folder = RunFolder(path.absolute())
    prepared = _open_run(folder, scenario, command, resume=resume, overwrite=overwrite)
    tasks, epochs = scenario.stream.tasks, scenario.training.epochs
    device = EdgeDevice(
        scenario, number, folder.path / "devices" / f"device-{number:05d}", source=prepared.source,
        share=prepared.shares[number],
    )  # fmt: skip
    folder.forget_after(_tested(device))
    with LiveProgress(console, tasks) as progress:
        for task in range(_tested(device), tasks):
            start = time.monotonic()
            progress.round_started(task + 1, tasks - task, 1)
            progress.phase_started("train", 1)
            row = device_row(task + 1, number, f"device-{number}", task, epochs)
            trained = device.train(task, epochs, progress.epoch_done)
            training_seconds = time.monotonic() - start
            progress.device_done(number, "train")
            progress.phase_started("evaluate", 1)
            tested = device.evaluate()
            progress.device_done(number, "evaluate")
            row |= {"examples": trained.examples, "loss": trained.loss}
            row |= {"til": tested.til, "cil": tested.cil, "images": tested.images}
            row["timing"] = {
                "train_seconds": trained.seconds,
                "peak_memory_mib": trained.peak_memory_mib,
                "evaluate_seconds": tested.seconds,
            }
            folder.append("devices.jsonl", [row])
            summary = round_row([row], int(task == tasks - 1), training_seconds, time.monotonic() - start)
            folder.append("rounds.jsonl", [summary])
            progress.round_finished(summary)
    folder.finish(run_results([device.rows], tasks, devices=1, dropped={}, rounds=folder.rows("rounds.jsonl")))
    _conclude(folder, console)


def _tested(device: EdgeDevice) -> int:
    """Tasks that were learned and tested, and whose rows therefore may stand in the run folder."""
    return len(device.rows["til"])


def _open_run(folder: RunFolder, scenario: Scenario, command: str, *, resume: bool, overwrite: bool) -> Prepared:
    """Checks the request as a whole, and only then writes."""
    prepared = prepare(scenario)
    if resume and folder.exists:
        before = Scenario.model_validate(folder.read()["scenario"])
        if scenario_digest(before) != scenario_digest(scenario):
            raise RequestError(
                f"--resume: the run in {folder.path} has another scenario ({_difference(before, scenario)}); "
                "give the same one, or another --out"
            )
    folder.prepare(resume=resume, overwrite=overwrite)
    if not folder.exists:
        folder.begin(scenario, describe_run(command, uuid.uuid4().hex[:12]), prepared.partition_rows())
    return prepared


def _difference(before: Scenario, after: Scenario) -> str:
    """The first key in which two scenarios differ."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    for section in old:
        if old[section] == new[section]:
            continue
        if not isinstance(old[section], dict):
            return f"{section} was {old[section]!r}, now {new[section]!r}"
        for key in sorted(old[section].keys() | new[section].keys()):
            was, now = old[section].get(key), new[section].get(key)
            if was != now:
                return f"{section}.{key} was {was!r}, now {now!r}"
    return "no key differs"


def _conclude(folder: RunFolder, console: Console) -> None:
    results = folder.results()
    if results:
        console.print(accuracy_table(results))
        if results["dropped"]:
            console.print(f"[yellow]{len(results['dropped'])} devices were put out of the run[/]", highlight=False)
    _report(folder, console)


def _report(folder: RunFolder, console: Console) -> None:
    from simulations.report import build_report  # matplotlib takes a second to import

    console.print(f"report: {os.path.relpath(build_report(folder))}", highlight=False, soft_wrap=True)


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
    if file.exists() and not overwrite:
        raise RequestError(f"--out: {file} exists; replace it with --overwrite")
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
    console.print(f"top-1 {accuracy:.2%}; weights: {file}; card: {file.with_suffix('.md')}", highlight=False)

"""The part of a run that comparisons use: figures by device, curves, bytes, time, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np

from lightcl.metrics import AccuracyMatrix
from lightcl.records import load_run
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from simulations.reports.figures import reported

FIGURES = (("til", "average_accuracy"), ("til", "forgetting"), ("cil", "average_accuracy"), ("cil", "forgetting"))


@dataclass(frozen=True)
class RunFigures:
    """One run. Figures are of the devices that finished their stream or, while there are none, of those tested."""

    path: Path
    scenario: Scenario
    device: int | None
    """The device of `lightcl train`; None for a fleet."""
    complete: bool
    dropped: tuple[int, ...]
    figures: Mapping[str, Mapping[int, float]]
    """By "til average_accuracy" and so on, then by device, in 0..1; without forgetting where it is not defined."""
    matrices: Mapping[str, Mapping[int, AccuracyMatrix]]
    """By "til" and "cil", then by device."""
    shares: Mapping[int, Any]
    """The images of each device, as in partition.json."""
    samples: Mapping[int, int]
    """Different training images that each device trained on."""
    learned: Mapping[int, int]
    """Tasks that each device has learned and was tested on."""
    rounds: int
    bytes_down: int
    bytes_up: int
    seconds: float
    process_mib: float | None
    """The highest resident memory of any process that trained a device, PyTorch and the images included."""
    classes: int | None = None
    """Rows of the head; None where the run did not record it."""
    joules: Mapping[int, float] = field(default_factory=dict)
    """Energy per learned task, of the devices that measured all of their trainings."""

    @property
    def devices(self) -> list[int]:
        return sorted(self.figures["til average_accuracy"])

    def curve(self, setting: str) -> list[float]:
        """`[t]`: average accuracy after task t, mean over the devices that were tested then."""
        tasks = self.scenario.stream.tasks
        found = []
        for task in range(tasks):
            values = [
                m.average_accuracy(task) for m in self.matrices[setting].values() if not np.isnan(m.values[task]).all()
            ]
            found.append(float(np.mean(values)) if values else float("nan"))
        return found


def read_results(path: Path) -> dict[str, Any] | None:
    """Final figures of a run as plain values; None before its end. Raises RequestError for a broken file.

    Keys: `til` and `cil` (figures by name, each with its mean over the devices; None where nothing was tested),
    `dropped`, `devices_finished`, `bytes_down`, `bytes_up`, `seconds`.
    """
    results = RunFolder(path).results()
    return None if results is None else asdict(results)


def read_figures(path: Path) -> RunFigures:
    """Raises RequestError where the folder holds no readable run."""
    shown_run = reported(load_run(path))
    run, scenario = shown_run.run, shown_run.scenario
    compared = shown_run.compared
    figures: dict[str, dict[int, float]] = {}
    for setting, key in FIGURES:
        shown = setting in scenario.settings and (
            key != "forgetting" or (scenario.stream.tasks > 1 and not scenario.method.joint)
        )
        devices = [device for device in compared if setting in device.figures] if shown else []
        values = {device.number: device.figures[setting][key] for device in devices}
        # A device that learned a single task has no forgetting (NaN).
        figures[f"{setting} {key}"] = {number: value for number, value in values.items() if not isnan(value)}
    peaks = [row.peak_memory_mib or 0.0 for row in run.devices]
    kind = str(run.about.get("kind", "fleet"))
    return RunFigures(
        path=path,
        scenario=scenario,
        device=int(kind.removeprefix("device ")) if kind.startswith("device ") else None,
        complete=run.results is not None,
        dropped=tuple(sorted(run.dropped)),
        figures=figures,
        matrices={s: {d.number: d.matrix(s) for d in compared if d.matrix(s).last >= 0} for s in ("til", "cil")},
        shares=run.partition,
        samples={device.number: device.samples for device in compared},
        learned={device.number: shown_run.learned[device.number] for device in compared},
        rounds=len(run.rounds),
        bytes_down=shown_run.bytes_down,
        bytes_up=shown_run.bytes_up,
        seconds=shown_run.seconds,
        process_mib=max(peaks, default=0.0) or None,
        classes=shown_run.classes,
        joules={device.number: energy for device in compared if (energy := device.joules_per_task) is not None},
    )

"""One device of the fleet in this process, without Flower, into an open run folder.

Its rows are those that the server writes for the device under `server.aggregation: none`, with one round per task.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from lightcl.device.device import EdgeDevice
from lightcl.device.metering import Board
from lightcl.device.telemetry import Sensors
from lightcl.errors import RequestError
from lightcl.preparation import Prepared
from lightcl.records import DeviceRow, Results, RoundRow
from lightcl.records.folder import DEVICES, EVENTS, ROUNDS, RunFolder
from lightcl.scenario import Scenario
from server.listeners import EventLog, Listeners
from simulations.progress import LiveProgress


def check_alone(scenario: Scenario) -> None:
    """Raises RequestError for a scenario whose devices need a server."""
    if scenario.method.sums_statistics:
        raise RequestError(
            "method.share_statistics needs a fleet, whose server adds up the sums: use lightcl simulate, or "
            "--set method.share_statistics=false"
        )


TELEMETRY = "LIGHTCL_TELEMETRY"
"""Environment variable; 1: this machine's sensors are read. Its energy is the device's only where nothing else runs."""


def train_alone(prepared: Prepared, number: int, folder: RunFolder, progress: LiveProgress) -> None:
    """Trains and tests device `number` on the tasks that the folder has no row of yet; the folder is open and locked.

    The device learns at least one task. Raises RequestError where the rows do not fit the device's state,
    TrainingFailure where training cannot continue.
    """
    scenario = prepared.scenario
    epochs = scenario.training.epochs
    state = folder.path / "devices" / f"device-{number:05d}"
    device = EdgeDevice(
        scenario, number, state, source=prepared.source, share=prepared.shares[number], head=prepared.counts.head,
        board=_board(state),
    )  # fmt: skip
    to_learn = device.stream.ids[device.stream.first :]
    done = _tasks_done(device, folder)
    folder.forget_after(done)
    listeners = Listeners([EventLog(folder.path / EVENTS), progress])
    for number_of_round, task in enumerate(to_learn[done:], done + 1):
        start = time.monotonic()
        listeners.round_started(number_of_round, len(to_learn) - number_of_round + 1, 1)
        listeners.phase_started("train", 1)
        row = DeviceRow(number_of_round, number, f"device-{number}", task, epochs)
        trained = device.train(task, epochs, progress.epoch_done)
        training_seconds = time.monotonic() - start
        listeners.device_done(number, "train")
        listeners.phase_started("evaluate", 1)
        tested = device.evaluate()
        listeners.device_done(number, "evaluate")
        row.add_training_(trained)
        if device.telemetry:
            row.add_telemetry_(device.telemetry)
        row.add_test_(tested)
        folder.append(DEVICES, [row])
        summary = RoundRow.of([row], int(device.finished), training_seconds, time.monotonic() - start)
        folder.append(ROUNDS, [summary])
        listeners.round_finished(summary)
    folder.finish(
        Results.of(
            [device.rows], scenario.stream.tasks, ids=[device.stream.ids], devices=1, dropped={}, rounds=folder.rounds()
        )
    )


def _board(state: Path) -> Board | None:
    return Board(state, Sensors()) if os.environ.get(TELEMETRY) == "1" else None


def _tasks_done(device: EdgeDevice, folder: RunFolder) -> int:
    """Tasks with a row. The device may be one task ahead: it then repeats no work and only reports its result again."""
    learned, reported = len(device.rows["til"]), len(folder.rounds())
    if learned > reported + 1:
        raise RequestError(
            f"--resume: {folder.path / 'rounds.jsonl'} has rows of {reported} tasks, but the device has learned "
            f"{learned}; restore its rows, or start again with --overwrite"
        )
    if reported > learned + 1:
        raise RequestError(
            f"--resume: {folder.path / 'rounds.jsonl'} has rows of {reported} tasks, but the device's state only of "
            f"{learned}; restore the state, or start again with --overwrite"
        )
    return min(learned, reported)

"""The rows of a run: one per device and round, one per round, and the final results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from lightcl.exchange.messages import Tested, Trained
from lightcl.metrics import AccuracyMatrix, Spread, fleet_summary

Row = dict[str, Any]


def device_row(round_number: int, device: int, name: str, task: int, epochs: int) -> Row:
    """What is known of a device before a round; training and testing add `examples`, `loss`, `til`, `cil`, `images`."""
    return {
        "round": round_number,
        "device": device,
        "name": name,
        "task": task,
        "epochs": epochs,
        "bytes_down": 0,
        "bytes_up": 0,
        "timing": {},
    }


def add_training_(row: Row, report: Trained) -> None:
    """Enters into a device's row what came out of its training."""
    row |= {"task": report.task, "epochs": report.epochs, "examples": report.examples, "loss": report.loss}
    row["timing"] |= {"train_seconds": report.seconds, "peak_memory_mib": report.peak_memory_mib}


def add_test_(row: Row, report: Tested) -> None:
    """Enters into a device's row what came out of its test."""
    row |= {"til": report.til, "images": report.images}
    if report.cil:
        row["cil"] = report.cil
    row["timing"]["evaluate_seconds"] = report.seconds


def round_row(rows: Sequence[Row], finished: int, training_seconds: float, seconds: float) -> Row:
    """One round over its devices' rows. `til` and `cil` are the spread of the devices' average accuracies so far."""
    losses = [row["loss"] for row in rows if "loss" in row]
    return {
        "round": rows[0]["round"],
        "task": max(row["task"] for row in rows),
        "devices": len(rows),
        "failed": sum("error" in row for row in rows),
        "devices_finished": finished,
        "loss": fmean(losses) if losses else None,
        "til": _spread([row["til"] for row in rows if "til" in row]),
        "cil": _spread([row["cil"] for row in rows if "cil" in row]),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "timing": {"train_seconds": training_seconds, "seconds": seconds},
    }


def _spread(accuracies: Sequence[Sequence[float]]) -> dict[str, float] | None:
    """Of the devices' average accuracies; None where none was tested."""
    return asdict(Spread.of([fmean(row) for row in accuracies])) if accuracies else None


def run_results(
    finished: Sequence[Mapping[str, Mapping[int, Sequence[float]]]],
    tasks: int,
    *,
    devices: int,
    dropped: Mapping[str, str],
    rounds: Sequence[Row],
) -> Row:
    """Final figures over the devices that finished their stream: `finished[d][setting][t]` is a row of a matrix.

    A setting in which nobody was tested has no figures: None.
    """
    figures: dict[str, Any] = {}
    for setting in ("til", "cil"):
        matrices = [AccuracyMatrix.from_rows(rows[setting], tasks) for rows in finished if rows[setting]]
        summary = {key: asdict(spread) for key, spread in fleet_summary(matrices).items()}
        figures[setting] = summary if matrices or setting == "til" else None
    return {
        "status": "completed",
        "devices": devices,
        "devices_finished": len(finished),
        "dropped": dict(dropped),
        "rounds": len(rounds),
        **figures,
        "bytes_down": sum(row["bytes_down"] for row in rounds),
        "bytes_up": sum(row["bytes_up"] for row in rounds),
        "timing": {"seconds": sum(row["timing"]["seconds"] for row in rounds)},
    }

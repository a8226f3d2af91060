"""Run folders of large fleets, written by the writers of lightcl/records; the figures in them are random numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightcl.records import DeviceRow, Results, RoundRow
from lightcl.records.folder import RunFolder
from lightcl.scenario import Fleet, Scenario, Server, Stream


def write_fleet(path: Path, devices: int, tasks: int = 5, seed: int = 0) -> RunFolder:
    """A completed run in which every device learns its tasks one per round.

    Shares are of very different sizes. A device with few images skips the last tasks and has few test images. Some
    devices fail once.
    """
    random = np.random.default_rng(seed)
    scenario = Scenario(
        name=f"synthetic-{devices}", seed=seed, stream=Stream(tasks=tasks), fleet=Fleet(devices=devices),
        server=Server(max_failures=2),
    )  # fmt: skip
    images = np.maximum(6, random.lognormal(5.0, 0.9, devices).astype(int))
    learned = np.minimum(tasks, np.maximum(1, images // 20))
    ability = np.clip(0.45 + 0.08 * np.log(images / 40) + random.normal(0, 0.06, devices), 0.05, 0.95)
    folder = RunFolder(path)
    first = np.concatenate([[0], np.cumsum(images)])
    ids = [tuple(range(count)) for count in learned.tolist()]
    partition = []
    for d in range(devices):
        row = {"device": d, "train": list(range(first[d], first[d + 1])), "test": list(range(images[d] // 4 + 1))}
        if learned[d] < tasks:
            skipped = [{"task": t, "reason": "too few images", "train": 1, "test": 1} for t in range(learned[d], tasks)]
            row |= {"tasks": list(ids[d]), "skipped": skipped}
        partition.append(row)
    folder.begin(scenario, {"run": "r", "command": "lightcl simulate synthetic.yaml"}, partition)
    finished: dict[int, dict[str, dict[int, list[float]]]] = {d: {"til": {}, "cil": {}} for d in range(devices)}
    rounds = []
    for task in range(tasks):
        rows = []
        for d in np.flatnonzero(learned > task).tolist():
            row = DeviceRow(task + 1, d, f"node-{d % 16}", task, 5, bytes_down=1_650_000, bytes_up=1_650_000)
            if random.random() < 0.002:
                row.error = "no reply within 600 s"
            age = np.arange(task, -1, -1)
            row.til = _accuracies(ability[d] + 0.25 - 0.03 * age, random)
            row.cil = _accuracies(ability[d] - 0.12 * age, random)
            row.images = [int(images[d]) // (4 * int(learned[d])) + 1] * (task + 1)
            row.examples, row.loss = int(images[d]) // int(learned[d]), 0.5
            row.train_seconds, row.evaluate_seconds = 2.0 + random.random(), 0.5
            finished[d]["til"][task], finished[d]["cil"][task] = row.til, row.cil
            rows.append(row)
        rounds.append(RoundRow.of(rows, int((learned <= task + 1).sum()), 0.06 * len(rows), 0.08 * len(rows)))
        folder.append("devices.jsonl", rows)
        folder.append("rounds.jsonl", rounds[-1:])
    folder.finish(Results.of(list(finished.values()), tasks, devices=devices, dropped={}, rounds=rounds, ids=ids))
    return folder


def _accuracies(values: np.ndarray, random: np.random.Generator) -> list[float]:
    return [round(float(v), 4) for v in np.clip(values + random.normal(0, 0.03, len(values)), 0, 1)]

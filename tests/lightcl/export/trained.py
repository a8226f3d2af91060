"""Small trained devices of the digits, with the description that a board writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightcl.assembly import fleet_head
from lightcl.data.sources import load_source
from lightcl.device.device import EdgeDevice
from lightcl.export.model import Description
from lightcl.scenario import Scenario

WIDTH = 8


def scenario(method: str = "lightcl", /, **sections: dict[str, Any]) -> Scenario:
    """Two tasks of the digits, one epoch each; 1,438 training and 359 test images of 8x8 pixels."""
    values: dict[str, Any] = {
        "stream": {"tasks": 2, "classes_per_task": 5},
        "fleet": {"devices": 1},
        "network": {"weights": "none", "width": WIDTH, "freeze": "layer2"},
        "method": {"name": method},
        "training": {"epochs": 1, "batch_size": 32, "learning_rate": 0.05},
        "device": {"accelerator": "cpu"},
    }
    return Scenario.model_validate(values | {key: values.get(key, {}) | value for key, value in sections.items()})


def train(given: Scenario, folder: Path, tasks: int = 2) -> EdgeDevice:
    """Device 0 after some tasks."""
    device = EdgeDevice(given, 0, folder)
    for task in device.stream.ids[:tasks]:
        device.train(task, given.training.epochs)
    describe(device)
    return device


def describe(device: EdgeDevice) -> None:
    source = load_source(device.scenario.source_request())
    head = fleet_head(device.scenario, source)
    Description.of(device.scenario, device.number, source, head).write(device._state.folder)

"""Scenarios in run folders of earlier versions, translated to the current keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_old(scenario: Mapping[str, Any]) -> bool:
    """Whether the scenario of a run.json was written before `runtime` became `device` and `simulation`."""
    return "runtime" in scenario


def translated(scenario: Mapping[str, Any]) -> dict[str, Any]:
    """The scenario of a run.json with the current keys; unchanged if it has them already.

    `runtime.threads`, `runtime.accelerator` and `training.precision` became `device.*`; `runtime.workers` became
    `simulation.workers`.
    """
    values = dict(scenario)
    runtime, training = values.get("runtime"), values.get("training")
    if not is_old(scenario) or not isinstance(runtime, dict):
        return values
    del values["runtime"]
    device = {key: runtime[key] for key in ("threads", "accelerator") if key in runtime}
    if isinstance(training, dict):
        values["training"] = {key: value for key, value in training.items() if key != "precision"}
        device |= {"precision": training["precision"]} if "precision" in training else {}
    values["device"] = device
    values["simulation"] = {"workers": runtime["workers"]} if "workers" in runtime else {}
    return values

"""The scenario: what it may say (model), how it is read (reading, yaml_text), and its keys written out (keys)."""

from lightcl.scenario.keys import scenario_keys, scenario_schema
from lightcl.scenario.model import (
    NAMED_WEIGHTS,
    Data,
    Fleet,
    Network,
    Runtime,
    Scenario,
    Server,
    Stream,
    Training,
    method_names,
    method_types,
)
from lightcl.scenario.reading import load_scenario, scenario_from_json

__all__ = [
    "NAMED_WEIGHTS", "Data", "Fleet", "Network", "Runtime", "Scenario", "Server", "Stream", "Training", "load_scenario",
    "method_names", "method_types", "scenario_from_json", "scenario_keys", "scenario_schema",
]  # fmt: skip

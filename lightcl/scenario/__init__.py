"""The scenario: its content (model), its reader (reading, yaml_text), and the reference of its keys (keys)."""

from lightcl.data.section import Data, Fleet, Stream
from lightcl.exchange.section import Server
from lightcl.networks.section import NAMED_WEIGHTS, Network
from lightcl.scenario.effects import keys_without_effect
from lightcl.scenario.keys import scenario_keys, scenario_schema
from lightcl.scenario.model import Device, Scenario, Simulation, Training, method_names, method_types
from lightcl.scenario.reading import bundled_scenarios, find_scenario, load_scenario, scenario_from_json

__all__ = [
    "NAMED_WEIGHTS",
    "Data",
    "Device",
    "Fleet",
    "Network",
    "Scenario",
    "Server",
    "Simulation",
    "Stream",
    "Training",
    "bundled_scenarios",
    "find_scenario",
    "keys_without_effect",
    "load_scenario",
    "method_names",
    "method_types",
    "scenario_from_json",
    "scenario_keys",
    "scenario_schema",
]

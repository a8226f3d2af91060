"""Fingerprints of a scenario: of what decides a device's numbers, and of what a saved state depends on."""

from __future__ import annotations

import hashlib

from lightcl.data.sources.field import FIELD
from lightcl.networks.section import NAMED_WEIGHTS
from lightcl.scenario.model import OLD_NATIVE, Scenario


def scenario_digest(scenario: Scenario) -> str:
    """A digest of every key that can change a device's numbers; the location of the data and the timeouts cannot."""
    elsewhere = scenario.data.source != FIELD  # keys that other sources do not have
    decisive = scenario.model_dump_json(
        exclude={
            "name": True,
            "data": {"path", "download", *(("classes", "keep") if elsewhere else ())},
            "stream": {"ready_images", "ready_after"} if elsewhere else set[str](),
            "training": {"checkpoint_seconds", "update"},
            "server": {
                "round_timeout",
                "connect_timeout",
                "greeting_timeout",
                "longest_back_off",
                "reconnect_timeout",
                "max_failures",
                "max_failures_in_run",
            },
            "device": {"accelerator", "prefix_cache_gb"},
            "simulation": True,
        }
    )
    decisive = decisive.replace('"convolutions":"native"', f'"convolutions":"{OLD_NATIVE}"')  # as in earlier states
    return hashlib.sha256(decisive.encode()).hexdigest()[:16]


def state_digest(scenario: Scenario) -> str:
    """The scenario's digest without the path of a weights file: a state has the trained part of the network and checks
    the rest by digests of prefix and channels."""
    network = scenario.network
    if network.weights not in NAMED_WEIGHTS:
        network = network.model_copy(update={"weights": "a file"})
    return scenario_digest(scenario.model_copy(update={"network": network}))

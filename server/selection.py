"""Which devices take part in a round."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest

from lightcl.scenario import Scenario
from lightcl.seeds import numpy_generator
from server.ledger import Entry


def devices_per_round(scenario: Scenario) -> int:
    """The most devices that train in a round."""
    return max(1, round(scenario.server.fraction * scenario.fleet.devices))


class Selection:
    """Chooses among the reachable devices; subclasses may consider availability or deadlines.

    A choice depends on the scenario's seed, the round and the entries only, so that a resumed run chooses the same.
    """

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._seed, self._devices = scenario.seed, scenario.fleet.devices
        self._wanted = devices_per_round(scenario)

    def choose(self, reachable: Sequence[Entry], round_number: int) -> list[Entry]:
        """The devices that have learned the smallest share of their streams; `server.fraction` of the fleet, by number.

        Ties are drawn by seed and round.
        """
        draw = numpy_generator(self._seed, "sampling", round_number).permutation(self._devices).tolist()
        epochs = self._scenario.training.epochs
        ranked = nsmallest(
            self._wanted, reachable, key=lambda entry: (entry.progress(epochs), entry.failures, draw[entry.number])
        )
        return sorted(ranked, key=lambda entry: entry.number)

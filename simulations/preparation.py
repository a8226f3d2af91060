"""Everything about a scenario that can be checked before the first write and the first training step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightcl.data.partition import Share, partition
from lightcl.data.sources import Source, load_source
from lightcl.data.streams import build_stream
from lightcl.device import choose_accelerator
from lightcl.exchange import outgoing
from lightcl.networks.build import build_network
from lightcl.scenario import Scenario
from server.aggregation import Aggregator


@dataclass(frozen=True)
class Prepared:
    """A scenario that can be carried out, with its images and who gets which."""

    scenario: Scenario
    source: Source
    shares: list[Share]

    def partition_rows(self) -> Iterator[dict[str, object]]:
        """For partition.json: the indices into the source's training and test split that each device holds."""
        whole = self.scenario.fleet.test_data == "whole"
        for device, share in enumerate(self.shares):
            test = "all test images of its classes" if whole else share.test.tolist()
            yield {"device": device, "train": share.train.tolist(), "test": test}


def prepare(scenario: Scenario) -> Prepared:
    """Loads the images and the weights, cuts every device's stream. Raises RequestError for what cannot be done."""
    choose_accelerator(scenario.runtime.accelerator)
    source = load_source(scenario.source_request())
    shares = partition(source, scenario.fleet, scenario.seed)
    for device, share in enumerate(shares):
        build_stream(scenario, source, share, device)
    network = build_network(scenario, in_channels=source.channels, classes=len(source.classes))
    if scenario.server.aggregation != "none":
        Aggregator(scenario.server, outgoing(network, scenario.server.aggregation))
    return Prepared(scenario, source, shares)

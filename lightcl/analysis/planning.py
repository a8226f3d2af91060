"""Planning for a memory budget: the setting of a LightCL scenario that fits and changes the scenario least.

A setting is a freeze point, a channel sparsity, a batch size and a memory size. The order of preference, and why:

1. settings that train a part of the network before those that train only the head, which is no longer LightCL;
2. dense before sparse, less sparse before more: in the paper's Table 1 the sparse variant costs 17 points of CIL and 9
   of TIL accuracy on Split CIFAR-10, more than anything else here;
3. the scenario's freeze point before deeper ones, block by block: with every further frozen block, less can be learned;
4. fewer halvings of batch and memory size in total: they change how well a step is estimated, not what can be learned;
5. otherwise the larger memory: everything remembered passes through it, while a smaller batch still sees every image.

Freezing less than the scenario never needs less memory, so shallower freeze points are not candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightcl.analysis.footprint.shapes import MIB, Image
from lightcl.analysis.footprint.theory import Footprint, footprint, workload_of
from lightcl.assembly import build_network
from lightcl.data.tasks import TaskStream
from lightcl.errors import RequestError
from lightcl.methods.lightcl import LightCLParameters
from lightcl.scenario import Scenario, method_types

HALVINGS = 3
SMALLEST_BATCH = 4
SPARSITIES = (0.5, 1.0)
"""Multiples of the sparse variant's own channel sparsity."""


@dataclass(frozen=True)
class Candidate:
    """A setting as a scenario, with its predicted cost."""

    scenario: Scenario
    head_alone: bool
    """Whether every block is frozen."""
    sparsity: float
    """As a multiple of the sparse variant's own; 0: dense, or as sparse as the given scenario."""
    frozen_further: int
    """Blocks frozen beyond the scenario's freeze point."""
    halvings: tuple[int, int]
    """Of the batch size and of the memory size."""
    footprint: Footprint

    @property
    def departure(self) -> tuple[bool, float, int, int, int]:
        """Smaller means closer to the given scenario (the module's docstring explains the order)."""
        batch, memory = self.halvings
        return (self.head_alone, self.sparsity, self.frozen_further, batch + memory, memory)

    @property
    def keys(self) -> dict[str, Any]:
        """The scenario keys that define the setting."""
        method = self.scenario.method
        assert isinstance(method, LightCLParameters)
        return {
            "method.name": method.name,
            "network.freeze": self.scenario.network.freeze,
            "training.batch_size": self.scenario.training.batch_size,
            "method.memory_size": method.memory_size,
        } | ({"method.channel_sparsity": getattr(method, SPARSITY_KEY)} if hasattr(method, SPARSITY_KEY) else {})

    def to_json(self) -> dict[str, Any]:
        return {"keys": self.keys, "departure": self.departure, "footprint": self.footprint.to_json()}


SPARSITY_KEY = "channel_sparsity"
"""The key that makes a LightCL method a sparse one."""


def candidates(scenario: Scenario, stream: TaskStream, image: Image, accelerator: str = "cpu") -> list[Candidate]:
    """All settings with which the method can be built, in order of preference; the given scenario comes first if it is
    one of them.

    Raises RequestError for a method other than LightCL and its variants, and if there is no such setting.
    """
    if not isinstance(scenario.method, LightCLParameters):
        names = [name for name, kind in method_types().items() if issubclass(kind, LightCLParameters)]
        raise RequestError(
            f"plan: method {scenario.method.name} has no freeze point, memory or sparsity to choose (allowed: "
            f"{', '.join(names)}; --set method.name=lightcl)"
        )
    found: list[Candidate] = []
    refused: RequestError | None = None
    for sparsity, method in _sparsities(scenario.method):
        sparse = scenario.model_copy(update={"method": method})
        network = build_network(sparse, in_channels=image[0], classes=stream.head_classes)
        points = ("none", *network.block_names)
        start = len(network.prefix.blocks)
        for frozen, point in enumerate(points[start:]):
            head_alone = point == points[-1]
            if head_alone and scenario.server.aggregation == "suffix":
                continue  # nothing would be left to share
            network.freeze(point)
            for change, halvings in _sizes(scenario):
                candidate = _with(sparse, method, point, change)
                try:
                    cost = candidate.method.cost_on(network)
                except RequestError as error:  # the method cannot be built on this prefix
                    refused = refused or error
                    continue
                count = footprint(network, cost, workload_of(candidate, stream, image, accelerator))
                found.append(Candidate(candidate, head_alone, sparsity, frozen, halvings, count))
    if refused and not found:
        raise refused
    return sorted(found, key=lambda candidate: candidate.departure)


def choose(found: list[Candidate], budget: float) -> Candidate:
    """The first that fits into `budget` bytes. Raises RequestError that names the smallest if none does."""
    fitting = [candidate for candidate in found if candidate.footprint.peak <= budget]
    if not fitting:
        smallest = min(found, key=lambda candidate: candidate.footprint.peak)
        keys = ", ".join(f"{key}={value}" for key, value in smallest.keys.items() if key != f"method.{SPARSITY_KEY}")
        raise RequestError(
            f"--budget-mb {budget / MIB:g}: nothing fits; the smallest setting needs "
            f"{smallest.footprint.peak / MIB:.1f} MiB ({keys}). Allow that much, or use a narrower network or smaller "
            "images (network.width, data.image_size)"
        )
    return fitting[0]


def _sparsities(method: LightCLParameters) -> Iterator[tuple[float, LightCLParameters]]:
    """The method itself, and the sparse variants that are still available."""
    yield 0.0, method
    if hasattr(method, SPARSITY_KEY):  # sparse already: the scenario decides how sparse
        return
    shared = {key: getattr(method, key) for key in LightCLParameters.model_fields if key != "name"}
    for sparse in method_types().values():
        default = sparse.model_fields[SPARSITY_KEY].get_default() if SPARSITY_KEY in sparse.model_fields else None
        # Only a sparse variant of this method: any other would give up more than channels.
        if issubclass(sparse, type(method)) and isinstance(default, Mapping):
            for share in SPARSITIES:
                scaled = {layer: round(share * value, 4) for layer, value in default.items()}
                yield share, sparse.model_validate(shared | {SPARSITY_KEY: scaled})


def _sizes(scenario: Scenario) -> Iterator[tuple[dict[str, int], tuple[int, int]]]:
    """The allowed batch and memory sizes, halved up to `HALVINGS` times each, with the numbers of halvings."""
    assert isinstance(scenario.method, LightCLParameters)
    batch, memory = scenario.training.batch_size, scenario.method.memory_size
    least = scenario.method.smallest_memory(scenario.frozen_batch_norm)
    for b in range(HALVINGS + 1):
        for m in range(HALVINGS + 1):
            if (b and batch >> b < SMALLEST_BATCH) or (m and memory >> m < least):
                continue
            yield {"batch_size": batch >> b, "memory_size": memory >> m}, (b, m)


def _with(scenario: Scenario, method: LightCLParameters, point: str, sizes: Mapping[str, int]) -> Scenario:
    return scenario.model_copy(
        update={
            "method": method.model_copy(update={"memory_size": sizes["memory_size"]}),
            "training": scenario.training.model_copy(update={"batch_size": sizes["batch_size"]}),
            "network": scenario.network.model_copy(update={"freeze": point}),
        }
    )

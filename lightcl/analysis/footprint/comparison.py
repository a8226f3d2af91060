"""The footprint of one method under a scenario: counted and, on request, measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightcl.analysis.footprint.measured import Measurement, measure, rehearsed_workload
from lightcl.analysis.footprint.shapes import Image
from lightcl.analysis.footprint.theory import Footprint, footprint, workload_of
from lightcl.assembly import build_network, stream_to_count
from lightcl.data.sources import Source
from lightcl.device.hardware import choose_accelerator
from lightcl.scenario import Scenario


@dataclass(frozen=True)
class MethodFootprint:
    """A method under a scenario; `rehearsed` is the count for the measured step, in a second task."""

    method: str
    freeze: str
    counted: Footprint
    rehearsed: Footprint | None = None
    measured: Measurement | None = None

    @property
    def shown(self) -> Footprint:
        """The count that corresponds to the measurement, or else the count of the scenario."""
        return self.rehearsed or self.counted

    def to_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {"method": self.method, "freeze": self.freeze, "theory": self.counted.to_json()}
        if self.rehearsed and self.measured:
            result["theory_second_task"] = self.rehearsed.to_json()
            result["measured"] = self.measured.to_json()
            result["measured_over_theory"] = self.measured.training / self.rehearsed.peak
        return result


def image_of(source: Source) -> Image:
    """The shape of the source's images."""
    height, width = source.train.images.shape[1:3]
    return (source.channels, int(height), int(width))


def footprint_of(
    scenario: Scenario, source: Source, device: int | None, measuring: bool, process: bool = True
) -> MethodFootprint:
    """The count and, if `measuring`, the measurement in fresh processes (`process` as in `measure`).

    FLOPs are those of a device's stream; None: the first of the devices that learn the most tasks.
    """
    stream = stream_to_count(scenario, source, device)
    image, classes = image_of(source), stream.head_classes
    network = build_network(scenario, in_channels=image[0], classes=classes)
    cost, accelerator = scenario.method.cost_on(network), choose_accelerator(scenario.device.accelerator).type
    counted = footprint(network, cost, workload_of(scenario, stream, image, accelerator))
    freeze = network.prefix.blocks[-1] if network.prefix.blocks else "none"
    if not measuring:
        return MethodFootprint(scenario.method.name, freeze, counted)
    rehearsed = footprint(network, cost, rehearsed_workload(scenario, image, classes))
    measured = measure(scenario, image, classes, process=process)
    return MethodFootprint(scenario.method.name, freeze, counted, rehearsed, measured)

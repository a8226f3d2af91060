"""The network as a device of a scenario computes with it."""

from __future__ import annotations

from lightcl.assembly import build_network
from lightcl.device.hardware import choose_accelerator
from lightcl.networks.native import use_native_
from lightcl.networks.staged import Backbone
from lightcl.networks.winograd import use_winograd_
from lightcl.scenario import Scenario


def device_network(scenario: Scenario, *, in_channels: int, classes: int) -> Backbone:
    """The network of a device before its first task, with the convolutions of a scenario that has no "auto" there.

    On other accelerators than the CPU nothing is computed in C. Raises RequestError without the accelerator.
    """
    network = build_network(scenario, in_channels=in_channels, classes=classes)
    if scenario.device.convolutions == "winograd":
        use_winograd_(network.suffix)
    elif scenario.device.convolutions == "native" and choose_accelerator(scenario.device.accelerator).type == "cpu":
        use_native_(network.prefix)
        use_native_(network.suffix)
    return network

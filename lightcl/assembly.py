"""From a scenario to what it describes: a device's stream, and the network that every device starts with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightcl.data.partition import Share, partition
from lightcl.data.sources import Source
from lightcl.data.streams import StreamPlan, TaskCounts, count_tasks, cut_stream, head_of
from lightcl.data.tasks import TaskStream
from lightcl.errors import RequestError
from lightcl.networks import BACKBONES
from lightcl.networks.resnet import Stem
from lightcl.networks.staged import Backbone
from lightcl.networks.weights import find_builtin, load_tensors, read_torchvision, read_weights
from lightcl.scenario import Network, Scenario
from lightcl.seeds import derive

PAPER_WIDTH = 64


def build_stream(
    scenario: Scenario, source: Source, share: Share, device: int, head: Sequence[int] | None = None
) -> TaskStream:
    """A device's share, cut into tasks as the scenario says; `head` and errors as of `cut_stream`."""
    return cut_stream(stream_plan(scenario), source, share, device, head)


def fleet_head(scenario: Scenario, source: Source, *, own_data: bool = False) -> tuple[int, ...]:
    """The classes that the rows of the head stand for: those of all streams of the fleet, ascending.

    `own_data`: the devices' images are their own and no partition says whose they are (see `head_of`). Raises
    RequestError where the classes do not suffice, and as `partition` does.
    """
    plan = stream_plan(scenario)
    asked = plan.own_classes and not own_data  # otherwise who holds what makes no difference
    return head_of(plan, source, partition(source, scenario.fleet, scenario.seed) if asked else None)


def stream_plan(scenario: Scenario) -> StreamPlan:
    """The part of a scenario that decides how images become tasks."""
    return StreamPlan(scenario.data, scenario.stream, scenario.fleet, scenario.seed, scenario.method.joint)


def count_fleet(scenario: Scenario, source: Source, shares: Sequence[Share]) -> TaskCounts:
    """The images that each device has for each task; no image is read.

    Raises RequestError where no device can learn anything, and as `cut_stream` does.
    """
    return count_tasks(stream_plan(scenario), source, shares)


def tasks_of_fleet(scenario: Scenario, source: Source, shares: Sequence[Share]) -> list[tuple[int, ...]]:
    """The numbers of the tasks that each device learns; as `count_fleet`."""
    return count_fleet(scenario, source, shares).tasks


def stream_to_count(scenario: Scenario, source: Source, device: int | None = None) -> TaskStream:
    """The stream that a count of FLOPs and memory is about: a device's or, for None, that of the first device that
    learns the most tasks.

    Raises RequestError for a device that learns no task.
    """
    shares = partition(source, scenario.fleet, scenario.seed)
    if device is None:
        tasks = tasks_of_fleet(scenario, source, shares)
        device = max(range(len(tasks)), key=lambda number: len(tasks[number]))
    head = head_of(stream_plan(scenario), source, shares)
    stream = build_stream(scenario, source, shares[device], device, head)
    if not stream:
        raise RequestError(
            f"device {device} learns no task (it has too few images for each of them); name another --device"
        )
    return stream


def build_network(scenario: Scenario, *, in_channels: int, classes: int) -> Backbone:
    """The network before the first task, equal on every device; channels-last, on the CPU.

    Raises RequestError for weights that do not fit, for a freeze point the network does not have, and where the method
    cannot shape it as asked.
    """
    section, method = scenario.network, scenario.method
    if section.freeze == "auto":
        raise RequestError(
            "network.freeze is 'auto', but a network needs a block: the server chooses it before a run starts; without "
            "one, run `lightcl analyze` and write the point it names into the scenario"
        )
    stored = _stored_weights(section)
    width, stem = _shape_of(section, stored)
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator
        torch.manual_seed(derive(scenario.seed, "network"))
        network: Backbone = BACKBONES.find(section.name)(
            width=width,
            classes=classes,
            in_channels=in_channels,
            stem=stem,
            freeze=section.freeze or method.default_freeze,
            frozen_batch_norm=scenario.frozen_batch_norm,
        )
    if stored is not None:
        load_tensors(network, stored, f"network.weights {section.weights!r}", head=False)
    method.shape_(network)
    return network.to(memory_format=torch.channels_last)


def untrained(section: Network) -> Network:
    """The section without its weights, for a network of the same shape. Raises RequestError as `build_network` does."""
    width, stem = _shape_of(section, _stored_weights(section))
    return section.model_copy(update={"weights": "none", "width": width, "stem": stem})


def _stored_weights(section: Network) -> Mapping[str, Tensor] | None:
    """None where no weights are requested; an empty mapping is a file without tensors, which does not fit."""
    if section.weights == "builtin":
        return read_weights(find_builtin())
    if section.weights == "imagenet":
        return read_torchvision()
    return None if section.weights == "none" else read_weights(Path(section.weights))


def _shape_of(section: Network, stored: Mapping[str, Tensor] | None) -> tuple[int, Stem]:
    """Width and stem: the section's, else those that the weights were made with, else the paper's."""
    width, stem = _shape_of_weights(stored or {})
    return section.width or width, section.stem or stem


def _shape_of_weights(stored: Mapping[str, Tensor]) -> tuple[int, Stem]:
    first = stored.get("conv1.weight")
    if first is None or first.ndim != 4:
        return PAPER_WIDTH, "cifar"
    return first.shape[0], "imagenet" if first.shape[-1] == 7 else "cifar"

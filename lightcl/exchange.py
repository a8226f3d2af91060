"""Exactly what may leave a device, under which names, and how it is combined.

Tensors: the suffix (parameters and batch-norm statistics) and, under `suffix+head`, the head. Never the prefix, the
memory samples, the stored patterns, the vital masks or images. Batch-norm's integer counters stay local: averaging them
has no meaning. Beside tensors a device sends the fields of `Greeting`, `Trained`, `Tested` and, where it refuses, of
`Refusal` (whose reason is a text that may name a file); all of them stand in `lightcl/protocol.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightcl.networks.resnet import StagedResNet

Aggregation = Literal["none", "suffix", "suffix+head"]
Arrays = dict[str, np.ndarray]


class ExchangeError(Exception):
    """Tensors that cannot be taken over; the text names the tensor and what is wrong with it."""


def shared_tensors(network: StagedResNet, aggregation: Aggregation) -> dict[str, Tensor]:
    """The live tensors that are exchanged under this aggregation, by name; none under "none"."""
    if aggregation == "none":
        return {}
    tensors = network.suffix.state_dict()
    if aggregation == "suffix+head":
        tensors |= {f"fc.{name}": tensor for name, tensor in network.head.state_dict().items()}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def outgoing(network: StagedResNet, aggregation: Aggregation) -> Arrays:
    """A copy of the shared tensors, as fp32 arrays."""
    return {
        name: tensor.detach().cpu().float().contiguous().numpy().copy()
        for name, tensor in shared_tensors(network, aggregation).items()
    }


def adopt_(network: StagedResNet, arrays: Mapping[str, np.ndarray], aggregation: Aggregation) -> None:
    """Overwrites the shared tensors with `arrays`, or raises ExchangeError and changes nothing."""
    targets = shared_tensors(network, aggregation)
    check(arrays, {name: tuple(tensor.shape) for name, tensor in targets.items()})
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(torch.from_numpy(np.ascontiguousarray(arrays[name])))


def check(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ExchangeError for an unknown or missing name, a wrong shape or type, or a value that is not finite."""
    for name in sorted(arrays.keys() ^ shapes.keys()):
        raise ExchangeError(f"tensor {name!r} is {'not part of the exchange' if name in arrays else 'missing'}")
    for name, array in arrays.items():
        if tuple(array.shape) != shapes[name]:
            raise ExchangeError(f"tensor {name!r} has shape {list(array.shape)}, expected {list(shapes[name])}")
        if not np.issubdtype(array.dtype, np.floating):
            raise ExchangeError(f"tensor {name!r} holds {array.dtype}, expected floating-point values")
        if not np.isfinite(array).all():
            raise ExchangeError(f"tensor {name!r} holds values that are not finite")
        if name.endswith("running_var") and (array < 0).any():
            raise ExchangeError(f"tensor {name!r} holds a negative variance")


def is_statistic(name: str) -> bool:
    """Batch-norm running statistics: averaged, never stepped by a server optimiser (a variance stays positive)."""
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def weighted_average(arrays: Sequence[Mapping[str, np.ndarray]], weights: Sequence[float]) -> Arrays:
    """Σ_d w_d·x_d / Σ_d w_d, by name, summed in fp64. All mappings must have the same names and shapes."""
    total = float(sum(weights))
    return {
        name: np.asarray(
            sum(
                weight / total * device[name].astype(np.float64) for device, weight in zip(arrays, weights, strict=True)
            )
        ).astype(np.float32)
        for name in arrays[0]
    }


def size_in_bytes(arrays: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())

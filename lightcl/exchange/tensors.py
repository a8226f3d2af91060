"""Exactly what may leave a device, under which names, and how it is combined.

Averaged: the suffix (parameters and batch-norm statistics) and, under `suffix+head`, the head. Batch-norm's integer
counters stay local: averaging them has no meaning.

Summed, under `method.share_statistics` and only with the reply that finishes a task: `statistics/...`, class sums of
features (lightcl/methods/parts/closed_form.py) in fp64. The server returns `fleet_head/...`, the head that it solved
from all of them.

Never the prefix, the memory samples, the stored patterns, the vital masks or images. Besides tensors a device sends
the fields of `Greeting`, `Trained`, `Tested` and, if it refuses, of `Refusal` (whose reason is a text that may name a
file); all of them are in `lightcl/exchange/messages.py`. `compression.py` has the form in which the tensors are sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightcl.methods import Method
from lightcl.methods.parts.closed_form import from_upper_triangle
from lightcl.networks.staged import Backbone
from lightcl.storage.state import under
from lightcl.storage.tensor_file import TensorFile

Aggregation = Literal["none", "suffix", "suffix+head"]
Arrays = dict[str, np.ndarray]
STATISTICS = "statistics/"
FLEET_HEAD = "fleet_head/"
LARGEST = float(np.finfo(np.float32).max)
"""The largest number that a device may send. The server computes in fp64, where these do not overflow."""
TYPES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))
"""What tensors may hold. NumPy has wider types, and other orders of bytes, that PyTorch cannot take."""


class Saved(NamedTuple):
    """A fp32 tensor in a file, under this name."""

    file: TensorFile
    name: str
    shape: tuple[int, ...]


class ExchangeError(Exception):
    """Tensors that cannot be adopted; the text names the tensor and what is wrong with it."""


def shared_tensors(network: Backbone, aggregation: Aggregation) -> dict[str, Tensor]:
    """The live tensors that are exchanged under this aggregation, by name; none under "none"."""
    if aggregation == "none":
        return {}
    tensors = network.suffix.state_dict()
    if aggregation == "suffix+head":
        tensors |= {f"{network.head_name}.{name}": tensor for name, tensor in network.head.state_dict().items()}
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def outgoing(network: Backbone, aggregation: Aggregation) -> Arrays:
    """A copy of the shared tensors, as fp32 arrays."""
    return {
        name: np.array(tensor.detach().cpu().float().numpy(), order="C")
        for name, tensor in shared_tensors(network, aggregation).items()
    }


def adopt_(method: Method, arrays: Mapping[str, np.ndarray], aggregation: Aggregation) -> None:
    """Overwrites the network's shared tensors with `arrays` and takes over the fleet's head where it is among them.

    Raises ExchangeError and changes nothing where they are not what is exchanged.
    """
    head, weights = split(arrays, FLEET_HEAD)
    targets = shared_tensors(method.network, aggregation)
    check(weights, {name: tuple(tensor.shape) for name, tensor in targets.items()})
    if head:
        zeros = {name: np.zeros_like(array) for name, array in outgoing_statistics(method).items()}
        check(head, {name: array.shape for name, array in outgoing_head(method, zeros).items()})
        method.adopt_head_({n: torch.from_numpy(np.array(a)) for n, a in under(head, FLEET_HEAD).items()})
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(torch.from_numpy(np.ascontiguousarray(weights[name])))


def outgoing_statistics(method: Method) -> Arrays:
    """What a finished task adds to the fleet's sums, as fp64 arrays under their names on the wire."""
    return {f"{STATISTICS}{name}": tensor.cpu().numpy().copy() for name, tensor in method.statistics().items()}


def outgoing_head(method: Method, totals: Mapping[str, np.ndarray]) -> Arrays:
    """The head that the server sends for these sums, as fp32 arrays under their names on the wire."""
    plain = {name: torch.from_numpy(array) for name, array in under(totals, STATISTICS).items()}
    if not plain:
        return {}
    return {f"{FLEET_HEAD}{name}": tensor.numpy() for name, tensor in method.shared_head(plain).items()}


def split(arrays: Mapping[str, np.ndarray], prefix: str) -> tuple[Arrays, Arrays]:
    """The tensors whose names begin with `prefix`, and all others."""
    chosen = {name: array for name, array in arrays.items() if name.startswith(prefix)}
    return chosen, {name: array for name, array in arrays.items() if name not in chosen}


def check(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ExchangeError for an unknown or missing name, a wrong shape or type, or a value that is not finite."""
    for name in sorted(arrays.keys() ^ shapes.keys()):
        raise ExchangeError(f"tensor {name!r} is {'not part of the exchange' if name in arrays else 'missing'}")
    for name, array in arrays.items():
        if tuple(array.shape) != shapes[name]:
            raise ExchangeError(f"tensor {name!r} has shape {list(array.shape)}, expected {list(shapes[name])}")
        if array.dtype not in TYPES:
            allowed = ", ".join(map(str, TYPES))
            raise ExchangeError(f"tensor {name!r} holds {array.dtype}, expected floating-point values ({allowed})")
        if not np.isfinite(array).all():
            raise ExchangeError(f"tensor {name!r} holds values that are not finite")
        if array.itemsize > 4 and not (np.abs(array) <= LARGEST).all():  # sums and averages of them would overflow
            raise ExchangeError(f"tensor {name!r} holds values beyond {LARGEST:.1e}, the range of fp32")
        if name.endswith("running_var") and (array < 0).any():
            raise ExchangeError(f"tensor {name!r} holds a negative variance")
        if name == f"{STATISTICS}count" and (array < 0).any():
            raise ExchangeError(f"tensor {name!r} holds a negative number of samples")
        if name == f"{STATISTICS}count" and (array != np.round(array)).any():
            raise ExchangeError(f"tensor {name!r} holds a fraction of a sample")
    if f"{STATISTICS}gram" in arrays:
        _check_sums(arrays[f"{STATISTICS}count"], arrays[f"{STATISTICS}total"], arrays[f"{STATISTICS}gram"])


def _check_sums(count: np.ndarray, total: np.ndarray, gram: np.ndarray) -> None:
    """Raises ExchangeError for inconsistent sums: the scatter Σ xxᵀ - Σ_c s_c s_cᵀ / n_c within the classes must have
    no negative eigenvalue, up to rounding.

    The head of the entire fleet is solved from them, so one wrong reply would corrupt it for all devices.
    """
    count, total, gram = (np.array(sums, dtype=np.float64) for sums in (count, total, gram))  # fp32 would overflow
    scatter = from_upper_triangle(torch.from_numpy(gram), total.shape[1]).numpy()
    rounding = 1e-6 * np.trace(scatter) / len(scatter) + 1e-9
    scatter -= (total / np.maximum(count, 1)[:, None]).T @ total
    try:
        consistent = not (total[count == 0] != 0).any() and np.linalg.eigvalsh(scatter)[0] >= -rounding
    except np.linalg.LinAlgError:
        consistent = False
    if not consistent:
        raise ExchangeError(
            f"the sums {STATISTICS}... are inconsistent: the scatter matrix is not positive semidefinite"
        )


def is_statistic(name: str) -> bool:
    """Batch-norm running statistics: averaged, never stepped by a server optimizer (a variance stays positive)."""
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

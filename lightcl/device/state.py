"""What a device saves and restores: the network's changing tensors and the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightcl.networks.staged import Backbone


def changing_tensors(network: Backbone) -> dict[str, Tensor]:
    """All tensors of the network that training can change, by name; the frozen prefix is not among them."""
    tensors = network.suffix.state_dict()
    tensors |= {f"{network.head_name}.{name}": tensor for name, tensor in network.head.state_dict().items()}
    if network.frozen_batch_norm == "train":
        buffers = {name for name, _ in network.named_buffers()}
        tensors |= {name: tensor for name, tensor in network.prefix.state_dict().items() if name in buffers}
    return tensors


def pack_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`optimizer.state_dict()` as tensors by `parameter/key`, and everything else as JSON values.

    `names` are the names of the optimizer's parameters, in its order.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, entry in entries.items():
            if isinstance(entry, Tensor):
                tensors[f"{names[index]}/{key}"] = entry
            else:
                values.setdefault(names[index], {})[key] = entry
    return tensors, {"state": values, "groups": state["param_groups"]}


def unpack_optimizer_(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """The inverse of `pack_optimizer`, into a new optimizer over the same parameters."""
    indices = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(indices[parameter], {})[key] = tensor
    for parameter, entries in values["state"].items():
        state.setdefault(indices[parameter], {}).update(entries)
    groups = []
    for stored, fresh in zip(values["groups"], optimizer.state_dict()["param_groups"], strict=True):
        # JSON has no tuples: Adam's betas come back as a list.
        groups.append({key: tuple(v) if isinstance(fresh.get(key), tuple) else v for key, v in stored.items()})
    optimizer.load_state_dict({"state": state, "param_groups": groups})

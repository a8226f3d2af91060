"""PNN: progressive neural networks. Every task gets its own column, which may use the features of earlier columns.

Rusu et al.: "Progressive Neural Networks", 2016 (arXiv 1606.04671), equation 2. At each boundary between layers, and
before the head, an adapter adds the feature maps of the earlier columns to column k's own map h_k:

    h_k <- h_k + U·relu(norm(V·[h_1, ..., h_(k-1)])),    U and V 1x1 convolutions, V with as many outputs as h_k

Earlier columns are frozen, their batch-norm included, so nothing is forgotten; the task has to be known (TIL only).

Deviations: the lateral term is added to a layer's input, so that both the convolutions and the shortcut of a residual
block see it, and not to one pre-activation inside; batch-norm replaces the paper's learned scale α (without either, the
sum over several columns makes training diverge); U starts at zero and every column from the same initial (pre-trained)
weights, so a new column starts as that network. Columns are copies of suffix and head. They share a frozen prefix,
which is exact if its batch-norm is frozen too. The boundary at the suffix's input has no adapter, since all columns
have the same input there.

The device's network is always the column being learned; earlier columns and one copy of the initial weights are kept
here. Columns are never averaged over devices.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightcl.data.tasks import Batch, TaskContext
from lightcl.methods.base import Method, MethodParameters, StepCost, register
from lightcl.networks.pooling import global_average
from lightcl.networks.staged import Backbone
from lightcl.seeds import derive


class PNNParameters(MethodParameters):
    """`pnn`: one column per task; the task of a test image must be known."""

    order = 4
    settings = ("til",)
    shareable = False
    name: Literal["pnn"] = "pnn"

    def cost(self) -> StepCost:
        return StepCost(columns=True, weight_copies=1)  # the initial weights


class Adapter(nn.Module):
    """U·relu(norm(V·h)): feature maps of earlier columns `[N, C', H, W]` to `[N, C, H, W]`; zero until trained."""

    def __init__(self, before: int, channels: int) -> None:
        super().__init__()
        self.v = nn.Conv2d(before, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.u = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.u.weight)
        nn.init.zeros_(self.u.bias)  # type: ignore[arg-type]

    def forward(self, h: Tensor) -> Tensor:
        laterals: Tensor = self.u(F.relu(self.norm(self.v(h))))
        return laterals


@register(PNNParameters)
class PNN(Method):
    def __init__(self, network: Backbone, parameters: PNNParameters) -> None:
        super().__init__(network, parameters)
        self.initial = {name: tensor.clone() for name, tensor in _column_state(network).items()}
        self.frozen: list[Backbone] = []  # the columns before the network
        self.adapters: list[nn.ModuleDict] = [nn.ModuleDict()]  # of every column, the network's last
        self.classes: list[Tensor] = []  # of every task begun
        self.boundaries = _ends_of_layers(network)

    def trainable(self) -> dict[str, nn.Parameter]:
        own = {f"adapter.{name}": weight for name, weight in self.adapters[-1].named_parameters()}
        return super().trainable() | own

    def begin_task(self, context: TaskContext) -> None:
        if not context.is_first:
            self._add_column(derive(context.seed, "adapters"))
            with torch.no_grad():
                for name, tensor in _column_state(self.network).items():
                    tensor.copy_(self.initial[name])
        self.classes.append(context.task_classes)

    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        return self.cross_entropy(self.all_logits(batch)[-1], batch.labels, context)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """`[N, head]`: the logits of a task's classes come from that task's column, all others from the last one."""
        columns = self.all_logits(batch)
        logits = columns[-1].clone()
        for classes, column in zip(self.classes, columns, strict=False):
            logits[:, classes] = column[:, classes]
        return logits

    def all_logits(self, batch: Batch) -> list[Tensor]:
        """`[N, head]` of every column; the network's comes last and is the only one with a graph."""
        columns = [*self.frozen, self.network]
        self.adapters[-1].train(self.network.training)
        maps = [self.features_of(batch)] * len(columns)
        for block in self.network.suffix.blocks:
            for k, column in enumerate(columns):
                with torch.set_grad_enabled(torch.is_grad_enabled() and column is self.network):
                    maps[k] = column.run_block(block, maps[k])
            if block in self.boundaries:
                maps = [self._with_laterals(maps, k, self.boundaries[block]) for k in range(len(columns))]
        logits: list[Tensor] = [column.head(global_average(h)) for column, h in zip(columns, maps, strict=True)]
        return logits

    def _with_laterals(self, maps: list[Tensor], k: int, boundary: str) -> Tensor:
        if k == 0:
            return maps[k]
        with torch.set_grad_enabled(torch.is_grad_enabled() and k == len(self.frozen)):
            lateral: Tensor = self.adapters[k][boundary](torch.cat(maps[:k], 1))
            return maps[k] + lateral

    def _add_column(self, seed: int) -> None:
        """Freezes the current network as a column and creates the adapters of the next one."""
        shared: dict[int, Any] = {id(module): module for module in self.network.prefix.modules()}
        column = copy.deepcopy(self.network, shared)
        for weight in (*column.suffix.parameters(), *column.head.parameters()):
            weight.requires_grad_(False)
            weight.grad = None
        column.suffix.train(False)
        self.frozen.append(column)
        self.adapters[-1].eval()
        for weight in self.adapters[-1].parameters():
            weight.requires_grad_(False)
            weight.grad = None
        new = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator
            torch.manual_seed(seed)
            for boundary, channels in _channels_at(self.network, self.boundaries).items():
                new[boundary] = Adapter(channels * len(self.frozen), channels)
        self.adapters.append(new.to(self.network.head.weight.device))

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"classes/{task}": classes for task, classes in enumerate(self.classes)}
        for k, column in enumerate(self.frozen):
            state |= {f"column/{k}/{name}": tensor for name, tensor in _column_state(column).items()}
        for k, adapters in enumerate(self.adapters):
            state |= {f"adapter/{k}/{name}": tensor for name, tensor in adapters.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.frozen, self.adapters = [], [nn.ModuleDict()]
        self.classes = [state[f"classes/{task}"] for task in range(sum(k.startswith("classes/") for k in state))]
        for _ in self.classes[1:]:
            self._add_column(seed=0)
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                tensor.copy_(state[name])


def _column_state(network: Backbone) -> dict[str, Tensor]:
    """The live tensors of suffix and head."""
    return network.suffix.state_dict() | {
        f"{network.head_name}.{name}": tensor for name, tensor in network.head.state_dict().items()
    }


def _ends_of_layers(network: Backbone) -> dict[str, str]:
    """The last block of every layer of the suffix -> the name of its boundary (a module's name may hold no dot)."""
    blocks = network.suffix.blocks
    layers = [block.partition(".")[0] for block in blocks]
    following = [*layers, ""][1:]
    return {block: layer for block, layer, after in zip(blocks, layers, following, strict=True) if layer != after}


def _channels_at(network: Backbone, boundaries: Mapping[str, str]) -> dict[str, int]:
    """Channels of the feature map at each boundary."""
    return {boundary: network.block_channels(block) for block, boundary in boundaries.items()}

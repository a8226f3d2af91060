"""The training step of LightCL as the paper's method reads, in plain PyTorch, with nothing saved or shared.

The whole network is in training mode; the frozen part is computed without a graph, for the batch and again for the
memory samples, in every step. The literal twin that benchmarks/learning_step.py measures against.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from lightcl.networks.staged import Backbone, FeatureMaps


class PaperStep:
    """Steps on `network`; `memory` `[M, C, H, W]` uint8, `vital` one boolean `[C]` for each regularized map."""

    def __init__(
        self, network: Backbone, memory: Tensor, vital: Mapping[str, Tensor], *, beta: float = 2e-4, rate: float = 0.01
    ) -> None:
        self.network, self.memory, self.vital, self.beta = network, memory, vital, beta
        self.optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=rate)
        network.train()
        network.prefix.train()
        with torch.no_grad():
            self.logits, self.patterns = self._forward(memory)

    def _forward(self, images: Tensor) -> tuple[Tensor, FeatureMaps]:
        maps: FeatureMaps = {}
        with torch.no_grad():
            features = self.network.prefix(images)
        return self.network.classify(features, maps.__setitem__), maps

    def step(self, images: Tensor, labels: Tensor, classes: Tensor) -> float:
        """One step on a batch of the task with sorted `classes`; returns the loss."""
        self.optimizer.zero_grad()
        logits, _ = self._forward(images)
        loss = F.cross_entropy(logits[:, classes], torch.searchsorted(classes, labels))
        held, maps = self._forward(self.memory)
        drift = (held - self.logits).square().sum()
        for name, mask in self.vital.items():
            drift = drift + (mask[None, :, None, None] * (maps[name] - self.patterns[name])).square().sum()
        loss = loss + self.beta * drift
        loss.backward()
        self.optimizer.step()
        return loss.item()

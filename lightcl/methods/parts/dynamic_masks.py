"""Masks over a network's weights that change during training: which weights are present, and which are updated.

Used by SparCL (lightcl/methods/sparcl.py), which says when they change and what makes a weight important.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightcl.networks.staged import Backbone
from lightcl.seeds import torch_generator
from lightcl.storage.state import under


class DynamicMasks:
    """Keeps a share 1 - `sparsity` of each of the backbone's `maskable_weights`; all others are exactly zero.

    `updated` is the share of a tensor's weights whose gradient is kept. All other tensors stay dense.
    """

    def __init__(self, network: Backbone, sparsity: float, updated: float) -> None:
        self.sparsity, self.share_updated = sparsity, updated
        self.weights = network.maskable_weights()
        self.present: dict[str, Tensor] = {}  # boolean, of the weight's shape
        self.updated: dict[str, Tensor] = {}  # boolean, True only where `present` is

    def size(self, name: str, extra: float = 0.0) -> int:
        """How many weights of a layer may be present: its share plus a share `extra` of all; at least one."""
        return max(1, round((1 - self.sparsity + extra) * self.weights[name].numel()))

    def start(self) -> None:
        """The first masks: the weights with the largest magnitude stay."""
        for name, weight in self.weights.items():
            everywhere = torch.ones_like(weight, dtype=torch.bool)
            self.present[name] = strongest(weight.detach().abs(), everywhere, self.size(name))
        self.zero_()

    def shrink(self, importance: Mapping[str, Tensor], below: float = 0.0) -> None:
        """Drops the least important weights, down to each layer's size minus a share `below` of all its weights."""
        for name, mask in self.present.items():
            self.present[name] = strongest(importance[name], mask, self.size(name, -below))
        self.zero_()

    def grow(self, seed: int, extra: float = 0.0) -> None:
        """Adds randomly drawn weights, at zero, up to each layer's size plus a share `extra` of all its weights."""
        for name, mask in self.present.items():
            free = (~mask).flatten().nonzero().flatten()
            order = torch.randperm(len(free), generator=torch_generator(seed, "grow", name)).to(free.device)
            grown = mask.flatten().clone()
            grown[free[order[: max(0, self.size(name, extra) - int(mask.sum()))]]] = True
            self.present[name] = grown.view_as(mask)

    def choose_updated(self, importance: Mapping[str, Tensor]) -> None:
        """Selects the most important of the present weights for updates."""
        for name, mask in self.present.items():
            self.updated[name] = strongest(importance[name], mask, round(self.share_updated * mask.numel()))

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.mul_(self.updated[name])

    @torch.no_grad()
    def zero_(self) -> None:
        """Resets the masked weights to zero: momentum and weight decay ignore masks."""
        for name, weight in self.weights.items():
            weight.mul_(self.present[name])

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"there/{name}": mask for name, mask in self.present.items()}
        return state | {f"updated/{name}": mask for name, mask in self.updated.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.present = under(state, "there/")
        self.updated = under(state, "updated/")


def strongest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Boolean mask, of the same shape, of the `count` highest scores where `among` is True (all of them if fewer)."""
    ranked = scores.masked_fill(~among, float("-inf")).flatten()
    chosen = torch.zeros_like(among.flatten())
    order = ranked.sort(descending=True, stable=True).indices
    chosen[order[: min(count, int(among.sum()))]] = True
    return chosen.view_as(among)

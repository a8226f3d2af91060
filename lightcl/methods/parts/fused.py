"""A suffix's head and a closed-form head as one linear layer, for export (lightcl/methods/lightcl_plus.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightcl.methods.parts.closed_form import LinearHead
from lightcl.networks.staged import Backbone

UNKNOWN = -1e9
"""Logit of a class without samples: its softmax is 0, and no infinity stands in the exported file."""


class FusedInference(nn.Module):
    """The scores of lightcl-plus, up to a constant per image: float32 images `[N, C, H, W]` in 0..1 -> `[N, classes]`.

    With h the suffix's pooled output and φ the pooled feature maps of the prefix, one linear layer on `[h, φ]` gives
    the logits of the suffix (rows 0 to C-1) and the weighted sum of both classifiers (rows C to 2C-1). From the latter
    the log-sum-exp of the former over each task is subtracted. The closed-form classifier's own normalization is a
    constant per image and left out.
    """

    groups: Tensor
    group_of: Tensor
    weight: Tensor
    guess: Tensor
    center: Tensor

    def __init__(
        self,
        network: Backbone,
        maps: tuple[str, ...],
        grid: bool,
        closed: LinearHead,
        task_of: Tensor,
        suffix_weight: float,
        center: Tensor,
    ) -> None:
        """`maps` and `grid` say what φ is; `task_of` `[classes]` is the task of each class, -1 where it has none.

        `center` `[d]` is a typical φ, from which φ is counted: the sums then cancel less, and fp32 is enough for them.
        """
        super().__init__()
        self.prefix, self.suffix = network.prefix, network.suffix
        self.maps, self.grid = maps, grid
        self.register_buffer("center", center.float())
        self.head = _fused(network.head, closed, task_of >= 0, suffix_weight, self.center)
        tasks = sorted(set(task_of.tolist()) - {-1}) or [-1]
        # 0 where a class belongs to the task, else so low that its exponential is 0.
        self.register_buffer("groups", torch.stack([torch.where(task_of == task, 0.0, UNKNOWN) for task in tasks]))
        places = {task: place for place, task in enumerate(tasks)}
        self.register_buffer("group_of", torch.tensor([places.get(task, 0) for task in task_of.tolist()]))
        mean_size = float((task_of >= 0).sum()) / len(tasks)
        self.register_buffer("weight", torch.where(task_of >= 0, suffix_weight, 0.0))
        guess = -suffix_weight * torch.log(torch.tensor(max(1.0, mean_size)))
        self.register_buffer("guess", torch.where(task_of >= 0, torch.tensor(0.0), guess))

    def forward(self, images: Tensor) -> Tensor:
        pooled: dict[str, Tensor] = {}

        def on_map(name: str, feature_map: Tensor) -> None:
            if name in self.maps:
                parts = quarters(feature_map) if self.grid and name == self.maps[-1] else feature_map.mean((2, 3))
                pooled[name] = parts

        features = self.prefix(images, on_map)
        h = self.suffix(features).mean((2, 3))
        phi = torch.cat([pooled[name] for name in self.maps], 1) - self.center
        logits, scores = self.head(torch.cat([h, phi], 1)).chunk(2, 1)
        # Not torch.logsumexp: some runtimes compute that operator without subtracting the largest first.
        in_task = logits[:, None, :] + self.groups  # [N, tasks, classes]
        largest = in_task.amax(2, keepdim=True)
        of_tasks = (in_task - largest).exp().sum(2).log() + largest[:, :, 0]
        result: Tensor = scores - self.weight * of_tasks.index_select(1, self.group_of) + self.guess
        return result


def quarters(feature_map: Tensor) -> Tensor:
    """`adaptive_avg_pool2d(map, 2).flatten(1)` in slices and means, which every runtime has: `[N, C, H, W]` ->
    `[N, 4C]`."""
    height, width = int(feature_map.shape[2]), int(feature_map.shape[3])
    cells = [
        feature_map[:, :, top:bottom, left:right].mean((2, 3))
        for top, bottom in _halves(height)
        for left, right in _halves(width)
    ]
    return torch.stack(cells, 2).flatten(1)


def _halves(size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where both halves begin and end; the middle row of an odd size belongs to both."""
    return (0, (size + 1) // 2), (size // 2, size)


def _fused(own: nn.Linear, closed: LinearHead, learned: Tensor, suffix_weight: float, center: Tensor) -> nn.Linear:
    """The linear layer of `FusedInference`: `[h, φ - center]` -> logits of the suffix, then the weighted sum.

    `learned` `[classes]` says which classes the suffix has a say in.
    """
    classes, inner = own.weight.shape
    with torch.no_grad():
        known = closed.known > 0
        weight, bias = closed.weight.double(), closed.bias.double()
        bias = bias + weight @ center.double()
        # The mean over the known classes is a constant per image; without it the scores are small and round less.
        weight = torch.where(known[:, None], weight - weight[known].mean(0), 0.0)
        bias = torch.where(known, bias - bias[known].mean(), UNKNOWN)
        share = suffix_weight * learned.double()
        layer = nn.Linear(inner + weight.shape[1], 2 * classes)
        layer.weight.zero_()
        layer.weight[:classes, :inner] = own.weight
        layer.weight[classes:, :inner] = share[:, None] * own.weight
        layer.weight[classes:, inner:] = weight
        layer.bias[:classes] = own.bias
        layer.bias[classes:] = share * own.bias + bias
    return layer

"""Batch-norm for a batch and memory samples that pass together: each part has statistics of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Split:
    """The first `count` samples are a batch's own, the others memory samples, which are normalized by their own
    statistics (`own`) or by the running ones, after the batch has moved them."""

    count: int
    own: bool


def normalized_apart(norm: nn.BatchNorm2d, whole: Callable[[Tensor], Tensor], split: Split, x: Tensor) -> Tensor:
    """The norm of both parts of `x`; `whole` is how it normalizes a batch alone."""
    first, others = torch.split(x, [split.count, len(x) - split.count])
    first = whole(first)
    others = F.batch_norm(
        others, norm.running_mean, norm.running_var, norm.weight, norm.bias, split.own, 0.0, norm.eps
    )  # fmt: skip
    return torch.cat([first, others])

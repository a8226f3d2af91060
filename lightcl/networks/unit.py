"""The unit that networks repeat: a convolution, its batch-norm, perhaps a shortcut, and ReLU; in as few passes over the
map as the modules allow."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightcl.networks.native import NativeBatchNorm2d, NativeConv3x3


def unit(convolution: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """ReLU(norm(convolution(x)))."""
    y = fused(convolution, norm, x)
    return activated(norm, convolution(x)) if y is None else y


def fused(convolution: nn.Module, norm: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor | None:
    """ReLU(norm(convolution(x)) + shortcut) in one operation; None where there is none for it.

    Of trained blocks there is none, also in evaluation mode: in bf16 it rounds once where training rounds twice, and
    a method that holds a map to its recorded value would see a difference.
    """
    if (
        isinstance(norm, NativeBatchNorm2d)
        and isinstance(convolution, NativeConv3x3)
        and not norm.training
        and not convolution.weight.requires_grad
        and not torch.is_grad_enabled()
        and convolution.applies(x)
        and norm.applies(x)
    ):
        return convolution.followed(x, *norm.scale_and_shift(), shortcut)
    return None


def activated(norm: nn.Module, y: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """ReLU(norm(y) + shortcut)."""
    if isinstance(norm, NativeBatchNorm2d) and norm.applies(y):
        return norm.followed(y, shortcut)
    y = norm(y)
    return F.relu(y if shortcut is None else y.add_(shortcut), inplace=True)

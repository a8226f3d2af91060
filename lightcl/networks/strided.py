"""Convolutions with a stride, whose weight gradient in bf16 is one matrix product over patches on the CPU.

PyTorch's own (oneDNN's) takes twice as long there, also where it has several threads: half of the backward pass of the
suffix's first convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StridedConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1, a stride and no bias.

    It computes as `nn.Conv2d`, but for the weight gradient inside autocast to bf16 on the CPU, which is rounded in
    another order.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride, 1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, C', H', W']`."""
        if (
            torch.is_grad_enabled()
            and self.weight.requires_grad
            and input.device.type == "cpu"
            and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
        ):
            result: Tensor = _Strided.apply(input.bfloat16(), self.weight.bfloat16(), self.stride[0])
            return result
        return super().forward(input)


class _Strided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return torch.conv2d(x, weight, None, stride, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        (gradient,), stride = gradients, ctx.stride
        for_x, for_weight, _ = ctx.needs_input_grad
        of_x = of_weight = None
        if for_x:
            of_x = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
            )[0]
        if for_weight:
            of_weight = weight_gradient(x, gradient, stride)
        return of_x, of_weight, None


def weight_gradient(x: Tensor, gradient: Tensor, stride: int) -> Tensor:
    """Of a 3x3 convolution with padding 1: inputs `[N, C, H, W]` and the outputs' gradient `[N, C', H', W']` to
    `[C', C, 3, 3]`, channels-last.

    Sum over n and the positions of gradient[n, c', i, j] · x[n, c, stride·i + k - 1, stride·j + l - 1].
    """
    n, channels, height, width = x.shape
    padded = x.new_zeros(n, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    patches = padded.unfold(1, 3, stride).unfold(2, 3, stride)  # [N, H', W', C, 3, 3]
    rows = patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * channels)
    outputs = gradient.shape[1]
    product = torch.mm(gradient.permute(1, 0, 2, 3).reshape(outputs, -1), rows)
    return product.view(outputs, 3, 3, channels).permute(0, 3, 1, 2)

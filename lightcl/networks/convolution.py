"""Convolutions that train as matrix products on the CPU, where PyTorch's own (oneDNN's) take up to four times as long.

A suffix's maps have 4x4 positions, which leaves oneDNN's kernels little to run along. So the weight gradient of a 3x3
convolution in bf16 is one product over patches where maps are small: on larger maps its kernels are faster, and the
patches would take much memory. A 1x1 convolution is a product over positions; it rounds in another order, so that only
networks in C have it (`use_products_`), and recorded runs keep their numbers.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

POSITIONS, STRIDED_POSITIONS = 16, 64
"""The largest maps of outputs whose weight gradient is a matrix product, without and with a stride. Measured with 20 to
512 channels: with 64 positions and no stride PyTorch's own is as fast, with 256 and a stride it is faster."""


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1 and no bias.

    It computes as `nn.Conv2d`, but for the weight gradient of small maps inside autocast to bf16 on the CPU, which is
    rounded in another order.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, 1, bias=False)
        self._rounded = RoundedWeight()

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, C', H', W']`."""
        if (
            torch.is_grad_enabled()
            and self.weight.requires_grad
            and input.device.type == "cpu"
            and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and by_product(outputs(input, self.stride[0]), self.stride[0])
        ):
            result: Tensor = _ByProduct.apply(input.bfloat16(), self._rounded(self.weight), self.stride[0])
            return result
        return super().forward(input)


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution without padding and bias.

    It computes as `nn.Conv2d`, but for training on the CPU with channels-last maps: there it is a matrix product over
    the positions that its stride meets, and so are its gradients. With 47 maps of 80 channels, 8x8, a stride of 2 and
    160 outputs, forward and weight gradient take 0.6 of the time in fp32 and 0.4 in bf16.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 1, stride, bias=False)
        self._rounded = RoundedWeight()

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, C', H', W']`."""
        if not (
            torch.is_grad_enabled()
            and self.weight.requires_grad
            and self.bias is None
            and input.device.type == "cpu"
            and input.is_contiguous(memory_format=torch.channels_last)
        ):
            return super().forward(input)
        weight = self.weight
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
            input, weight = input.bfloat16(), self._rounded(weight)
        result: Tensor = _OverPositions.apply(input, weight, self.stride[0])
        return result


def use_products_(stage: nn.Module) -> None:
    """Makes every 1x1 convolution of `stage` without padding, bias and groups a `Conv1x1`."""
    for module in stage.modules():
        if (
            type(module) is nn.Conv2d
            and module.kernel_size == (1, 1)
            and module.padding == (0, 0)
            and module.stride[0] == module.stride[1]
            and module.groups == 1
            and module.bias is None
        ):
            module.__class__ = Conv1x1  # the parameters stay the same objects
            vars(module)["_rounded"] = RoundedWeight()


class RoundedWeight:
    """A weight in bf16, made once for all passes of a step, as autocast does: it lives as long as their graphs, and the
    passes' gradients are summed in bf16."""

    def __init__(self) -> None:
        self._copy: ref[Tensor] | None = None
        self._of = (0, 0)

    def __call__(self, weight: Tensor) -> Tensor:
        rounded, now = self._copy() if self._copy else None, (id(weight), weight._version)
        if rounded is None or self._of != now:
            rounded = weight.bfloat16()
            self._copy, self._of = ref(rounded), now
        return rounded

    def __reduce__(self) -> tuple[type[RoundedWeight], tuple[()]]:
        """A copied network starts without one."""
        return RoundedWeight, ()


def by_product(positions: int, stride: int) -> bool:
    """Whether the weight gradient of a map of that many outputs (height times width) is a matrix product."""
    return positions <= (POSITIONS if stride == 1 else STRIDED_POSITIONS)


def outputs(x: Tensor, stride: int) -> int:
    """Of a map, with padding 1: height times width."""
    height, width = x.shape[-2:]
    return ((height - 1) // stride + 1) * ((width - 1) // stride + 1)


class _ByProduct(torch.autograd.Function):
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


class _OverPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        met = x[:, :, ::stride, ::stride]
        product = torch.mm(as_rows(met), weight.flatten(1).t())
        return product.view(met.shape[0], *met.shape[2:], -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        arriving, stride = as_rows(gradients[0]), ctx.stride
        for_x, for_weight, _ = ctx.needs_input_grad
        of_x = of_weight = None
        if for_weight:
            of_weight = torch.mm(arriving.t(), as_rows(x[:, :, ::stride, ::stride])).view_as(weight)
        if for_x:
            of_x = torch.zeros_like(x)
            met = of_x[:, :, ::stride, ::stride]
            met.copy_(torch.mm(arriving, weight.flatten(1)).view(*met.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2))
        return of_x, of_weight, None


def as_rows(maps: Tensor) -> Tensor:
    """`[N, C, H, W]` -> `[N·H·W, C]`; a view where the maps are channels-last."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def weight_gradient(x: Tensor, gradient: Tensor, stride: int) -> Tensor:
    """Of a 3x3 convolution with padding 1: inputs `[N, C, H, W]` and the outputs' gradient `[N, C', H', W']` to
    `[C', C, 3, 3]`, channels-last.

    Sum over n and the positions of gradient[n, c', i, j] · x[n, c, stride·i + k - 1, stride·j + l - 1].
    """
    outputs = gradient.shape[1]
    product = torch.mm(gradient.permute(1, 0, 2, 3).reshape(outputs, -1), _patches(x, stride))
    return product.view(outputs, 3, 3, -1).permute(0, 3, 1, 2)


def _patches(x: Tensor, stride: int) -> Tensor:
    """The inputs `[N, C, H, W]` of every output, zeros beyond the map: `[N·H'·W', 9·C]`."""
    n, channels, height, width = x.shape
    padded = x.new_zeros(n, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    patches = padded.unfold(1, 3, stride).unfold(2, 3, stride)  # [N, H', W', C, 3, 3]
    return patches.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * channels)

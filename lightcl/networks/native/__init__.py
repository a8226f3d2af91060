"""Parts of a step in C, for training and testing on the CPU: convolutions, batch-norm with what follows, and drift.

`library.py` compiles winograd.c, norm.c, drift.c and im2col.c on the machine that runs them.
"""

from __future__ import annotations

from torch import nn

from lightcl.networks.convolution import use_products_
from lightcl.networks.native.calls import kept_scratch
from lightcl.networks.native.convolution import NativeConv3x3
from lightcl.networks.native.drift import NativeSquaredDrift
from lightcl.networks.native.library import require_library
from lightcl.networks.native.norm import NativeBatchNorm2d
from lightcl.networks.winograd import use_winograd_

__all__ = [
    "NativeBatchNorm2d",
    "NativeConv3x3",
    "NativeSquaredDrift",
    "is_native",
    "kept_scratch",
    "use_native_",
]


def is_native(stage: nn.Module) -> bool:
    """Whether the stage computes in C: `use_native_` was called for it."""
    return any(isinstance(module, NativeBatchNorm2d) for module in stage.modules())


def use_native_(stage: nn.Module) -> None:
    """Makes every 3x3 convolution of `stage` that suits it, and every batch-norm, a module in C.

    1x1 convolutions train as matrix products of PyTorch's.

    Raises RequestError where the sources cannot be compiled.
    """
    require_library()
    use_winograd_(stage, NativeConv3x3)
    use_products_(stage)
    for module in stage.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = NativeBatchNorm2d  # the parameters stay the same objects

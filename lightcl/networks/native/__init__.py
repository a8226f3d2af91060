"""Layers of the network in C, for training and testing on the CPU: winograd.c and norm.c.

`library.py` compiles them on the machine that runs them; `convolution.py` and `norm.py` are their modules.
"""

from __future__ import annotations

from torch import nn

from lightcl.networks.native.convolution import NativeWinogradConv2d
from lightcl.networks.native.library import require_library
from lightcl.networks.native.norm import NativeBatchNorm2d
from lightcl.networks.winograd import use_winograd_

__all__ = ["NativeBatchNorm2d", "NativeWinogradConv2d", "use_native_"]


def use_native_(stage: nn.Module) -> None:
    """Makes every convolution of `stage` that Winograd's algorithm can compute, and every batch-norm, a module in C.

    Raises RequestError where the sources cannot be compiled.
    """
    require_library()
    use_winograd_(stage, NativeWinogradConv2d)
    for module in stage.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = NativeBatchNorm2d  # the parameters stay the same objects

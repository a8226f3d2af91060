"""Modes of batch-norm for memory samples, which do not follow the data's distribution and must not move statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def running_statistics(stage: nn.Module, training: bool) -> Iterator[None]:
    """Batch-norm uses its running statistics inside the `with`; `training` is the mode afterwards."""
    stage.train(False)
    try:
        yield
    finally:
        stage.train(training)


@contextmanager
def unmoved_statistics(stage: nn.Module) -> Iterator[None]:
    """Batch-norm stays in its mode, but its running statistics do not move inside the `with`."""
    norms = [module for module in stage.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

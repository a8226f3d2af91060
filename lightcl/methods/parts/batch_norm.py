"""Modes of batch-norm for memory samples, which do not follow the data's distribution and must not move statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

from torch import nn

from lightcl.networks.native import NativeBatchNorm2d
from lightcl.networks.split import Split, normalized_apart
from lightcl.networks.staged import Stage


@contextmanager
def running_statistics(stage: nn.Module, training: bool) -> Iterator[None]:
    """Batch-norm uses its running statistics inside the `with`; `training` is the mode afterwards."""
    stage.train(False)
    try:
        yield
    finally:
        stage.train(training)


@contextmanager
def unmoved_statistics(stage: Stage) -> Iterator[None]:
    """Batch-norm stays in its mode, but its running statistics do not move inside the `with`."""
    norms = stage.batch_norms
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextmanager
def split_statistics(stage: Stage, count: int, memory_batch_norm: Literal["eval", "train"]) -> Iterator[None]:
    """For batches whose first `count` samples are the batch's own and whose others are memory samples.

    Every batch-norm of the stage treats the first as in training mode and moves its running statistics by them. Then
    the others pass with its running statistics (eval) or with their own (train), which move nothing. That is what two
    passes compute, one after the other.
    """
    norms = stage.batch_norms
    for norm in norms:
        split = Split(count, norm.training and memory_batch_norm == "train")
        if isinstance(norm, NativeBatchNorm2d):
            norm.split = split
        else:
            norm.forward = partial(normalized_apart, norm, norm.forward, split)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            if isinstance(norm, NativeBatchNorm2d):
                del norm.split
            else:
                del norm.forward

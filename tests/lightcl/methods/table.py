"""A network that is a table: an image is one pixel, its value the row of logits. Losses can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightcl.data.sources import ImageSet
from lightcl.data.tasks import Batch, Samples, Task, TaskContext
from lightcl.networks.staged import OnMap
from tests.lightcl import toys

PROBABILITIES = [[0.1, 0.3, 0.2, 0.4], [0.2, 0.2, 0.2, 0.4], [0.25, 0.25, 0.25, 0.25]]
"""softmax over the entire head of rows 0, 1 and 2."""


class Table(nn.Module):
    """Logits of row r: log(10·PROBABILITIES[r])."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter((10 * torch.tensor(PROBABILITIES)).log())

    def features(self, images: Tensor, on_map: OnMap | None = None) -> Tensor:
        return images

    def classify(self, features: Tensor, on_map: OnMap | None = None) -> Tensor:
        return self.rows[features.flatten().long()]

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(images)


def batch(rows: Sequence[int], labels: Sequence[int]) -> Batch:
    return Batch(torch.tensor(rows, dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels))


def context(
    number: int,
    classes: Sequence[int],
    seen: Sequence[int],
    rows: Sequence[int] = (0, 1),
    labels: Sequence[int] = (1, 0),
) -> TaskContext:
    """A task whose training samples are these rows with these labels."""
    images = np.array(rows, dtype=np.uint8).reshape(-1, 1, 1, 1)
    held = ImageSet(images, np.array(labels, dtype=np.int64), ("a", "b", "c", "d"))
    samples = Samples(held, np.arange(len(images)))
    task = Task(number, tuple(classes), samples, samples.only(np.arange(0)), samples)
    return TaskContext(task, torch.tensor(classes), torch.tensor(seen), 8, 5, toys.CPU)

"""Replay from a reservoir: a few raw samples of the stream, stored on the device and mixed into every step.

Reservoir sampling (Vitter: "Random Sampling with a Reservoir", ACM TOMS 1985, Algorithm R): item n of a stream (from 0)
takes the next free row while there is one, else row j drawn uniformly from 0..n if j < size. Every item seen so far is
in the buffer with the same probability. The samples of a task are offered again in every epoch, as in the
replay methods' published code.

`Replay` is what `er`, `derpp` and their sparse forms share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lightcl.data.tasks import Batch, Samples, TaskContext
from lightcl.methods.base import Method, MethodParameters
from lightcl.networks.staged import Backbone
from lightcl.seeds import numpy_generator
from lightcl.storage.state import under


class ReplayParameters(MethodParameters):
    """Keys of all methods that keep samples."""

    loss_classes: Literal["task", "seen", "all"] = "all"
    """Classes in the cross-entropy; all: as in the replay methods' papers. With `task` the replayed samples are
    still compared with all classes seen, since their task is not the current one (ER-ACE, Caccia et al., ICLR 2022)."""
    buffer_size: int = Field(default=15, ge=1, le=1_000_000)
    """Raw samples kept, over all tasks together."""
    minibatch_size: int | None = Field(default=None, ge=1, le=1_000_000)
    """Samples per draw from the buffer; default: the entire buffer."""

    @property
    def drawn(self) -> int:
        """Samples of one draw from the full buffer."""
        return min(self.minibatch_size or self.buffer_size, self.buffer_size)


@dataclass(frozen=True)
class Replayed:
    """A draw from the buffer: `images` uint8 `[N, C, H, W]`, `labels` and `tasks` `[N]`, `logits` `[N, head]` as stored
    with the sample (None where the method stores none)."""

    images: Tensor
    labels: Tensor
    tasks: Tensor
    logits: Tensor | None


class Reservoir:
    """At most `size` samples, each as likely as any other that was ever offered. All of it is in `state_dict`.

    Its randomness comes from `context.seed`, the number of samples seen and the number of draws made.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.seen = 0
        self.draws = 0
        self.rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows["labels"]) if self.rows else 0

    def places(self, count: int, seed: int) -> dict[int, int]:
        """Row -> position of those of the next `count` samples that are stored; if two get one row, the later one."""
        random = numpy_generator(seed, "reservoir", self.seen)
        taken = {}
        for position in range(count):
            number = self.seen + position
            row = number if number < self.size else int(random.integers(0, number + 1))
            if row < self.size:
                taken[row] = position
        return taken

    @torch.no_grad()
    def offer(self, batch: Batch, samples: Samples, context: TaskContext, logits: Tensor | None = None) -> None:
        """Offers a batch of `samples` to the reservoir, with their `[N, head]` logits if these are stored too.

        Images are stored as in the data, without augmentation.
        """
        taken = self.places(len(batch.labels), context.seed)
        self.seen += len(batch.labels)
        if not taken:
            return
        where, positions = list(taken), list(taken.values())
        if batch.members is None:
            images = batch.images[positions]
        else:
            images = samples.load(batch.members[positions].cpu().numpy()).images.to(context.device)
        new = {"images": images, "labels": batch.labels[positions]}
        new["tasks"] = torch.full_like(new["labels"], context.task.id)
        if logits is not None:
            new["logits"] = logits[positions].float()
        for name, values in new.items():
            rows = self.rows.get(name, values.new_empty((0, *values.shape[1:])))
            if max(where) >= len(rows):  # not full yet; once full, rows are written in place
                grown = rows.new_empty((max(where) + 1, *rows.shape[1:]))
                grown[: len(rows)] = rows
                self.rows[name] = rows = grown
            rows[where] = values

    def draw(self, count: int, context: TaskContext) -> Replayed:
        """Up to `count` different samples, newly augmented like the training data. The buffer must not be empty."""
        random = numpy_generator(context.seed, "draw", self.draws)
        rows = torch.from_numpy(np.sort(random.permutation(len(self))[:count])).to(context.device)
        images = context.augment(self.rows["images"][rows], "replay", self.draws)
        self.draws += 1
        logits = self.rows["logits"][rows] if "logits" in self.rows else None
        return Replayed(images, self.rows["labels"][rows], self.rows["tasks"][rows], logits)

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.rows, "counters": torch.tensor([self.seen, self.draws])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.rows = {
            name: rows.clone() for name, rows in state.items() if name != "counters"
        }  # rows are written in place
        self.seen, self.draws = (int(counter) for counter in state["counters"])


class Replay(Method):
    """A method with a reservoir: after each step the batch is offered to it."""

    parameters: ReplayParameters
    keeps_logits: ClassVar[bool] = False

    def __init__(self, network: Backbone, parameters: ReplayParameters) -> None:
        super().__init__(network, parameters)
        self.buffer = Reservoir(parameters.buffer_size)
        self.samples: Samples | None = None  # of this epoch
        self.logits: Tensor | None = None  # of the step's batch

    def select(self, samples: Samples, context: TaskContext, epoch: int) -> Samples:
        self.samples = samples
        return samples

    def forward(self, batch: Batch, context: TaskContext, draws: int) -> tuple[Tensor, list[tuple[Tensor, Replayed]]]:
        """Logits of the batch, and of each of `draws` independent draws (none while the buffer is empty)."""
        replayed = [self.buffer.draw(self.parameters.drawn, context) for _ in range(draws)] if len(self.buffer) else []
        logits, *outputs = self.logits_together(batch, *(Batch(old.images, old.labels) for old in replayed))
        self.logits = logits.detach()
        return logits, list(zip(outputs, replayed, strict=True))

    def replay_cross_entropy(self, logits: Tensor, labels: Tensor, context: TaskContext) -> Tensor:
        """Mean cross-entropy of replayed samples, whose task need not be the current one."""
        if self.parameters.loss_classes == "all":
            return F.cross_entropy(logits.float(), labels)
        seen = context.seen_classes
        return F.cross_entropy(logits[:, seen].float(), context.position_of(labels, seen))

    def after_step(self, batch: Batch, context: TaskContext) -> None:
        samples = self.samples or context.task.train
        self.buffer.offer(batch, samples, context, self.logits if self.keeps_logits else None)
        self.logits = None

    def state_dict(self) -> dict[str, Tensor]:
        return {f"buffer/{name}": tensor for name, tensor in self.buffer.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = under(state, "buffer/")
        self.buffer.load_state_dict(own)

"""ER: experience replay from a tiny episodic memory.

Chaudhry et al.: "On Tiny Episodic Memories in Continual Learning", 2019 (arXiv 1902.10486), Algorithm 1 with reservoir
sampling; Riemer et al., ICLR 2019 (arXiv 1810.11910).

    loss = CE(h(x), y) + CE(h(x'), y'),    (x', y') drawn from the buffer

x and x' pass through the network as one batch, as in the paper; the two means are summed instead of taking one mean
over both, so that the weight of the replayed samples does not depend on the two batch sizes. The papers learn online,
in one epoch; here a task may have several epochs, and a sample is offered to the reservoir in each of them.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightcl.data.tasks import Batch, TaskContext
from lightcl.methods.base import StepCost, register
from lightcl.methods.parts.reservoir import Replay, ReplayParameters


class ERParameters(ReplayParameters):
    """`er`: keeps `buffer_size` raw samples and replays them in every step."""

    order = 6
    name: Literal["er"] = "er"

    def cost(self) -> StepCost:
        return StepCost(replayed=self.drawn, stored_images=self.buffer_size)


@register(ERParameters)
class ER(Replay):
    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        logits, replayed = self.forward(batch, context, draws=1)
        loss = self.cross_entropy(logits, batch.labels, context)
        for outputs, old in replayed:
            loss = loss + self.replay_cross_entropy(outputs, old.labels, context)
        return loss

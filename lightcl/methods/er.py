"""ER: experience replay from a tiny episodic memory.

Chaudhry et al.: "On Tiny Episodic Memories in Continual Learning", 2019 (arXiv 1902.10486), Algorithm 1 with reservoir
sampling; Riemer et al., ICLR 2019 (arXiv 1810.11910).

    loss = CE(h(x), y) + CE(h(x'), y'),    (x', y') drawn from the buffer

x and x' pass the network as one batch, as in the paper; the two means are summed instead of taking one mean over
both, so that the weight of the replayed samples does not depend on the two batch sizes. The papers learn online, in one
epoch; here a task has several, and every presentation of a sample is offered to the reservoir.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightcl.data.tasks import Batch, TaskContext
from lightcl.methods.base import Method, StepCost
from lightcl.methods.parts.reservoir import Replay, ReplayParameters
from lightcl.networks.resnet import StagedResNet


class ERParameters(ReplayParameters):
    """`er`: keeps `buffer_size` raw samples and repeats them in every step."""

    name: Literal["er"] = "er"

    def cost(self) -> StepCost:
        return StepCost(replayed=self.drawn, stored_images=self.buffer_size)

    def build(self, network: StagedResNet) -> Method:
        return ER(network, self)


class ER(Replay):
    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        logits, memory = self.forward(batch, context, draws=1)
        loss = self.cross_entropy(logits, batch.labels, context)
        for outputs, drawn in memory:
            loss = loss + self.replay_cross_entropy(outputs, drawn.labels, context)
        return loss

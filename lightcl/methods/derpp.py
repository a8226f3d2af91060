"""DER++: dark experience replay. The buffer stores each sample with its logits at the time of storing.

Buzzega, Boschini, Porrello, Abati, Calderara: "Dark Experience for General Continual Learning: a Strong, Simple
Baseline", NeurIPS 2020 (arXiv 2004.07211), equation 6.

    loss = CE(h(x), y) + α·‖z' - h(x')‖² + β·CE(h(x''), y''),    (x', z') and (x'', y'') two independent draws

z' are the logits of the entire head for the augmented image, in training mode. As in the authors' code ‖·‖² is the
mean over samples and logits (α was tuned for that), not the sum over logits of the equation. Deviation: the three sets
pass through the network as one batch with shared batch-norm statistics; the authors' code runs them one by one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lightcl.data.tasks import Batch, TaskContext
from lightcl.methods.base import StepCost, register
from lightcl.methods.parts.reservoir import Replay, ReplayParameters


class DERppKeys(ReplayParameters):
    """α and β are the paper's for Split CIFAR-10 and its smallest buffer (200)."""

    alpha: float = Field(default=0.1, ge=0, le=1e9)
    """Weight of the squared distance to the stored logits."""
    beta: float = Field(default=0.5, ge=0, le=1e9)
    """Weight of the replayed cross-entropy."""


class DERppParameters(DERppKeys):
    """`derpp`: stores `buffer_size` raw samples with their logits and replays both."""

    order = 7
    name: Literal["derpp"] = "derpp"

    def cost(self) -> StepCost:
        return StepCost(replayed=2 * self.drawn, stored_images=self.buffer_size, stored_logits=self.buffer_size)


@register(DERppParameters)
class DERpp(Replay):
    parameters: DERppKeys
    keeps_logits = True

    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        alpha, beta = self.parameters.alpha, self.parameters.beta
        logits, replayed = self.forward(batch, context, draws=2)
        loss = self.cross_entropy(logits, batch.labels, context)
        if replayed:
            (outputs1, old1), (outputs2, old2) = replayed
            assert old1.logits is not None
            loss = loss + alpha * F.mse_loss(outputs1.float(), old1.logits)
            loss = loss + beta * self.replay_cross_entropy(outputs2, old2.labels, context)
        return loss

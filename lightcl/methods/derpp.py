"""DER++: dark experience replay. The buffer keeps the logits a sample had when it came in.

Buzzega, Boschini, Porrello, Abati, Calderara: "Dark Experience for General Continual Learning: a Strong, Simple
Baseline", NeurIPS 2020 (arXiv 2004.07211), equation 6.

    loss = CE(h(x), y) + α·‖z' - h(x')‖² + β·CE(h(x''), y''),    (x', z') and (x'', y'') two independent draws

z' are the logits of the whole head, of the augmented image and in training mode. As in the authors' code ‖·‖² is the
mean over samples and logits (α was tuned for that), not the sum over logits of the equation. Deviation: the three sets
pass the network as one batch and share its batch-norm statistics; the authors' code passes them one after another.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lightcl.data.tasks import Batch, TaskContext
from lightcl.methods.base import Method, StepCost
from lightcl.methods.parts.reservoir import Replay, ReplayParameters
from lightcl.networks.resnet import StagedResNet


class DERppKeys(ReplayParameters):
    """α and β are the paper's for Split CIFAR-10 and its smallest buffer (200)."""

    alpha: float = Field(default=0.1, ge=0, le=1e9)
    """Weight of the squared distance to the stored logits."""
    beta: float = Field(default=0.5, ge=0, le=1e9)
    """Weight of the replayed cross-entropy."""


class DERppParameters(DERppKeys):
    """`derpp`: keeps `buffer_size` raw samples with their logits and repeats both."""

    name: Literal["derpp"] = "derpp"

    def cost(self) -> StepCost:
        return StepCost(replayed=2 * self.drawn, stored_images=self.buffer_size, stored_logits=self.buffer_size)

    def build(self, network: StagedResNet) -> Method:
        return DERpp(network, self)


class DERpp(Replay):
    keeps_logits = True

    def __init__(self, network: StagedResNet, parameters: DERppKeys) -> None:
        super().__init__(network, parameters)
        self.alpha, self.beta = parameters.alpha, parameters.beta

    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        logits, memory = self.forward(batch, context, draws=2)
        loss = self.cross_entropy(logits, batch.labels, context)
        if not memory:
            return loss
        (first_outputs, first), (second_outputs, second) = memory
        assert first.logits is not None
        dark = F.mse_loss(first_outputs.float(), first.logits)
        return loss + self.alpha * dark + self.beta * self.replay_cross_entropy(second_outputs, second.labels, context)

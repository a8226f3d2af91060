"""EWC: elastic weight consolidation. Weights that matter to earlier tasks are tied to their earlier values.

Kirkpatrick et al.: "Overcoming catastrophic forgetting in neural networks", PNAS 2017 (arXiv 1612.00796), equation 3,
in the online form of Schwarz et al.: "Progress & Compress", ICML 2018 (arXiv 1805.06370), whose memory does not grow
with the tasks: one Fisher diagonal and one copy of the weights.

    loss = CE(f(x), y) + λ/2 · Σ_i F_i (θ_i - θ*_i)²,    after each task: F <- γF + F_t, θ* <- θ

F_t is the diagonal of the empirical Fisher information: the mean over training samples of the squared gradient of
log p(y|x), y being the sample's own label and p the softmax over the classes that `loss_classes` names; taken in
evaluation mode. All trained parameters are tied, including the head (rows of classes outside the loss have F = 0);
batch-norm's running statistics are not parameters, so they drift. Deviations: at most `fisher_samples` samples are
used, and F_t is not normalized (unlike in Schwarz et al.).

λ depends on the scale of F, hence on network and data. Steps become unstable where learning_rate·λ·F_i exceeds 2, and
some F_i are thousands of times the mean, so λ cannot be large: with the built-in weights at learning rate 0.01 the loss
diverges at 200. With batch-norm the benefit is small: on the digits, five tasks, seeds 0 to 4, forgetting falls from
8.3 to 5.1 points in TIL and from 18.0 to 17.2 in CIL, nearly all of it at the one seed (3) where SGD forgets much (19.8
to 6.9); at the other four the difference is about two points or less, and λ was chosen on this stream. On a processor
that rounds differently SGD forgets 7.3 points at seed 3, and EWC 8.7. A small network trained from scratch at learning
rate 0.03 forgets as much as with SGD: the running statistics move, and F of samples that are classified with confidence
is nearly zero (docs/results/digits-methods.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lightcl.data.tasks import Batch, TaskContext
from lightcl.methods.base import Method, MethodParameters, StepCost, register
from lightcl.networks.staged import Backbone
from lightcl.storage.state import under


class EWCParameters(MethodParameters):
    """`ewc`: one quadratic penalty, whatever the number of tasks."""

    order = 3
    name: Literal["ewc"] = "ewc"
    strength: float = Field(default=10.0, ge=0, le=1e9)
    """λ of the penalty λ/2 Σ F (θ - θ*)²."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Share of the old Fisher information that is kept with each new task; 1: all tasks count equally."""
    fisher_samples: int = Field(default=500, ge=1, le=1_000_000)
    """Training samples per task for its Fisher information; one backward pass each."""

    def cost(self) -> StepCost:
        return StepCost(weight_copies=2)


@register(EWCParameters)
class EWC(Method):
    parameters: EWCParameters

    def __init__(self, network: Backbone, parameters: EWCParameters) -> None:
        super().__init__(network, parameters)
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}  # θ*

    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        loss = super().loss(batch, context)
        return loss + self.penalty() if self.fisher else loss

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """λ/2 Σ F (θ - θ*)², a scalar without a graph, which would keep another copy of the weights in every step."""
        weights = dict(self.network.named_parameters())
        terms = [(fisher * (weights[name] - self.anchor[name]).square()).sum() for name, fisher in self.fisher.items()]
        return self.parameters.strength / 2 * torch.stack(terms).sum()

    @torch.no_grad()
    def before_step(self, batch: Batch, context: TaskContext) -> None:
        """Adds the penalty's gradient, λ F (θ - θ*), tensor by tensor."""
        weights = dict(self.network.named_parameters())
        for name, fisher in self.fisher.items():
            gradient, pull = weights[name].grad, self.parameters.strength * fisher * (weights[name] - self.anchor[name])
            weights[name].grad = pull if gradient is None else gradient.add_(pull)

    def end_task(self, context: TaskContext) -> None:
        trained = self.trainable()
        squares = self.squared_gradients(trained, context)
        for name, weight in trained.items():
            before = self.parameters.gamma * self.fisher[name] if name in self.fisher else 0.0
            self.fisher[name] = before + squares[name]
            self.anchor[name] = weight.detach().clone()

    def squared_gradients(self, trained: Mapping[str, torch.nn.Parameter], context: TaskContext) -> dict[str, Tensor]:
        """The mean over samples of (∂ log p(y|x) / ∂θ)², by name; computed with the memory of one sample."""
        samples = context.sample(self.parameters.fisher_samples, purpose="fisher")
        sums = {name: torch.zeros_like(weight) for name, weight in trained.items()}
        for image, label in zip(samples.images, samples.labels, strict=True):
            one = Batch(image[None], label[None])
            gradients = torch.autograd.grad(super().loss(one, context), list(trained.values()))
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total.addcmul_(gradient, gradient)
        return {name: total / len(samples.labels) for name, total in sums.items()}

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"fisher/{name}": tensor for name, tensor in self.fisher.items()}
        return state | {f"anchor/{name}": tensor for name, tensor in self.anchor.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.fisher = under(state, "fisher/")
        self.anchor = under(state, "anchor/")

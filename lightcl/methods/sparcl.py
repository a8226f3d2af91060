"""SparCL: sparse weights, fewer data and sparse gradients on top of a replay method (`sparcl-er`, `sparcl-derpp`).

Wang, Zhan, Gong, Yuan, Niu, Jian, Ren, Ioannidis, Wang, Dy: "SparCL: Sparse Continual Learning on the Edge", NeurIPS
2022 (arXiv 2209.09476).

- TDM, task-aware dynamic masking: only a share 1 - s of every layer's weights is present; masked ones are exactly zero.
  Every `interval` epochs the weights with the lowest importance
      CWI(w) = |w| + α·|∂L̃(new task)/∂w| + β·|∂L(buffer)/∂w|
  are dropped (`intra_task`) and the same number, drawn at random, grow back from zero. With a new task, `inter_task`
  more grow; the next adjustment removes as many. L̃ is the cross-entropy over the classes of the task only.
- DDR, dynamic data removal: each adjustment in the first part of a task removes the samples that were misclassified
  least often since the task began, in total a share `removed_data`.
- DGM, dynamic gradient masking: of the present weights, only those with the highest
      CGI(w) = α·|∂L̃(new task)/∂w| + β·|∂L(buffer)/∂w|
  are updated; a share `gradient_sparsity` of all weights is not.

The 3x3 convolutions of the trained blocks are masked, all to the same sparsity, as in the authors' profiles; stem,
shortcuts, batch-norm and head stay dense. The first mask is by magnitude. Simplifications: the two gradients are
computed once per adjustment, in evaluation mode on 128 samples of the task and on the entire buffer, instead of during
the steps; the gradient mask changes with the weight mask; if a task is too short for an adjustment, the additional
weights are dropped at its end. Masks save no time or memory here: dense kernels multiply by zeros (`lightcl-sparse`
removes channels physically). The optimizer's momentum, if any, still moves weights that the gradient mask excludes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from lightcl.data.tasks import Batch, Samples, TaskContext
from lightcl.methods.base import StepCost, register
from lightcl.methods.derpp import DERpp, DERppKeys
from lightcl.methods.er import ER
from lightcl.methods.parts.dynamic_masks import DynamicMasks
from lightcl.methods.parts.reservoir import Replay, ReplayParameters
from lightcl.networks.staged import Backbone
from lightcl.seeds import derive

IMPORTANCE_SAMPLES = 128


class SparseParameters(ReplayParameters):
    """Keys of both variants. The shares and the interval follow the authors' script for Split CIFAR-10."""

    shareable = False
    """Devices mask different weights, so an average would be zero almost nowhere."""
    sparsity: float = Field(default=0.9, ge=0, lt=1)
    """Share of every masked layer's weights that is zero."""
    gradient_sparsity: float | None = Field(default=None, ge=0, lt=1)
    """Share of all weights that is not updated; default: all zero weights and a fifth of the others (0.92 at sparsity
    0.9)."""
    interval: int = Field(default=5, ge=1, le=1_000_000)
    """Epochs between two adjustments of masks and data; a task without more epochs than this has none."""
    intra_task: float = Field(default=0.01, ge=0, lt=1)
    """Share of a layer's weights exchanged in an adjustment."""
    inter_task: float = Field(default=0.01, ge=0, lt=1)
    """Share that grows with a new task, until the next adjustment."""
    removed_data: float = Field(default=0.3, ge=0, lt=1)
    """Share of a task's samples that is removed while the task is trained. Nothing is removed unless an adjustment
    falls into the first `removal_until` of the task's epochs; with the defaults this takes 13 epochs per task or
    more."""
    removal_until: float = Field(default=0.4, gt=0, le=1)
    """Share of a task's epochs, from its start, in which samples are removed."""
    importance_new: float = Field(default=1.0, ge=0, le=1e9)
    """α, the weight of the new task's gradients; the authors' code uses one value for α and β."""
    importance_old: float = Field(default=1.0, ge=0, le=1e9)
    """β, the weight of the buffer's gradients."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gradient_sparsity is not None and self.gradient_sparsity < self.sparsity:
            raise ValueError(
                f"method.gradient_sparsity is {self.gradient_sparsity}, but masked weights are not updated either: "
                f"allowed: at least method.sparsity ({self.sparsity})"
            )
        return self

    @property
    def updated(self) -> float:
        """Share of a layer's weights that is updated."""
        if self.gradient_sparsity is None:
            return 0.8 * (1 - self.sparsity)
        return 1 - self.gradient_sparsity


class Sparse(Replay):
    """What SparCL adds to a replay method."""

    parameters: SparseParameters

    def __init__(self, network: Backbone, parameters: SparseParameters) -> None:
        super().__init__(network, parameters)
        self.masks = DynamicMasks(network, parameters.sparsity, parameters.updated)
        self.kept = torch.zeros(0, dtype=torch.int64)  # positions of the task's samples that are still trained on
        self.wrong = torch.zeros(0, dtype=torch.int64)  # how often each sample of the task was misclassified

    def begin_task(self, context: TaskContext) -> None:
        super().begin_task(context)
        self.kept = torch.arange(len(context.task.train), device=context.device)
        self.wrong = torch.zeros_like(self.kept)
        if not self.masks.present:
            self.masks.start()
        else:
            self.masks.grow(derive(context.seed, "new task"), self.parameters.inter_task)
        self.masks.choose_updated(self.gradients(context))

    def select(self, samples: Samples, context: TaskContext, epoch: int) -> Samples:
        return super().select(samples.only(self.kept.cpu().numpy()), context, epoch)

    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        loss = super().loss(batch, context)
        if batch.members is not None and self.logits is not None:
            positions = self.kept[batch.members.to(context.device)]
            self.wrong[positions] += (self.answers(self.logits, context) != batch.labels).long()
        return loss

    def before_step(self, batch: Batch, context: TaskContext) -> None:
        self.masks.mask_gradients_()

    def after_step(self, batch: Batch, context: TaskContext) -> None:
        super().after_step(batch, context)
        self.masks.zero_()

    def end_epoch(self, context: TaskContext, epoch: int) -> None:
        done = epoch + 1
        if done % self.parameters.interval or done == context.epochs:
            return
        gradients = self.gradients(context)
        self.masks.shrink(self.importance(gradients), self.parameters.intra_task)
        self.masks.grow(derive(context.seed, "epoch", epoch))
        self.masks.choose_updated(gradients)
        removing = range(self.parameters.interval, context.epochs, self.parameters.interval)
        stages = [stage for stage in removing if stage <= self.parameters.removal_until * context.epochs]
        if done in stages:
            share = self.parameters.removed_data * (stages.index(done) + 1) / len(stages)
            self.remove_data(round(share * len(self.wrong)), derive(context.seed, "removal", epoch))

    def end_task(self, context: TaskContext) -> None:
        super().end_task(context)
        self.masks.shrink(self.importance(self.gradients(context)))
        self.kept, self.wrong = self.kept[:0], self.wrong[:0]

    def importance(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """CWI of every maskable weight, by name."""
        return {name: weight.detach().abs() + gradients[name] for name, weight in self.masks.weights.items()}

    def gradients(self, context: TaskContext) -> dict[str, Tensor]:
        """CGI of every maskable weight, by name."""
        weights = list(self.masks.weights.values())
        if not weights:  # everything but the head is frozen
            return {}
        was_training = self.network.training
        self.network.eval()
        new = context.sample(IMPORTANCE_SAMPLES, purpose="importance")
        labels = context.position_of(new.labels, context.task_classes)
        # In parts, or this would need more memory than training. In evaluation mode samples do not affect each other.
        total = [torch.zeros_like(weight) for weight in weights]
        for images, some in zip(
            torch.split(new.images, context.batch_size), torch.split(labels, context.batch_size), strict=True
        ):
            logits = self.logits_of(Batch(images, some))[:, context.task_classes].float()
            loss = F.cross_entropy(logits, some, reduction="sum") / len(labels)
            for entry, part in zip(total, torch.autograd.grad(loss, weights), strict=True):
                entry.add_(part)
        for entry in total:
            entry.abs_().mul_(self.parameters.importance_new)
        if len(self.buffer):
            old = self.buffer.rows
            logits = self.logits_of(Batch(old["images"], old["labels"]))
            loss = self.replay_cross_entropy(logits, old["labels"], context)
            for entry, part in zip(total, torch.autograd.grad(loss, weights), strict=True):
                entry.add_(part.abs(), alpha=self.parameters.importance_old)
        self.network.train(was_training)
        return dict(zip(self.masks.weights, total, strict=True))

    def remove_data(self, removed: int, seed: int) -> None:
        """Removes the `removed` samples that were misclassified least often; ties are broken at random by `seed`."""
        wrong = self.wrong[self.kept].cpu().numpy()
        ties = np.random.default_rng(seed).permutation(len(wrong))
        hardest = np.lexsort((ties, -wrong))[: max(2, len(self.wrong) - removed)]
        self.kept = self.kept[torch.from_numpy(np.sort(hardest)).to(self.kept.device)]

    def answers(self, logits: Tensor, context: TaskContext) -> Tensor:
        """The class `[N]` with the highest logit among those in the loss."""
        if self.parameters.loss_classes == "all":
            return logits.argmax(1)
        classes = context.task_classes if self.parameters.loss_classes == "task" else context.seen_classes
        return classes[logits[:, classes].argmax(1)]

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | self.masks.state_dict() | {"kept": self.kept, "wrong": self.wrong}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.masks.load_state_dict(state)
        self.kept, self.wrong = state["kept"], state["wrong"]


class SparCLERParameters(SparseParameters):
    """`sparcl-er`: experience replay, sparse in weights, data and gradients."""

    order = 8
    name: Literal["sparcl-er"] = "sparcl-er"

    def cost(self) -> StepCost:
        return StepCost(replayed=self.drawn, stored_images=self.buffer_size, weight_sparsity=self.sparsity)


class SparCLDERppParameters(SparseParameters, DERppKeys):
    """`sparcl-derpp`: dark experience replay, sparse in weights, data and gradients."""

    order = 9
    name: Literal["sparcl-derpp"] = "sparcl-derpp"

    def cost(self) -> StepCost:
        size = self.buffer_size
        return StepCost(replayed=2 * self.drawn, stored_images=size, stored_logits=size, weight_sparsity=self.sparsity)


@register(SparCLERParameters)
class SparCLER(Sparse, ER):
    """ER with the masks of `Sparse`."""

    parameters: SparCLERParameters


@register(SparCLDERppParameters)
class SparCLDERpp(Sparse, DERpp):
    """DER++ with the masks of `Sparse`."""

    parameters: SparCLDERppParameters

"""SparCL: sparse weights, fewer data and sparse gradients on top of a replay method (`sparcl-er`, `sparcl-derpp`).

Wang, Zhan, Gong, Yuan, Niu, Jian, Ren, Ioannidis, Wang, Dy: "SparCL: Sparse Continual Learning on the Edge", NeurIPS
2022 (arXiv 2209.09476).

- TDM, task-aware dynamic masking: only a share 1 - s of every layer's weights is there; masked ones are exactly zero.
  Every `interval` epochs the weights with the lowest importance
      CWI(w) = |w| + α·|∂L̃(new task)/∂w| + β·|∂L(buffer)/∂w|
  are dropped (`intra_task`) and as many, drawn at random, grow back from zero. With a new task `inter_task` more grow,
  which the next adjustment takes back. L̃ is the cross-entropy over the classes of the task alone.
- DDR, dynamic data removal: with every adjustment in the first part of a task, the samples that were misclassified
  least often since the task began leave it; `removed_data` of them in all.
- DGM, dynamic gradient masking: of the weights that are there only those with the highest
      CGI(w) = α·|∂L̃(new task)/∂w| + β·|∂L(buffer)/∂w|
  are updated; a share `gradient_sparsity` of all weights is not.

Masked are the 3x3 convolutions of the trained blocks, each to the same sparsity, as in the authors' profiles; stem,
shortcuts, batch-norm and head stay dense. The first mask is by magnitude. Simplified: the two gradients are taken once
an adjustment, on 128 samples of the task and on the whole buffer in evaluation mode, instead of in the course of the
steps; the gradient mask changes with the weight mask; the surplus of a task too short for an adjustment is dropped at
its end. Masks here save no time or memory: dense kernels multiply zeros (`lightcl-sparse` removes channels for real).
The optimiser's momentum, if any, still moves weights that the gradient mask holds back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from lightcl.data.tasks import Batch, Samples, TaskContext
from lightcl.methods.base import Method, StepCost
from lightcl.methods.derpp import DERpp, DERppKeys
from lightcl.methods.er import ER
from lightcl.methods.reservoir import Replay, ReplayParameters
from lightcl.networks.resnet import BasicBlock, StagedResNet
from lightcl.seeds import numpy_generator, torch_generator

IMPORTANCE_SAMPLES = 128


class SparseParameters(ReplayParameters):
    """Keys of both forms. The shares and the interval follow the authors' script for Split CIFAR-10."""

    sparsity: float = Field(default=0.9, ge=0, lt=1)
    """Share of every masked layer's weights that is zero."""
    gradient_sparsity: float | None = Field(default=None, ge=0, lt=1)
    """Share that is not updated; default: a fifth of the weights that are there are not (0.92 at sparsity 0.9)."""
    interval: int = Field(default=5, ge=1)
    """Epochs between two adjustments of masks and data."""
    intra_task: float = Field(default=0.01, ge=0, lt=1)
    """Share of a layer's weights exchanged in an adjustment."""
    inter_task: float = Field(default=0.01, ge=0, lt=1)
    """Share that grows with a new task, until the next adjustment."""
    removed_data: float = Field(default=0.3, ge=0, lt=1)
    """Share of a task's samples that is removed in the course of it."""
    removal_until: float = Field(default=0.4, gt=0, le=1)
    """Part of a task's epochs in which samples are removed."""
    importance_new: float = Field(default=1.0, ge=0)
    """α, the weight of the new task's gradients; the authors' code uses one value for α and β."""
    importance_old: float = Field(default=1.0, ge=0)
    """β, the weight of the buffer's gradients."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gradient_sparsity is not None and self.gradient_sparsity < self.sparsity:
            raise ValueError(
                f"method.gradient_sparsity is {self.gradient_sparsity}, but weights that are masked are not updated "
                f"either: at least the sparsity ({self.sparsity})"
            )
        return self

    @property
    def shareable(self) -> bool:
        """Devices mask different weights, so an average would be zero almost nowhere."""
        return False

    @property
    def updated(self) -> float:
        """Share of a layer's weights that is updated."""
        if self.gradient_sparsity is None:
            return 0.8 * (1 - self.sparsity)
        return 1 - self.gradient_sparsity


class Sparse(Replay):
    """What SparCL adds to a replay method."""

    def __init__(self, network: StagedResNet, parameters: SparseParameters) -> None:
        super().__init__(network, parameters)
        self.sparse = parameters
        self.weights = _maskable(network)
        self.masks: dict[str, Tensor] = {}  # boolean, True where the weight is there
        self.updated: dict[str, Tensor] = {}  # boolean, True where its gradient is kept
        self.kept = torch.zeros(0, dtype=torch.int64)  # positions of the task's samples that are still trained on
        self.wrong = torch.zeros(0, dtype=torch.int64)  # how often each sample of the task was misclassified

    def begin_task(self, context: TaskContext) -> None:
        super().begin_task(context)
        self.kept = torch.arange(len(context.task.train), device=context.device)
        self.wrong = torch.zeros_like(self.kept)
        if not self.masks:
            there = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
            self.masks = {n: strongest(w.abs(), there[n], self._size(n)) for n, w in self.weights.items()}
            self._zero()
        else:
            self._grow(context, "task", self.sparse.inter_task)
        self._hold_back(self.gradients(context))

    def select(self, samples: Samples, context: TaskContext, epoch: int) -> Samples:
        return super().select(samples.only(self.kept.cpu().numpy()), context, epoch)

    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        loss = super().loss(batch, context)
        if batch.members is not None and self.logits is not None:
            positions = self.kept[batch.members.to(context.device)]
            self.wrong[positions] += (self._answers(self.logits, context) != batch.labels).long()
        return loss

    @torch.no_grad()
    def before_step(self, batch: Batch, context: TaskContext) -> None:
        for name, weight in self.weights.items():
            if weight.grad is not None:
                weight.grad.mul_(self.updated[name])

    def after_step(self, batch: Batch, context: TaskContext) -> None:
        super().after_step(batch, context)
        self._zero()

    def end_epoch(self, context: TaskContext, epoch: int) -> None:
        done = epoch + 1
        if done % self.sparse.interval or done == context.epochs:
            return
        gradients = self.gradients(context)
        self._shrink(gradients, self.sparse.intra_task)
        self._grow(context, epoch, 0.0)
        self._hold_back(gradients)
        stages = [e for e in range(1, context.epochs) if self._removes_after(e, context)]
        if done in stages:
            share = self.sparse.removed_data * (stages.index(done) + 1) / len(stages)
            self._remove_data(len(self.wrong) - round(share * len(self.wrong)), context, epoch)

    def end_task(self, context: TaskContext) -> None:
        super().end_task(context)
        self._shrink(self.gradients(context), 0.0)
        self.kept, self.wrong = self.kept[:0], self.wrong[:0]

    # -- importance --------------------------------------------------------------------------------------------

    def gradients(self, context: TaskContext) -> dict[str, Tensor]:
        """CGI: α·|∂L̃(new task)/∂w| + β·|∂L(buffer)/∂w| of every maskable weight, by name."""
        names, weights = list(self.weights), list(self.weights.values())
        if not weights:  # everything but the head is frozen
            return {}
        was_training = self.network.training
        self.network.eval()
        new = context.sample(IMPORTANCE_SAMPLES, purpose="importance")
        logits = self.network(new.images)[:, context.task_classes].float()
        loss = F.cross_entropy(logits, context.position_of(new.labels, context.task_classes))
        parts = torch.autograd.grad(loss, weights)
        total = [self.sparse.importance_new * part.abs() for part in parts]
        if len(self.buffer):
            rows = self.buffer.rows
            loss = self.replay_cross_entropy(self.network(rows["images"]), rows["labels"], context)
            for entry, part in zip(total, torch.autograd.grad(loss, weights), strict=True):
                entry.add_(part.abs(), alpha=self.sparse.importance_old)
        self.network.train(was_training)
        return dict(zip(names, total, strict=True))

    # -- masks -------------------------------------------------------------------------------------------------

    def _size(self, name: str, further: float = 0.0) -> int:
        """How many weights of a layer may be there: its share 1 - sparsity, and `further` of all its weights."""
        return round((1 - self.sparse.sparsity + further) * self.weights[name].numel())

    @torch.no_grad()
    def _shrink(self, gradients: Mapping[str, Tensor], below: float) -> None:
        """Drops the weights with the lowest CWI until a layer is `below` its size."""
        for name, weight in self.weights.items():
            importance = weight.abs() + gradients[name]
            self.masks[name] = strongest(importance, self.masks[name], max(1, self._size(name, -below)))
        self._zero()

    def _grow(self, context: TaskContext, when: int | str, further: float) -> None:
        """Adds weights drawn at random, at zero, until a layer is `further` above its size."""
        for name, mask in self.masks.items():
            free = (~mask).flatten().nonzero().flatten()
            order = torch.randperm(len(free), generator=torch_generator(context.seed, "grow", when, name))
            missing = max(0, self._size(name, further) - int(mask.sum()))
            grown = mask.flatten().clone()
            grown[free[order[:missing].to(free.device)]] = True
            self.masks[name] = grown.view_as(mask)

    def _hold_back(self, gradients: Mapping[str, Tensor]) -> None:
        """Of the weights that are there, those with the highest CGI are updated."""
        for name, mask in self.masks.items():
            self.updated[name] = strongest(gradients[name], mask, round(self.sparse.updated * mask.numel()))

    @torch.no_grad()
    def _zero(self) -> None:
        for name, weight in self.weights.items():
            weight.mul_(self.masks[name])

    # -- data --------------------------------------------------------------------------------------------------

    def _removes_after(self, epochs: int, context: TaskContext) -> bool:
        return epochs % self.sparse.interval == 0 and epochs <= self.sparse.removal_until * context.epochs

    def _remove_data(self, left: int, context: TaskContext, epoch: int) -> None:
        """Keeps the `left` samples that were misclassified most often; ties are drawn by seed."""
        wrong = self.wrong[self.kept].cpu().numpy()
        ties = numpy_generator(context.seed, "removal", epoch).permutation(len(wrong))
        hardest = np.lexsort((ties, -wrong))[: max(2, left)]
        self.kept = self.kept[torch.from_numpy(np.sort(hardest)).to(self.kept.device)]

    def _answers(self, logits: Tensor, context: TaskContext) -> Tensor:
        """The class with the highest logit among those in the loss; `[N]`."""
        if self.loss_classes == "all":
            return logits.argmax(1)
        classes = context.task_classes if self.loss_classes == "task" else context.seen_classes
        return classes[logits[:, classes].argmax(1)]

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict() | {"kept": self.kept, "wrong": self.wrong}
        state |= {f"mask/{name}": mask for name, mask in self.masks.items()}
        return state | {f"updated/{name}": mask for name, mask in self.updated.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.kept, self.wrong = state["kept"], state["wrong"]
        self.masks = {k.removeprefix("mask/"): v for k, v in state.items() if k.startswith("mask/")}
        self.updated = {k.removeprefix("updated/"): v for k, v in state.items() if k.startswith("updated/")}


class SparCLERParameters(SparseParameters):
    """`sparcl-er`: experience replay, sparse in weights, data and gradients."""

    name: Literal["sparcl-er"] = "sparcl-er"

    def cost(self) -> StepCost:
        return StepCost(replayed=self.drawn, stored_images=self.buffer_size, weight_sparsity=self.sparsity)

    def build(self, network: StagedResNet) -> Method:
        return SparCLER(network, self)


class SparCLDERppParameters(SparseParameters, DERppKeys):
    """`sparcl-derpp`: dark experience replay, sparse in weights, data and gradients."""

    name: Literal["sparcl-derpp"] = "sparcl-derpp"

    def cost(self) -> StepCost:
        size = self.buffer_size
        return StepCost(replayed=2 * self.drawn, stored_images=size, stored_logits=size, weight_sparsity=self.sparsity)

    def build(self, network: StagedResNet) -> Method:
        return SparCLDERpp(network, self)


class SparCLER(Sparse, ER):
    pass


class SparCLDERpp(Sparse, DERpp):
    pass


def strongest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Boolean mask, of the shape of both, of the `count` highest scores where `among` is True (all, if fewer)."""
    ranked = scores.masked_fill(~among, float("-inf")).flatten()
    chosen = torch.zeros_like(among.flatten())
    order = ranked.sort(descending=True, stable=True).indices
    chosen[order[: min(count, int(among.sum()))]] = True
    return chosen.view_as(among)


def _maskable(network: StagedResNet) -> dict[str, nn.Parameter]:
    """The 3x3 convolutions' weights of the trained blocks, by name."""
    found: dict[str, nn.Parameter] = {}
    for name, module in network.suffix.named_modules():
        if isinstance(module, BasicBlock):
            found |= {f"{name}.{n}": w for n, w in module.named_parameters() if n in ("conv1.weight", "conv2.weight")}
    return found

"""What a continual-learning method is. The training loop (lightcl/training.py) is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from lightcl.data.tasks import Batch, Samples, TaskContext
from lightcl.networks.resnet import StagedResNet
from lightcl.section import Section

Setting = Literal["til", "cil"]


@dataclass(frozen=True)
class StepCost:
    """What a method adds to plain SGD on the network; `lightcl/footprint/` makes FLOPs and bytes of it."""

    replayed: int = 0
    """Further samples a step that pass forward and backward through all that is trained."""
    held: int = 0
    """Further samples a step that pass the suffix and the head alone, from stored outputs of the prefix."""
    weight_copies: int = 0
    """Stored tensors as large as the trained parameters."""
    stored_images: int = 0
    """Raw images kept (uint8)."""
    stored_logits: int = 0
    """Rows of logits kept."""
    pattern_samples: int = 0
    """Samples whose prefix outputs, logits and vital suffix feature maps are kept."""
    vital_ratio: float = 0.0
    """Share of the suffix's channels that become vital with each task; of the maps only those are kept."""
    columns: bool = False
    """Whether every earlier task's trained part stays, passes forward in every step, and is read through adapters at
    the ends of layers (PNN); the state that all of them begin from is kept as well."""
    statistics_bytes: int = 0
    """Sums and what is solved from them; depends on the network."""
    weight_sparsity: float = 0.0
    """Share of the weights held at zero by a mask while training; above 0, two boolean masks are kept: of the weights
    that are there and of those that are updated."""


class MethodParameters(Section):
    """A method's section of the scenario. Every method names its own keys; an unknown one is an error."""

    name: str
    loss_classes: Literal["task", "seen", "all"] = "task"
    """Classes in the cross-entropy. task: those of the current task (the paper); seen: all met so far; all: the
    whole head."""

    @property
    def default_freeze(self) -> str:
        """The freeze point where the scenario names none."""
        return "none"

    @property
    def default_frozen_batch_norm(self) -> Literal["eval", "train"]:
        return "eval"

    @property
    def settings(self) -> tuple[Setting, ...]:
        """What the method can be tested for: task known (TIL), not known (CIL)."""
        return ("til", "cil")

    @property
    def shareable(self) -> bool:
        """Whether the trained tensors mean the same on every device, so that a server may average them."""
        return True

    @property
    def sums_statistics(self) -> bool:
        """Whether devices send statistics of a finished task, for the server to add up and solve a head from."""
        return False

    @property
    def joint(self) -> bool:
        """Whether all tasks are learned together, as one."""
        return False

    def cost(self) -> StepCost:
        return StepCost()

    def cost_on(self, network: StagedResNet) -> StepCost:
        """`cost`, with what depends on the network's shape."""
        return self.cost()

    def shape_(self, network: StagedResNet) -> None:
        """Changes the shape of the network that every device starts with; its weights are loaded."""

    def build(self, network: StagedResNet) -> Method:
        raise NotImplementedError


class Method:
    """One method on one device. Subclasses override what their paper adds to plain cross-entropy."""

    def __init__(self, network: StagedResNet, parameters: MethodParameters) -> None:
        self.network = network
        self.loss_classes = parameters.loss_classes

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer steps, by name; asked for after `begin_task`, and after `load_state_dict`."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def begin_task(self, context: TaskContext) -> None:
        """Called once before the first step of a task; the network is in training mode."""

    def select(self, samples: Samples, context: TaskContext, epoch: int) -> Samples:
        """The task's training samples that this epoch (0-based) passes over."""
        return samples

    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        """The scalar to minimise on one batch."""
        logits = self.network.classify(self.network.features(batch.images))
        return self.cross_entropy(logits, batch.labels, context)

    def before_step(self, batch: Batch, context: TaskContext) -> None:
        """Called when the gradients are there, before the optimizer's step."""

    def after_step(self, batch: Batch, context: TaskContext) -> None:
        """Called after every optimizer step."""

    def end_epoch(self, context: TaskContext, epoch: int) -> None:
        """Called after an epoch's (0-based) last step; the network is in training mode."""

    def end_task(self, context: TaskContext) -> None:
        """Called once after the last step of a task; the network is in evaluation mode."""

    def predict(self, images: Tensor) -> Tensor:
        """Logits `[N, head]` of uint8 images; the network is in evaluation mode and gradients are off."""
        logits: Tensor = self.network(images)
        return logits

    def statistics(self) -> dict[str, Tensor]:
        """What the last finished task adds to the sums of the fleet, in fp64; only of methods that sum statistics."""
        return {}

    def shared_head(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The server's part: a head solved from the sum of all devices' `statistics`."""
        return {}

    def adopt_head_(self, head: Mapping[str, Tensor]) -> None:
        """Takes over the fleet's head."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a restarted device needs, as tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""

    def cross_entropy(self, logits: Tensor, labels: Tensor, context: TaskContext) -> Tensor:
        """Mean cross-entropy of `[N, head]` logits over the classes that `loss_classes` names.

        Logits outside them are left out of the softmax, so the head's other rows get no gradient.
        """
        if self.loss_classes == "all":
            return F.cross_entropy(logits.float(), labels)
        classes = context.task_classes if self.loss_classes == "task" else context.seen_classes
        return F.cross_entropy(logits[:, classes].float(), context.position_of(labels, classes))

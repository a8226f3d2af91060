"""What a continual-learning method is. The training loop (lightcl/training.py) is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional as F

from lightcl.data.tasks import Batch, TaskContext
from lightcl.networks.resnet import StagedResNet


class MethodParameters(BaseModel):
    """A method's section of the scenario. Every method names its own keys; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    name: str
    loss_classes: Literal["task", "seen", "all"] = "task"
    """Classes in the cross-entropy: those of the current task (the paper), all seen so far, or the whole head."""

    @property
    def default_freeze(self) -> str:
        """The freeze point where the scenario names none."""
        return "none"

    @property
    def default_frozen_batch_norm(self) -> Literal["eval", "train"]:
        return "eval"

    def shape_(self, network: StagedResNet) -> None:
        """Called once the weights are loaded and before the network is used: may make it smaller."""

    def build(self, network: StagedResNet) -> Method:
        raise NotImplementedError


class Method:
    """One method on one device. Subclasses override what their paper adds to plain cross-entropy."""

    def __init__(self, network: StagedResNet, parameters: MethodParameters) -> None:
        self.network = network
        self.loss_classes = parameters.loss_classes

    def begin_task(self, context: TaskContext) -> None:
        """Called once before the first step of a task; the network is in training mode."""

    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        """The scalar to minimise on one batch."""
        logits = self.network.classify(self.network.features(batch.images))
        return self.cross_entropy(logits, batch.labels, context)

    def after_step(self, batch: Batch, context: TaskContext) -> None:
        """Called after every optimiser step."""

    def end_task(self, context: TaskContext) -> None:
        """Called once after the last step of a task; the network is in evaluation mode."""

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

"""The interface of a continual-learning method, and the registry of methods.

A method is one file: a section with its keys (`MethodParameters`), whose class attributes are the method's constants,
and the algorithm (`Method`) with the decorator `@register`. The training loop (lightcl/device/training.py) is the same
for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightcl.data.section import Data, Fleet, Stream
from lightcl.data.tasks import Batch, Samples, TaskContext
from lightcl.errors import RequestError
from lightcl.networks.inference import Inference
from lightcl.networks.section import Network
from lightcl.networks.staged import Backbone, OnMap
from lightcl.registry import Registry
from lightcl.section import Section

Setting = Literal["til", "cil"]


@dataclass(frozen=True)
class StepCost:
    """The cost of a method on top of plain SGD; `lightcl/analysis/footprint/` turns it into FLOPs and bytes."""

    replayed: int = 0
    """Additional samples per step that pass forward and backward through the trained part of the network."""
    suffix_samples: int = 0
    """Additional samples per step that pass through suffix and head only, from stored prefix outputs."""
    joint_pass: bool = False
    """Whether those pass together with the batch, so that every weight is used once in a step."""
    weight_copies: int = 0
    """Stored tensors as large as the trained parameters."""
    stored_images: int = 0
    """Raw images kept (uint8)."""
    stored_logits: int = 0
    """Rows of logits kept."""
    pattern_samples: int = 0
    """Samples whose prefix outputs, logits and vital suffix feature maps are kept."""
    vital_ratio: float = 0.0
    """Share of the suffix's channels that become vital with each task; only these are kept of the maps."""
    columns: bool = False
    """Whether the trained part of every earlier task is kept, runs forward in every step and is read through adapters
    at the ends of layers (PNN); the common initial state is kept as well."""
    statistics_bytes: int = 0
    """Bytes of the sums and of the head solved from them; depends on the network."""
    weight_sparsity: float = 0.0
    """Share of the weights that a mask keeps at zero during training; above 0, two boolean masks are kept: one of the
    present weights, one of the updated weights."""


class Sections(Protocol):
    """The parts of a scenario that a method's rules may involve (`MethodParameters.check`)."""

    @property
    def data(self) -> Data: ...
    @property
    def stream(self) -> Stream: ...
    @property
    def fleet(self) -> Fleet: ...
    @property
    def network(self) -> Network: ...
    @property
    def frozen_batch_norm(self) -> Literal["eval", "train"]:
        """The scenario's value, or else the method's default."""


class MethodParameters(Section):
    """A method's section of the scenario: its keys as fields, its constants as class attributes.

    A subclass gives `name` a literal type and the same value as its default.
    """

    default_freeze: ClassVar[str] = "none"
    """The freeze point if the scenario names none."""
    settings: ClassVar[tuple[Setting, ...]] = ("til", "cil")
    """The settings in which the method can be tested: task known (TIL), not known (CIL)."""
    shareable: ClassVar[bool] = True
    """Whether the trained tensors mean the same on every device, so that a server may average them."""
    joint: ClassVar[bool] = False
    """Whether all tasks are learned together, as one."""
    order: ClassVar[int] = 100
    """Position in lists of methods: the paper's Table 1, then this project's own, then plugins."""
    method: ClassVar[type[Method]]
    """The algorithm; set by `register`."""

    name: str = ""
    loss_classes: Literal["task", "seen", "all"] = "task"
    """Classes in the cross-entropy. task: those of the current task (the paper); seen: all seen so far; all: the
    entire head."""

    @property
    def default_frozen_batch_norm(self) -> Literal["eval", "train"]:
        return "eval"

    @property
    def reads_gradients(self) -> bool:
        """Whether the method needs all gradients of a step together (`Method.before_step`)."""
        return self.method.before_step is not Method.before_step

    @property
    def sums_statistics(self) -> bool:
        """Whether devices send statistics of a finished task, which the server sums and solves for a head."""
        return False

    def check(self, scenario: Sections) -> None:
        """Rules between this section and the others. Raises ValueError with a text that begins with the key."""

    def cost(self) -> StepCost:
        return StepCost()

    def cost_on(self, network: Backbone) -> StepCost:
        """`cost`, with the parts that depend on the network's shape."""
        return self.cost()

    def shape_(self, network: Backbone) -> None:
        """Changes the shape of the network that every device starts with, after its weights are loaded."""

    def build(self, network: Backbone) -> Method:
        """The method on one device. Raises RequestError where it cannot work with this network."""
        return self.method(network, self)


METHODS: Registry[type[MethodParameters]] = Registry(
    "method", "method.name", "lightcl.methods", order=lambda parameters: parameters.order
)
"""The sections of all methods by name."""

MethodType = TypeVar("MethodType", bound="type[Method]")


def register(parameters: type[MethodParameters]) -> Callable[[MethodType], MethodType]:
    """Makes the decorated method available under the name of its section:

        @register(MyParameters)
        class MyMethod(Method): ...

    Raises TypeError where the section has no name.
    """
    name = parameters.model_fields["name"].default
    if not name:
        raise TypeError(f'{parameters.__name__} needs a name: `name: Literal["my-method"] = "my-method"`')

    def decorate(method: MethodType) -> MethodType:
        parameters.method = method
        METHODS.register(name, parameters)
        return method

    return decorate


class PrefixFeatures:
    """The only source of the frozen prefix's outputs.

    A cache replaces it and serves the batches that have an `origin`.
    """

    def __init__(self, network: Backbone) -> None:
        self.network = network
        self.notice = ""
        """What the user should know of the cache; empty where there is nothing to tell."""

    def __call__(self, batches: Sequence[Batch], on_map: OnMap | None = None) -> Tensor:
        """Outputs `[N, C, H, W]` for the images of all batches, one after the other, without a graph.

        The batches pass through the prefix as one. `on_map` is called with the prefix's feature maps.
        """
        images = batches[0].images if len(batches) == 1 else torch.cat([batch.images for batch in batches])
        return self.network.features(images, on_map)

    def announce(self, batches: Iterable[Batch]) -> None:
        """Says which images are asked for later, the next ones first, instead of what was said before.

        A cache may compute them together with others. They need not be asked for in these batches, which are only made
        when a cache has room for them.
        """

    def release(self) -> None:
        """Lets go of what the next call can make again; called where a task's training begins and ends."""


class Method:
    """One method on one device. Subclasses override what their paper adds to plain cross-entropy."""

    parameters: MethodParameters

    def __init__(self, network: Backbone, parameters: MethodParameters) -> None:
        self.network = network
        self.parameters = parameters
        self.prefix_features = PrefixFeatures(network)

    # -- learning ----------------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer updates, by name; called after `begin_task` and after `load_state_dict`."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def begin_task(self, context: TaskContext) -> None:
        """Called once before the first step of a task; the network is in training mode."""

    def looks_at(self, context: TaskContext) -> Sequence[Batch]:
        """The task's images that `begin_task` and `end_task` ask `features_of` for, so that a cache can compute them
        together with others."""
        return ()

    def select(self, samples: Samples, context: TaskContext, epoch: int) -> Samples:
        """The task's training samples that this epoch (0-based) passes over."""
        return samples

    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        """The scalar to minimize on one batch."""
        return self.cross_entropy(self.logits_of(batch), batch.labels, context)

    def before_step(self, batch: Batch, context: TaskContext) -> None:
        """Called after the backward pass, before the optimizer's step."""

    def after_step(self, batch: Batch, context: TaskContext) -> None:
        """Called after every optimizer step."""

    def end_epoch(self, context: TaskContext, epoch: int) -> None:
        """Called after an epoch's (0-based) last step; the network is in training mode."""

    def end_task(self, context: TaskContext) -> None:
        """Called once after the last step of a task; the network is in evaluation mode."""

    def predict(self, batch: Batch) -> Tensor:
        """Logits `[N, head]`; the network is in evaluation mode and gradients are off. The labels are not read."""
        return self.logits_of(batch)

    def inference(self) -> nn.Module:
        """`predict` as a module for export: float32 images `[N, C, H, W]` in 0..1 to logits `[N, head]`.

        The logits may differ from those of `predict` by a constant per image, which no softmax sees. A method that
        overrides `predict` overrides this, too. Raises RequestError where it does not.
        """
        if type(self).predict is not Method.predict:
            raise RequestError(
                f"method {self.parameters.name} cannot be exported: it overrides Method.predict, but not "
                "Method.inference"
            )
        return Inference(self.network)

    # -- the network -------------------------------------------------------------------------------------------

    def features_of(self, *batches: Batch, on_map: OnMap | None = None) -> Tensor:
        """Prefix outputs `[N, C, H, W]` of the batches, computed as one batch; no method calls the prefix itself."""
        return self.prefix_features(batches, on_map)

    def logits_of(self, batch: Batch) -> Tensor:
        """Logits `[N, head]`."""
        return self.network.classify(self.features_of(batch))

    def logits_together(self, *batches: Batch) -> list[Tensor]:
        """Logits of several batches that pass through the network as one, so they share batch-norm statistics."""
        logits = self.network.classify(self.features_of(*batches))
        return list(torch.split(logits, [len(batch) for batch in batches]))

    def cross_entropy(self, logits: Tensor, labels: Tensor, context: TaskContext) -> Tensor:
        """Mean cross-entropy of `[N, head]` logits over the classes that `loss_classes` names.

        Other logits are left out of the softmax, so their rows of the head get no gradient.
        """
        if self.parameters.loss_classes == "all":
            return F.cross_entropy(logits.float(), labels)
        classes = context.task_classes if self.parameters.loss_classes == "task" else context.seen_classes
        return F.cross_entropy(logits.index_select(1, classes).float(), context.position_of(labels, classes))

    # -- sharing -----------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Tensor]:
        """What the last finished task adds to the fleet's sums, fp64; only for methods that sum statistics."""
        return {}

    def shared_head(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the server: a head solved from the sum of all devices' `statistics`."""
        return {}

    def adopt_head_(self, head: Mapping[str, Tensor]) -> None:
        """Replaces the device's head by the fleet's."""

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a restarted device needs, as tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""

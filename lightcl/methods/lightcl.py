"""LightCL: a frozen prefix, and a suffix with memorized feature patterns.

Wang, Cheng, Ji, Huang: "LightCL: Compact Continual Learning with Low Memory Footprint For Edge Device", ASP-DAC 2025,
arXiv 2407.10545.

    loss = CE(logits[:, classes of the task], y) + β·( Σ_m Σ (mask_m ⊙ (F_m - F*_m))² + Σ (logits - logits*)² )

F* and logits* are recorded before each task on `memory_size` samples *of that task*; no old sample is kept. Deviations
of the defaults from the paper's code (`preset: paper` undoes them): the prefix is frozen with its batch-norm, exactly
`keep` channels are vital, and the suffix's batch-norm uses its running statistics on the memory samples
(`memory_batch_norm`), so the patterns are those of the network that is tested. In every preset, importance is computed
in evaluation mode on un-augmented images, and memory samples never change running statistics.

`preset: scale-free` is ours. Drift is relative (`reduction`), so that one β works for every width, and only the logits
of classes seen before are regularized (`held_logits`): tying the logits of new classes to their values from before
these classes were learned works against the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lightcl.data.tasks import Batch, TaskContext
from lightcl.methods.base import Method, MethodParameters, Sections, StepCost, register
from lightcl.methods.parts.batch_norm import running_statistics, split_statistics, unmoved_statistics
from lightcl.methods.parts.feature_memory import (
    Recorded,
    Reduction,
    VitalSelection,
    channel_importance,
    vital_channels,
)
from lightcl.networks.native import is_native
from lightcl.networks.staged import Backbone, FeatureMaps
from lightcl.storage.state import under

Preset = Literal["default", "paper", "scale-free"]
PRESETS: dict[str, dict[str, str | float]] = {
    "default": {},
    "scale-free": {"reduction": "relative", "beta": 1.0, "held_logits": "old"},
    "paper": {"vital_selection": "paper", "memory_batch_norm": "train"},
}


class LightCLParameters(MethodParameters):
    """`lightcl`: the defaults are the paper's values; `preset: paper` also uses the details of the paper's code.

    A preset sets the keys that the scenario leaves out.
    """

    default_freeze = "layer3"
    order = 10
    name: Literal["lightcl"] = "lightcl"
    preset: Preset = "default"
    """Sets the keys that the scenario leaves out. default: the paper's values; paper: also the details of its code
    (vital_selection: paper, memory_batch_norm: train, and network.frozen_batch_norm: train); scale-free: dimensionless
    drift (reduction: relative, beta: 1, held_logits: old)."""
    beta: float = Field(default=2e-4, ge=0, le=1e9)
    """Weight of the regularization; 0 switches it off (freezing only)."""
    reduction: Reduction = "sum"
    """sum: the paper's; relative: dimensionless drift, so that `beta` means the same at every width."""
    held_logits: Literal["all", "old"] = "all"
    """Logits tied to the stored ones. all: the entire head's (the paper); old: the classes seen before this task."""
    ratio: float = Field(default=0.15, gt=0, le=1)
    """Share of a map's channels that become vital with each task."""
    memory_size: int = Field(default=15, ge=1, le=1_000_000)
    """Samples of the new task whose patterns are stored; at least 2 where a batch-norm takes its statistics from them
    (`memory_batch_norm: train`, `network.frozen_batch_norm: train`)."""
    vital_selection: VitalSelection = "exact"
    """exact: exactly the number of channels that `ratio` gives; paper: one more, as in the paper's code."""
    memory_batch_norm: Literal["eval", "train"] = "eval"
    """Batch-norm of the suffix while memory samples pass. eval: running statistics; train: the memory batch's own."""
    memory_pass: Literal["separate", "joint"] = "separate"
    """How memory samples pass the suffix. separate: after the batch; joint: together with it, each with its own
    batch-norm, which is faster and takes less memory with `training.update: at-once`; rounds differently."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: object) -> object:
        if isinstance(values, dict):
            return PRESETS.get(str(values.get("preset", "default")), {}) | values
        return values

    @property
    def default_frozen_batch_norm(self) -> Literal["eval", "train"]:
        return "train" if self.preset == "paper" else "eval"

    def smallest_memory(self, frozen_batch_norm: Literal["eval", "train"]) -> int:
        """The smallest `memory_size`: a single sample has no variance where its maps are 1x1 (as in training batches,
        see `training_batches`)."""
        return 2 if self.beta and "train" in (self.memory_batch_norm, frozen_batch_norm) else 1

    def check(self, scenario: Sections) -> None:
        least = self.smallest_memory(scenario.frozen_batch_norm)
        if self.memory_size < least:
            raise ValueError(
                f"method.memory_size is {self.memory_size}, but batch-norm in training mode (method.memory_batch_norm "
                f"is {self.memory_batch_norm}, network.frozen_batch_norm {scenario.frozen_batch_norm}) has no variance "
                f"over a single sample: at least {least}"
            )

    def cost(self) -> StepCost:
        if self.beta == 0:
            return StepCost()
        return StepCost(
            suffix_samples=self.memory_size, joint_pass=self.memory_pass == "joint", pattern_samples=self.memory_size,
            vital_ratio=self.ratio,
        )  # fmt: skip


@register(LightCLParameters)
class LightCL(Method):
    """loss = CE(logits[:, classes of the task], y) + β·( Σ_m Σ (mask_m ⊙ (F_m - F*_m))² + Σ (logits - logits*)² )"""

    parameters: LightCLParameters

    def __init__(self, network: Backbone, parameters: LightCLParameters) -> None:
        super().__init__(network, parameters)
        self.vital: dict[str, Tensor] = {}  # mask_m: boolean [C] for every regularized map
        self.recorded: Recorded | None = None  # F* and logits*; None: no regularization
        self._native = is_native(network.suffix)

    def begin_task(self, context: TaskContext) -> None:
        """Records F* and logits* on samples of the new task, with the current network."""
        self.recorded = None
        if context.is_first or self.parameters.beta == 0:
            return
        samples = self._memory_samples(context)
        with unmoved_statistics(self.network.prefix):  # once per task suffices: the prefix is frozen
            inputs = self.features_of(samples)
        tied = torch.arange(self.network.classes, device=context.device)
        if self.parameters.held_logits == "old":
            tied = context.old_classes
        with torch.no_grad(), self.memory_mode():
            self.recorded = Recorded.of(inputs, self.vital, tied, self.network.classify)

    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        if self.recorded is not None and self.parameters.memory_pass == "joint":
            return self._joint_loss(batch, context, self.recorded)
        loss = super().loss(batch, context)
        if self.recorded is None:
            return loss
        with self.memory_mode():
            drift = self.recorded.drift(
                self.vital, self.parameters.reduction, self.network.classify, native=self._native
            )
        return loss + self.parameters.beta * drift

    def _joint_loss(self, batch: Batch, context: TaskContext, recorded: Recorded) -> Tensor:
        """The same with one pass of the batch and the memory samples, so that every weight is used once."""
        count = len(batch)
        of_maps = recorded.of_maps(self.vital, self.parameters.reduction, first=count, native=self._native)
        inputs = torch.cat([self.features_of(batch), recorded.inputs])
        with split_statistics(self.network.suffix, count, self.parameters.memory_batch_norm):
            logits = self.network.classify(inputs, of_maps.on_map)
        own, others = torch.split(logits, [count, len(logits) - count])
        loss = self.cross_entropy(own, batch.labels, context)
        return loss + self.parameters.beta * recorded.total(of_maps, others)

    @torch.no_grad()
    def end_task(self, context: TaskContext) -> None:
        """Marks the most important channels of this task as vital, in addition to those of earlier tasks."""
        self.recorded = None
        maps: FeatureMaps = {}
        self.network.classify(self.features_of(self._important(context)), maps.__setitem__)
        for name, feature_map in maps.items():
            importance = channel_importance(feature_map)
            mask = vital_channels(importance, self.parameters.ratio, self.parameters.vital_selection)
            self.vital[name] = mask | self.vital.get(name, mask)

    def looks_at(self, context: TaskContext) -> Sequence[Batch]:
        regularized = not context.is_first and self.parameters.beta > 0
        return [*([self._memory_samples(context)] * regularized), self._important(context)]

    def _memory_samples(self, context: TaskContext) -> Batch:
        return context.sample(self.parameters.memory_size, purpose="memory")

    @staticmethod
    def _important(context: TaskContext) -> Batch:
        """One batch of the task, on which the importance of channels is measured."""
        return context.sample(context.batch_size, purpose="importance")

    @property
    def memory(self) -> Tensor | None:
        """Prefix outputs of the memory samples (their images where nothing is frozen)."""
        return self.recorded.inputs if self.recorded else None

    def memory_mode(self) -> AbstractContextManager[None]:
        """The mode of the suffix's batch-norm for memory samples."""
        if self.parameters.memory_batch_norm == "eval":
            return running_statistics(self.network.suffix, self.network.training)
        return unmoved_statistics(self.network.suffix)

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"vital/{name}": mask for name, mask in self.vital.items()}
        return state | (self.recorded.state_dict() if self.recorded else {})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.vital, self.recorded = under(state, "vital/"), Recorded.from_state(state)

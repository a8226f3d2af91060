"""LightCL: frozen prefix, and a suffix that remembers its feature patterns.

Wang, Cheng, Ji, Huang: "LightCL: Compact Continual Learning with Low Memory Footprint For Edge Device", ASP-DAC 2025,
arXiv 2407.10545.

    loss = CE(logits[:, classes of the task], y) + β·( Σ_m Σ (mask_m ⊙ (F_m - F*_m))² + Σ (logits - logits*)² )

F* and logits* are recorded before each task on `memory_size` samples *of that task*; no old sample is kept. Deviations
of the default from the paper's code, all selectable: the prefix is frozen with its batch-norm, exactly `keep` channels
are vital, and the suffix's batch-norm uses its running statistics on the memory samples (`memory_batch_norm`), so the
patterns are those of the network that will be tested. In every preset importance is taken in evaluation mode on
un-augmented images, and memory samples never move a running statistic.

`preset: scale-free` is ours: drift is measured without a unit (`reduction`), so that one β serves every width, and only
the logits of classes seen before are held (`held_logits`): holding those of the new classes to what they were before
anything was learned of them works against the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lightcl.data.tasks import Batch, TaskContext
from lightcl.methods.base import Method, MethodParameters, StepCost
from lightcl.methods.parts.feature_memory import (
    DriftingMaps,
    Reduction,
    VitalSelection,
    channel_importance,
    logit_drift,
    vital_channels,
    vital_patterns,
)
from lightcl.networks.resnet import FeatureMaps, Stage, StagedResNet
from lightcl.storage.state import under

Preset = Literal["default", "paper", "scale-free"]
PRESETS: dict[str, dict[str, str | float]] = {
    "default": {},
    "scale-free": {"reduction": "relative", "beta": 1.0, "held_logits": "old"},
    "paper": {"vital_selection": "paper", "memory_batch_norm": "train"},
}


class LightCLParameters(MethodParameters):
    """`lightcl`: the defaults are the paper's values; `preset: paper` also takes over its implementation details.

    A preset fills the keys that the scenario leaves out.
    """

    name: Literal["lightcl"] = "lightcl"
    preset: Preset = "default"
    """Fills the keys that the scenario leaves out. default: the paper's values; paper: also the details of its code
    (vital_selection: paper, memory_batch_norm: train, and network.frozen_batch_norm: train); scale-free: drift
    without a unit (reduction: relative, beta: 1, held_logits: old)."""
    beta: float = Field(default=2e-4, ge=0, le=1e9)
    """Weight of the regularisation; 0 switches it off (freezing only)."""
    reduction: Reduction = "sum"
    """sum: the paper's; relative: drift without a unit, so that `beta` means the same at every width."""
    held_logits: Literal["all", "old"] = "all"
    """Logits held to the stored ones. all: the whole head's (the paper); old: the classes seen before this task."""
    ratio: float = Field(default=0.15, gt=0, le=1)
    """Share of a map's channels that become vital with each task."""
    memory_size: int = Field(default=15, ge=1, le=1_000_000)
    """Samples of the new task whose patterns are stored; at least 2 where a batch-norm takes its statistics from them
    (`memory_batch_norm: train`, `network.frozen_batch_norm: train`)."""
    vital_selection: VitalSelection = "exact"
    """exact: the ratio's channels to the number; paper: one more, as in the paper's code."""
    memory_batch_norm: Literal["eval", "train"] = "eval"
    """Batch-norm of the suffix while memory samples pass. eval: running statistics; train: the memory batch's own."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: object) -> object:
        if isinstance(values, dict):
            return PRESETS.get(str(values.get("preset", "default")), {}) | values
        return values

    @property
    def default_freeze(self) -> str:
        return "layer3"

    @property
    def default_frozen_batch_norm(self) -> Literal["eval", "train"]:
        return "train" if self.preset == "paper" else "eval"

    def smallest_memory(self, frozen_batch_norm: Literal["eval", "train"]) -> int:
        """The least `memory_size`: a single sample has no variance where its maps are 1x1 (as in batches of training,
        see `training_batches`)."""
        return 2 if self.beta and "train" in (self.memory_batch_norm, frozen_batch_norm) else 1

    def cost(self) -> StepCost:
        if self.beta == 0:
            return StepCost()
        return StepCost(held=self.memory_size, pattern_samples=self.memory_size, vital_ratio=self.ratio)

    def build(self, network: StagedResNet) -> Method:
        return LightCL(network, self)


class LightCL(Method):
    def __init__(self, network: StagedResNet, parameters: LightCLParameters) -> None:
        super().__init__(network, parameters)
        self.parameters = parameters
        self.vital: dict[str, Tensor] = {}
        self.patterns: FeatureMaps = {}
        self.logits: Tensor | None = None  # of the held classes
        self.held: Tensor | None = None  # their columns of the head
        self.memory: Tensor | None = (
            None  # prefix outputs of the memory samples, or the samples where nothing is frozen
        )

    def begin_task(self, context: TaskContext) -> None:
        self.memory, self.logits, self.patterns = None, None, {}
        if context.is_first or self.parameters.beta == 0:
            return
        samples = context.sample(self.parameters.memory_size, purpose="memory").images
        # The prefix never changes during a task, so its outputs are computed once and not at every step.
        with _keeping_statistics(self.network.prefix):
            self.memory = self.network.features(samples)
        if self.parameters.held_logits == "old":
            self.held = context.old_classes
        else:
            self.held = torch.arange(self.network.classes, device=context.device)
        maps: FeatureMaps = {}
        with torch.no_grad(), self._memory_mode():
            self.logits = self.network.classify(self.memory, maps)[:, self.held].float()
        self.patterns = vital_patterns(maps, self.vital)

    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        loss = super().loss(batch, context)
        if self.memory is None or self.logits is None or self.held is None:
            return loss
        reduction = self.parameters.reduction
        maps = DriftingMaps(self.patterns, self.vital, reduction)
        with self._memory_mode():
            logits = self.network.classify(self.memory, maps)[:, self.held]
        moved = maps.drift() + logit_drift(logits, self.logits, reduction)
        return loss + self.parameters.beta * moved

    @torch.no_grad()
    def end_task(self, context: TaskContext) -> None:
        """Marks the channels that matter to this task as vital, beside those of the tasks before."""
        self.memory, self.logits, self.patterns = None, None, {}
        images = context.sample(context.batch_size, purpose="importance").images
        maps: FeatureMaps = {}
        self.network.classify(self.network.features(images), maps)
        for name, feature_map in maps.items():
            mask = vital_channels(
                channel_importance(feature_map), self.parameters.ratio, self.parameters.vital_selection
            )
            self.vital[name] = mask | self.vital[name] if name in self.vital else mask

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"vital/{name}": mask for name, mask in self.vital.items()}
        state |= {f"pattern/{name}": stored for name, stored in self.patterns.items()}
        if self.memory is not None and self.logits is not None and self.held is not None:
            state |= {"memory": self.memory, "logits": self.logits, "held": self.held}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.vital = under(state, "vital/")
        self.patterns = under(state, "pattern/")
        self.memory, self.logits, self.held = state.get("memory"), state.get("logits"), state.get("held")
        if self.memory is not None:  # as it was: in another order a mean over positions rounds differently
            self.memory = self.memory.contiguous(memory_format=torch.channels_last)

    def _memory_mode(self) -> _evaluating | _keeping_statistics:
        if self.parameters.memory_batch_norm == "eval":
            return _evaluating(self.network)
        return _keeping_statistics(self.network.suffix)


class _evaluating:
    """The suffix's batch-norm on running statistics for the length of a `with`."""

    def __init__(self, network: StagedResNet) -> None:
        self.network = network

    def __enter__(self) -> None:
        self.was_training = self.network.training
        self.network.suffix.train(False)

    def __exit__(self, *_: object) -> None:
        self.network.suffix.train(self.was_training)


class _keeping_statistics:
    """Batch statistics without moving the running ones: memory samples are no part of the data's distribution."""

    def __init__(self, stage: Stage) -> None:
        norms = [m for _, block in stage.named_modules() for m in block.modules()]
        self.norms = [m for m in norms if isinstance(m, nn.BatchNorm2d)]

    def __enter__(self) -> None:
        self.momenta = [norm.momentum for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, momentum in zip(self.norms, self.momenta, strict=True):
            norm.momentum = momentum

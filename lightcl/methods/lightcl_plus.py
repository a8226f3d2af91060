"""LightCL-plus: LightCL, and a closed-form classifier on the frozen prefix that distinguishes the tasks.

Ours. LightCL's own head never learns to distinguish the classes of one task from those of another, because it sees one
task at a time. Sums of features per class can be collected one task at a time without any loss
(lightcl/methods/parts/closed_form.py). The two are combined as a product of experts:

    score(c | x) = log p_LDA(c | φ(x)) + suffix_weight · log p_suffix(c | x, task of c)

where p_suffix is LightCL's head, its softmax within the task in which c was learned. φ(x) depends only on the feature
maps of the *frozen* prefix, which never change, so the statistics stay valid while the suffix is trained. No old sample
is kept, only sums; they are collected in one pass at the end of each task.

φ(x): channel means of the prefix's feature maps, the last map also in a 2x2 grid. Of the choices in `FEATURES` the
richest one whose statistics fit into `statistics_mb` is used.

`share_statistics`: sums add up exactly over devices, so the fleet's head is the one that its pooled data would give. A
device sends the sums of a finished task; the server adds them up and returns the solved head. The sums reveal to the
server how many images of each class a device has, the mean of their features (for a single image, its features) and the
second moments of all features; the head reveals much less to the other devices. With this option a device keeps only
the sums of its last task: the server has the rest.

Solving temporarily needs a matrix [d, d] and its factor, about four times the sums, while no training is running.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from lightcl.data.tasks import Batch, TaskContext
from lightcl.errors import RequestError
from lightcl.methods.base import StepCost, register
from lightcl.methods.lightcl import LightCL, LightCLParameters
from lightcl.methods.parts.closed_form import LinearHead, Statistics, discriminant_head, statistics_bytes
from lightcl.methods.parts.fused import FusedInference
from lightcl.networks.inference import Inference
from lightcl.networks.staged import Backbone
from lightcl.storage.state import under

FEATURES = (
    # (maps from the end of the prefix on, whether the last one also enters as a 2x2 grid), richest first
    (64, True), (4, True), (4, False), (2, False), (1, False),
)  # fmt: skip
STATISTICS_BATCH = 64
MB = 1_000_000


class LightCLPlusParameters(LightCLParameters):
    """`lightcl-plus`: LightCL's keys, and those of the closed-form classifier."""

    order = 12
    name: Literal["lightcl-plus"] = "lightcl-plus"  # type: ignore[assignment]
    statistics_mb: float = Field(default=2.0, gt=0, le=1e9)
    """Memory for the classifier's sums and its solved head, in 10^6 bytes; richer features are used if they fit."""
    shrinkage: float = Field(default=0.01, ge=1e-6, le=1e9)
    """Share of the mean variance that is added to the covariance's diagonal."""
    suffix_weight: float = Field(default=1.0, ge=0, le=1e9)
    """Weight of LightCL's own head within a task; 0: the closed-form classifier alone."""
    share_statistics: bool = False
    """The server sums the fleet's statistics (and so learns the class means), and all devices share one classifier."""

    @model_validator(mode="after")
    def _check(self) -> LightCLPlusParameters:
        if self.preset == "paper":
            raise ValueError(
                "method.preset is 'paper', whose frozen batch-norm drifts: lightcl-plus needs a prefix that never "
                "changes (allowed: default, scale-free)"
            )
        return self

    @property
    def sums_statistics(self) -> bool:
        return self.share_statistics

    def cost_on(self, network: Backbone) -> StepCost:
        total = LightCLPlus(network, self).statistics_of.total
        return replace(self.cost(), statistics_bytes=statistics_bytes(*total.shape))


@register(LightCLPlusParameters)
class LightCLPlus(LightCL):
    parameters: LightCLPlusParameters

    def __init__(self, network: Backbone, parameters: LightCLPlusParameters) -> None:
        """Raises RequestError for a network without a frozen prefix, and if no features fit into `statistics_mb`."""
        super().__init__(network, parameters)
        if not network.prefix.map_names or network.frozen_batch_norm == "train":
            raise RequestError(
                "method lightcl-plus classifies by the feature maps of the frozen prefix, which must never change: "
                "network.freeze must be layer1.0 or deeper and network.frozen_batch_norm eval"
            )
        self.maps, self.grid = self._choose_features()
        self.statistics_of = Statistics.zeros(network.classes, self._width(self.maps, self.grid))
        self.task_of = torch.full((network.classes,), -1)
        self.fleet_head: LinearHead | None = None
        self._solved: LinearHead | None = None

    # -- features ------------------------------------------------------------------------------------------------

    def _choose_features(self) -> tuple[tuple[str, ...], bool]:
        names = self.network.prefix.map_names
        needed = 0
        for count, grid in FEATURES:
            needed = statistics_bytes(self.network.classes, self._width(names[-count:], grid))
            if needed <= self.parameters.statistics_mb * MB:
                return names[-count:], grid
        raise RequestError(
            f"method.statistics_mb is {self.parameters.statistics_mb:g}, but lightcl-plus needs at least "
            f"{needed / MB:.2f} on this network"
        )

    def _width(self, maps: tuple[str, ...], grid: bool) -> int:
        channels = [self.network.map_channels(name) for name in maps]
        return sum(channels) + 3 * channels[-1] * grid  # the grid's four cells replace the last map's mean

    def pool(self, name: str, feature_map: Tensor) -> Tensor:
        """The part of φ that comes from one map `[N, C, H, W]`: `[N, C]` or `[N, 4C]`."""
        if name != self.maps[-1]:
            return feature_map.float().mean((2, 3))
        return F.adaptive_avg_pool2d(feature_map.float(), 2 if self.grid else 1).flatten(1)

    def outputs_and_phi(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The prefix's outputs `[N, C, H, W]`, and φ `[N, d]`, fp32.

        Each map is pooled on arrival and released: all maps of the prefix take several times the memory of training.
        """
        pooled: dict[str, Tensor] = {}

        def on_map(name: str, feature_map: Tensor) -> None:
            if name in self.maps:
                pooled[name] = self.pool(name, feature_map)

        features = self.features_of(batch, on_map=on_map)
        return features, torch.cat([pooled[name] for name in self.maps], 1)

    # -- the stream ----------------------------------------------------------------------------------------------

    def begin_task(self, context: TaskContext) -> None:
        super().begin_task(context)
        self.task_of[context.task_classes.cpu()] = context.task.id

    @torch.no_grad()
    def end_task(self, context: TaskContext) -> None:
        """Adds the task's un-augmented training samples to the sums."""
        super().end_task(context)
        if self.parameters.share_statistics:
            self.statistics_of = Statistics.zeros(*self.statistics_of.total.shape)
        for batch in context.task.train.batches(min(STATISTICS_BATCH, context.batch_size)):
            _, phi = self.outputs_and_phi(batch.to(context.device))
            self.statistics_of.add_(phi, batch.labels)
        self._solved = None

    def predict(self, batch: Batch) -> Tensor:
        """Logits `[N, head]`: the scores of the formula above; minus infinity for a class that no device has seen."""
        features, phi = self.outputs_and_phi(batch)
        suffix_logits = self.network.classify(features).float()
        head = self._head(features.device)
        if not bool(head.known.any()):
            return suffix_logits
        # The two experts differ in what is normalized: LDA over all known classes, the suffix within each task.
        return head.log_posteriors(phi) + self.parameters.suffix_weight * self._within_tasks(suffix_logits)

    def inference(self) -> nn.Module:
        """`predict` with both classifiers as one linear layer (`FusedInference`)."""
        head = self._head(torch.device("cpu"))
        if not bool(head.known.any()):
            return Inference(self.network)
        sums = self.statistics_of
        center = sums.total.sum(0) / sums.count.sum().clamp_min(1)
        return FusedInference(
            self.network, self.maps, self.grid, head, self.task_of, self.parameters.suffix_weight, center
        )

    def _within_tasks(self, logits: Tensor) -> Tensor:
        """Log-softmax over the classes of each task; for classes that only other devices have seen, of guessing."""
        tasks = sorted(set(self.task_of.tolist()) - {-1})
        size = float((self.task_of >= 0).sum()) / max(1, len(tasks))
        scores = torch.full_like(logits, -torch.log(torch.tensor(max(1.0, size))).item())
        for task in tasks:
            classes = (self.task_of == task).nonzero()[:, 0].to(logits.device)
            scores[:, classes] = logits[:, classes].log_softmax(1)
        return scores

    def _head(self, device: torch.device) -> LinearHead:
        if self._solved is None:
            head = self.fleet_head or discriminant_head(self.statistics_of, self.parameters.shrinkage)
            self._solved = LinearHead(*(tensor.to(device) for tensor in head.tensors().values()))
        return self._solved

    # -- sharing -------------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, Tensor]:
        return self.statistics_of.tensors() if self.parameters.share_statistics else {}

    def shared_head(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return discriminant_head(Statistics.from_tensors(totals), self.parameters.shrinkage).tensors()

    def adopt_head_(self, head: Mapping[str, Tensor]) -> None:
        self.fleet_head = LinearHead(**{name: tensor.cpu().float() for name, tensor in head.items()})
        self._solved = None

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict() | {"task_of": self.task_of}
        state |= {f"statistics/{name}": tensor for name, tensor in self.statistics_of.tensors().items()}
        if self.fleet_head is not None:
            state |= {f"fleet_head/{name}": tensor for name, tensor in self.fleet_head.tensors().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.task_of = state["task_of"].cpu()
        self.statistics_of = Statistics.from_tensors(under(state, "statistics/"))
        if head := under(state, "fleet_head/"):
            self.adopt_head_(head)
        self._solved = None

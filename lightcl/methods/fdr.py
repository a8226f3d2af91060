"""FDR: function distance regularization. The network's outputs for some old samples are kept, not their labels.

Benjamin, Rolnick, Körding: "Measuring and Regularizing Networks in Function Space", ICLR 2019 (arXiv 1805.08289).

    loss = CE(f(x), y) + α·(1/|M|)·Σ_{x' in M} ‖softmax(f(x')) - softmax(f*(x'))‖₂

M is the working memory: at the end of each task, samples of it are stored with the network's outputs f* at that time
(in evaluation mode). The memory is divided equally among the tasks that the device has learned; earlier tasks give up
the samples that they stored last. Details: the distance is between softmax outputs and is added to the loss of the same
step, while the version in the DER++ paper's comparison takes a second optimizer step for it; that version's α (0.3 for
Split CIFAR-10 and 200 samples) is the default. Samples are replayed without augmentation, since f* belongs to exactly
these inputs, and share the batch and its batch-norm statistics with the new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lightcl.data.tasks import Batch, TaskContext
from lightcl.methods.base import Method, StepCost, register
from lightcl.methods.parts.reservoir import ReplayParameters
from lightcl.networks.staged import Backbone
from lightcl.seeds import numpy_generator


class FDRParameters(ReplayParameters):
    """`fdr`: stores samples with the outputs of the network at the end of their task."""

    order = 5
    name: Literal["fdr"] = "fdr"
    alpha: float = Field(default=0.3, ge=0, le=1e9)
    """Weight of the function distance."""

    def cost(self) -> StepCost:
        return StepCost(replayed=self.drawn, stored_images=self.buffer_size, stored_logits=self.buffer_size)


@register(FDRParameters)
class FDR(Method):
    parameters: FDRParameters

    def __init__(self, network: Backbone, parameters: FDRParameters) -> None:
        super().__init__(network, parameters)
        self.memory: dict[str, Tensor] = {}  # images [M, C, H, W], logits [M, head], tasks [M]
        self.draws = 0

    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        if not self.memory or not len(self.memory["tasks"]):
            return super().loss(batch, context)
        random = numpy_generator(context.seed, "draw", self.draws)
        self.draws += 1
        members = np.sort(random.permutation(len(self.memory["tasks"]))[: self.parameters.drawn])
        rows = torch.from_numpy(members).to(context.device)
        old = Batch(self.memory["images"][rows], torch.full_like(rows, -1))  # labels are not stored
        logits, outputs = self.logits_together(batch, old)
        distance = function_distance(outputs, self.memory["logits"][rows])
        return self.cross_entropy(logits, batch.labels, context) + self.parameters.alpha * distance

    @torch.no_grad()
    def end_task(self, context: TaskContext) -> None:
        """Makes room for this task's samples and stores them with the network's current outputs."""
        stored = sorted(set(self.memory["tasks"].tolist())) if self.memory else []  # a device may skip tasks
        shares = equal_shares(self.parameters.buffer_size, len(stored) + 1)
        kept = {
            name: [rows[self.memory["tasks"] == task][:share] for task, share in zip(stored, shares, strict=False)]
            for name, rows in self.memory.items()
        }
        new = context.sample(shares[-1], purpose="memory")
        logits = self.logits_of(new).float()
        tasks = torch.full_like(new.labels, context.task.id)
        for name, rows in {"images": new.images, "logits": logits, "tasks": tasks}.items():
            self.memory[name] = torch.cat([*kept.get(name, []), rows])

    def state_dict(self) -> dict[str, Tensor]:
        return {**self.memory, "draws": torch.tensor(self.draws)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.memory = {name: rows for name, rows in state.items() if name != "draws"}
        self.draws = int(state["draws"])


def function_distance(logits: Tensor, stored: Tensor) -> Tensor:
    """The mean over samples of the L2 distance between softmax outputs; both `[M, head]`."""
    difference = logits.float().softmax(1) - stored.softmax(1)
    distance: Tensor = torch.linalg.vector_norm(difference, dim=1).mean()
    return distance


def equal_shares(size: int, tasks: int) -> list[int]:
    """`size` rows divided among `tasks` tasks; the remainder goes to the earlier ones."""
    return [size // tasks + (task < size % tasks) for task in range(tasks)]

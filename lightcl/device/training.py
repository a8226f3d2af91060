"""The only training loop and the only evaluation loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from lightcl.data.batches import training_batches
from lightcl.data.tasks import Task, TaskContext
from lightcl.device.optimizers import drop_gradients, step, updates_at_once
from lightcl.errors import Failure
from lightcl.methods import Method
from lightcl.networks.native import kept_scratch
from lightcl.scenario import Scenario
from lightcl.seeds import derive

EVALUATION_BATCH = 128
"""Images of a pass that tests, at most."""


class TrainingFailure(Failure):
    """Training cannot continue; the text says where it stopped and what to try."""


@dataclass(frozen=True)
class TaskAccuracy:
    """Accuracy on one task, in 0..1: with the task known (TIL) and not known (CIL)."""

    til: float
    cil: float
    images: int


@dataclass
class EpochProgress:
    """The losses of an epoch's steps that are done. `check` is called before each further step but the first, and may
    end the epoch there by an exception."""

    losses: list[Tensor] = field(default_factory=list)
    check: Callable[[], None] = lambda: None
    images: int = 0
    """Images of the steps done since this object was made."""


def train_epoch(
    method: Method,
    optimizer: torch.optim.Optimizer,
    context: TaskContext,
    scenario: Scenario,
    epoch: int,
    progress: EpochProgress | None = None,
) -> float:
    """One pass over the current task's training samples; returns the mean loss of its steps.

    The batches depend only on the scenario's seed, the device, the task and the epoch (through `context.seed`), so that
    an epoch continues after the steps that `progress` has losses of; each call does at least one more.
    Raises TrainingFailure where the loss is no longer a number, and what `progress.check` raises.
    """
    if not method.network.training:
        method.network.train()
    progress = progress or EpochProgress()
    losses, done = progress.losses, len(progress.losses)
    batches = training_batches(
        method.select(context.task.train, context, epoch),
        context.batch_size,
        derive(context.seed, "epoch", epoch),
        augmentation=context.augmentation,
        padding=context.padding,
        device=context.device,
        view=context.view(epoch),
    )
    at_once = scenario.training.update == "at-once"
    with kept_scratch(), updates_at_once(optimizer) if at_once else nullcontext():
        # Those that are done are drawn all the same: the batches of an epoch share one generator.
        for number, batch in enumerate(islice(batches, done, None)):
            if number:
                progress.check()
            with autocast(scenario, context.device):
                loss = method.loss(batch, context)
            loss.backward()  # type: ignore[no-untyped-call]
            if not at_once:
                method.before_step(batch, context)
                step(optimizer)
            method.after_step(batch, context)
            # Here and not before the next backward pass, so that the next forward pass, `end_task` and the evaluation
            # need no memory for gradients that are no longer used.
            drop_gradients(optimizer)
            losses.append(loss.detach())
            progress.images += len(batch.labels)
    with autocast(scenario, context.device):
        method.end_epoch(context, epoch)
    mean = float(torch.stack(losses).mean())
    if not mean < float("inf"):  # also catches NaN
        raise TrainingFailure(
            f"the loss became {mean} in task {context.task.id}, epoch {epoch + 1}; try a smaller "
            f"training.learning_rate ({scenario.training.learning_rate}) or a smaller weight of the method's own terms"
        )
    return mean


def evaluation_batch(scenario: Scenario) -> int:
    """Images of a pass that tests: as many as a training batch has, or up to four times as many where these are few.

    Without a graph a pass keeps few maps at a time, so testing needs no more memory than training.
    """
    batch = scenario.training.batch_size
    return min(EVALUATION_BATCH, max(batch, min(4 * batch, 32)))


@torch.no_grad()
def evaluate(method: Method, tasks: Sequence[Task], scenario: Scenario, device: torch.device) -> list[TaskAccuracy]:
    """Accuracy on each task. TIL: argmax over the task's classes; CIL: argmax over all rows of the head, which stand
    for the classes of the fleet's streams."""
    if method.network.training:
        method.network.eval()
    results = []
    with kept_scratch(), autocast(scenario, device):  # autocast once: it rounds every weight anew
        for task in tasks:
            samples = task.tested_on(scenario.stream.evaluate_on)
            classes = torch.tensor(task.rows, device=device)
            til = cil = 0
            for batch in samples.batches(evaluation_batch(scenario)):
                batch = batch.to(device)
                logits = method.predict(batch).float()
                til += int((classes[logits[:, classes].argmax(1)] == batch.labels).sum())
                cil += int((logits.argmax(1) == batch.labels).sum())
            count = len(samples)
            results.append(TaskAccuracy(til / count if count else 0.0, cil / count if count else 0.0, count))
    return results


def autocast(scenario: Scenario, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=scenario.device.precision == "bf16")


OnEpoch = Callable[[int, int, float], None]
"""Called after every epoch with the task, the number of its epochs done, and the mean loss."""

"""Trains a network on a labeled image source: the frozen prefix, and the initial weights of the suffix."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from lightcl.data.augment import random_crop_flip
from lightcl.data.sources import ImageSet, Source, iter_batches
from lightcl.device.training import TrainingFailure
from lightcl.errors import RequestError
from lightcl.networks.resnet import StagedResNet, Stem
from lightcl.networks.weights import load_weights, save_weights
from lightcl.storage.state import under


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum, crop and flip; learning rate and momentum follow one cycle (Smith 2018)."""

    width: int = 20
    stem: Stem = "cifar"
    epochs: int = 12
    batch_size: int = 128
    peak_learning_rate: float = 0.2
    max_momentum: float = 0.95
    base_momentum: float = 0.85
    weight_decay: float = 5e-4
    bf16: bool = True
    flip: bool = True
    seed: int = 0


@dataclass(frozen=True)
class EpochReport:
    epoch: int
    epochs: int
    loss: float
    accuracy: float
    seconds: float


def pretrain(
    source: Source, recipe: Recipe, file: Path, *, data: str, command: str, report: Callable[[EpochReport], None]
) -> float:
    """Trains on `source.train`, writes `file` (fp16 safetensors) and its model card; returns the test accuracy in 0..1.

    `data` and `command` go into the card. A killed run continues from the last finished epoch. Raises RequestError
    before training for a recipe that cannot be carried out and a file that cannot be written.
    """
    if file.suffix != ".safetensors":
        raise RequestError(f"--out: {file} should end in .safetensors")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)
    network = StagedResNet(
        width=recipe.width, classes=len(source.classes), in_channels=source.channels, stem=recipe.stem, freeze="none"
    ).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=recipe.max_momentum, nesterov=True, weight_decay=recipe.weight_decay
    )
    steps = len(source.train) // recipe.batch_size
    if steps == 0:
        raise RequestError(f"{len(source.train)} training images are fewer than one batch of {recipe.batch_size}")
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.peak_learning_rate,
        recipe.epochs * steps,
        max_momentum=recipe.max_momentum,
        base_momentum=recipe.base_momentum,
    )
    shape = "x".join(map(str, source.train.images.shape))
    facts = {"data": data, "images": shape, "classes": str(len(source.classes))} | {
        k: str(v) for k, v in asdict(recipe).items()
    }
    checkpoint = file.with_suffix(".checkpoint")
    first = 0
    if checkpoint.exists():
        try:
            with safe_open(checkpoint, "pt") as stored:
                before = stored.metadata()
        except (OSError, SafetensorError) as error:
            raise RequestError(
                f"{checkpoint}: not the checkpoint of a killed run ({error}); remove it or name another --out"
            ) from error
        if before != facts:
            raise RequestError(f"{checkpoint}: left by a run with another recipe; remove it or name another --out")
        first = _resume(checkpoint, network, optimizer, schedule, steps)
    _check_place(file)

    accuracy = 0.0
    for epoch in range(first, recipe.epochs):
        start = time.monotonic()
        generator = torch.Generator().manual_seed(recipe.seed * 1000 + epoch)
        order = torch.randperm(len(source.train), generator=generator).numpy()
        network.train()
        total = 0.0
        for step in range(steps):
            members = np.sort(order[step * recipe.batch_size : (step + 1) * recipe.batch_size])
            images = random_crop_flip(torch.from_numpy(source.train.images[members]), generator, flip=recipe.flip)
            labels = torch.from_numpy(source.train.labels[members]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                logits = network(images.to(device).permute(0, 3, 1, 2))
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item()
            if not isfinite(total):
                raise TrainingFailure(
                    f"epoch {epoch + 1}: the loss is no longer finite, no weights were written; try a lower learning "
                    f"rate than {recipe.peak_learning_rate:g}"
                )
        accuracy = top1(network, source.test, recipe.bf16)
        _save_checkpoint(checkpoint, network, optimizer, epoch + 1, facts)
        report(EpochReport(epoch + 1, recipe.epochs, total / steps, accuracy, time.monotonic() - start))

    save_weights(network, file, facts | {"command": command})
    load_weights(network, file, head=True)  # the card reports the accuracy of the stored weights, rounded to fp16
    accuracy = top1(network, source.test, bf16=False)
    file.with_suffix(".md").write_text(_card(file, recipe, source, data, command, accuracy))
    checkpoint.unlink(missing_ok=True)
    return accuracy


@torch.no_grad()
def top1(network: StagedResNet, images: ImageSet, bf16: bool) -> float:
    """Share of images whose highest logit is their label, in evaluation mode."""
    network.eval()
    device = next(network.parameters()).device
    hits = 0
    for batch, labels in iter_batches(images, 500):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = network(torch.from_numpy(batch.copy()).to(device).permute(0, 3, 1, 2))
        hits += int((logits.argmax(1).cpu().numpy() == labels).sum())
    return hits / len(images)


def _check_place(file: Path) -> None:
    """Creates the folder and checks that it is writable, before hours of training."""
    if file.is_dir():
        raise RequestError(f"--out: {file} is a folder, not a file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise RequestError(f"--out: {file} cannot be written to ({error.strerror}); name another file") from error


def _save_checkpoint(
    file: Path, network: StagedResNet, optimizer: torch.optim.SGD, epoch: int, facts: dict[str, str]
) -> None:
    tensors: dict[str, Tensor] = {f"network.{k}": v.contiguous() for k, v in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"].contiguous()
    temporary = file.with_suffix(".partial")
    save_file(tensors | {"epoch": torch.tensor(epoch)}, temporary, metadata=facts)
    temporary.replace(file)


def _resume(
    file: Path,
    network: StagedResNet,
    optimizer: torch.optim.SGD,
    schedule: torch.optim.lr_scheduler.OneCycleLR,
    steps: int,
) -> int:
    tensors = load_file(file)
    epoch = int(tensors.pop("epoch"))
    network.load_state_dict(under(tensors, "network."))
    for name, parameter in network.named_parameters():
        optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"].to(parameter.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the steps were taken in the process that was killed
        for _ in range(epoch * steps):
            schedule.step()
    return epoch


def _card(file: Path, recipe: Recipe, source: Source, data: str, command: str, accuracy: float) -> str:
    lines = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in asdict(recipe).items())
    return f"""# {file.stem}

ResNet-18 of width {recipe.width} ({recipe.stem} stem, {source.channels} input channel(s)), fp16 safetensors,
{file.stat().st_size / 1e6:.2f} MB. For research use: the training images have their own terms of use.

- Data: {data}; {len(source.train):,} training and {len(source.test):,} test images of
  {source.train.images.shape[1]}x{source.train.images.shape[2]} pixels, {len(source.classes)} classes.
- Top-1 accuracy on the test split, with the stored fp16 weights: **{accuracy:.2%}**.
- Command: `{command}`

| recipe | |
|---|---|
{lines}
"""

"""Toy images, networks, scenarios and devices: everything as small as the code allows."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightcl.data.partition import Share
from lightcl.data.sources import ImageSet, Source
from lightcl.data.tasks import Samples, Task, TaskContext
from lightcl.device.device import EdgeDevice
from lightcl.device.metering import Board
from lightcl.networks.native.library import COMPILERS
from lightcl.networks.resnet import StagedResNet
from lightcl.scenario import Scenario
from lightcl.storage.state import CHECKSUM, MANIFEST

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C compiler")


def image_set(labels: Sequence[int], classes: int, *, size: int = 8, channels: int = 3, seed: int = 0) -> ImageSet:
    """Noise around a pattern of its class, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    patterns = np.random.default_rng(99).integers(60, 196, (classes, size, size, channels))
    noise = generator.integers(-50, 51, (len(labels), size, size, channels))
    images = np.clip(patterns[list(labels)] + noise, 0, 255).astype(np.uint8)
    return ImageSet(images, np.asarray(labels, dtype=np.int64), tuple(f"class {i}" for i in range(classes)))


def source(classes: int = 4, train: int = 20, test: int = 5, **picture: int) -> Source:
    """`train` and `test` images of every class, the classes taking turns."""
    return Source(
        image_set(list(range(classes)) * train, classes, seed=1, **picture),
        image_set(list(range(classes)) * test, classes, seed=2, **picture),
    )


def whole(images: Source) -> Share:
    """Everything belongs to one device."""
    return Share(np.arange(len(images.train)), np.arange(len(images.test)))


def network(*, seed: int = 0, **options: Any) -> StagedResNet:
    """Width 4; batch-norm statistics and affine parameters are drawn too, so that confusing them shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = StagedResNet(**{"width": 4, "classes": 4} | options)
        randomise_norms_(built)
    return built


def randomise_norms_(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.2)
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 1.5)


def images(count: int, *, size: int = 8, channels: int = 3, seed: int = 0) -> Tensor:
    """uint8 noise `[N, C, H, W]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def scenario(**sections: Any) -> Scenario:
    """Two tasks of two classes, two epochs, batches of 8, width 4 and no weights; sections are merged over that.

    A method that is named replaces the section.
    """
    values: dict[str, dict[str, Any]] = {
        "data": {"augmentation": "crop-flip", "crop_padding": 1},
        "stream": {"tasks": 2, "classes_per_task": 2},
        "fleet": {"devices": 1},
        "network": {"weights": "none", "width": 4},
        "method": {"name": "lightcl", "beta": 0.001, "memory_size": 5},
        "training": {"epochs": 2, "batch_size": 8},
        "device": {"accelerator": "cpu"},
    }
    plain = {key: value for key, value in sections.items() if not isinstance(value, Mapping)}
    if "name" in sections.get("method", {}):
        values["method"] = {}
    nested = {key: values.get(key, {}) | value for key, value in sections.items() if isinstance(value, Mapping)}
    return Scenario.model_validate(values | nested | plain)


def device(folder: Path, number: int = 0, board: Board | None = None, **sections: Any) -> EdgeDevice:
    """A device that holds all of `source(size=16)`: layer4 still has 2x2 positions."""
    held = source(size=16)
    return EdgeDevice(scenario(**sections), number, folder, source=held, share=whole(held), board=board)


def task(number: int, classes: Sequence[int], held: Source | None = None) -> Task:
    """All samples of some classes; every tenth training sample is held out."""
    held = held or source()
    train = np.flatnonzero(np.isin(held.train.labels, classes))
    test = np.flatnonzero(np.isin(held.test.labels, classes))
    out = train[::10]
    return Task(
        number,
        tuple(sorted(classes)),
        Samples(held.train, np.setdiff1d(train, out)),
        Samples(held.train, out),
        Samples(held.test, test),
    )


def context(number: int, classes: Sequence[int], seen: Sequence[int] | None = None, seed: int = 5) -> TaskContext:
    known = sorted(seen if seen is not None else classes)
    held = task(number, classes)
    return TaskContext(
        held, torch.tensor(sorted(classes)), torch.tensor(known), 8, seed, CPU, augmentation="crop-flip", padding=1
    )


def edit_manifest_(folder: Path, name: str = MANIFEST, **changes: Any) -> None:
    """Changes keys of a state's manifest and signs it, as only its own code would."""
    values = json.loads((folder / name).read_text()) | changes
    del values[CHECKSUM]
    (folder / name).write_text(json.dumps(values | {CHECKSUM: zlib.crc32(json.dumps(values).encode())}))


def copy_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same names, and bit-identical tensors."""
    assert given.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(given[name], expected[name])]
    assert different == []


def changed(given: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that are not what they were."""
    assert given.keys() == before.keys()
    return {name for name in before if not torch.equal(given[name], before[name])}

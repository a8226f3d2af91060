"""An exported file, compared with the device's own answers in PyTorch before it gets its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lightcl.data.images import Source
from lightcl.errors import Failure, RequestError, one_line
from lightcl.export.formats import Run, export_module, find_format, metadata
from lightcl.export.model import BATCH, Model
from lightcl.seeds import numpy_generator
from lightcl.storage.files import sync, writable

LARGEST = 1e-4
"""Largest difference of a score between the file and PyTorch; scores are in 0..1."""


@dataclass(frozen=True)
class Comparison:
    """The file against PyTorch on `images` images: the largest difference of a score, and equal predictions."""

    images: int
    largest: float
    same: int

    @property
    def passed(self) -> bool:
        return self.images > 0 and self.largest <= LARGEST and self.same == self.images  # a NaN is not <=


def real_images(source: Source, count: int, seed: int) -> np.ndarray:
    """Up to `count` images, uint8 `[N, H, W, C]`: test images in a seeded order, then training images."""
    parts, left = [], count
    for name, split in (("test", source.test), ("train", source.train)):
        chosen = numpy_generator(seed, "export", name).permutation(len(split))[:left]
        parts.append(np.asarray(split.images[np.sort(chosen)]))
        left -= len(chosen)
    return np.concatenate(parts)


def export(model: Model, format_name: str, file: Path, images: np.ndarray) -> Comparison:
    """Writes the file and compares it on real `images` (uint8 `[N, H, W, C]`); nothing is left of a file that fails.

    Raises RequestError for a format, a folder or images that are not allowed, MissingLibrary where a library is
    missing, Failure where the file answers otherwise than PyTorch.
    """
    kind = find_format(format_name)
    if not len(images):
        raise RequestError("there are no images to check the exported file on; give at least one")
    network = export_module(model)
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.partial{kind.suffix}")
    example = torch.zeros(2, *_shape(model))  # with one image, exporters take the batch for a constant
    with writable(file, "--out"):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # before the work: exporters raise errors of their own where they cannot write
    try:
        with writable(file, "--out"), _other_errors(format_name):
            kind.write(network, example, temporary, metadata(model))
            compared = compare(model, kind.open(temporary, network), images)
        if not compared.passed:
            raise Failure(
                f"the {format_name} file does not answer as PyTorch does: the largest difference of a score is "
                f"{compared.largest:.1e} (allowed: {LARGEST:.0e}), {compared.same} of {compared.images} predictions "
                "are the same; it was not kept"
            )
        with writable(file, "--out"):
            sync(temporary)
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return compared


def compare(model: Model, run: Run, images: np.ndarray) -> Comparison:
    """The scores of the file against those of the model: all images in batches, and the first one alone."""
    expected = model.scores(images)
    floats = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 255
    with torch.no_grad():
        found = np.concatenate([np.asarray(run(part)) for part in torch.split(floats, BATCH)])
        alone = np.asarray(run(floats[:1]))
    largest = max(float(np.abs(found - expected).max()), float(np.abs(alone - expected[:1]).max()))
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    return Comparison(len(images), largest, same)


@contextmanager
def _other_errors(format_name: str) -> Iterator[None]:
    """Makes a Failure of what an exporter or a runtime raises: each has its own errors, without a common base."""
    try:
        yield
    except (RequestError, Failure, OSError):
        raise
    except Exception as error:
        raise Failure(
            f"the model cannot be written or run as {format_name} ({type(error).__name__}: {one_line(str(error))}); "
            "try another --format"
        ) from error


def _shape(model: Model) -> tuple[int, int, int]:
    return model.about.channels, model.about.height, model.about.width

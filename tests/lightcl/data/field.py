"""A field's folder for tests: small real images, and a plan that takes them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightcl.data.field import FieldPlan, FieldTasks


def draw(file: Path, number: int, side: int = 12) -> Path:
    """An image file that no other number has; classes differ in their brightness by the folder's name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 90, (side, side, 3))
    pixels[..., len(file.parent.name) % 3] += 120
    Image.fromarray(pixels.astype(np.uint8)).save(file)
    return file


def drop(folder: Path, label: str, numbers: range) -> list[Path]:
    """Images with these numbers in the folder of a class."""
    return [draw(folder / label / f"{number:04d}.png", number) for number in numbers]


def plan(folder: Path, **changes: Any) -> FieldPlan:
    """Two classes, 10 images per task, a fifth of them to test on, none held out."""
    values: dict[str, Any] = {
        "path": str(folder), "classes": ("cup", "bottle"), "device": 0, "tasks": 3, "ready_images": 10,
        "ready_after": None, "min_samples": 2, "min_classes": 2, "image_size": 8, "test_fraction": 0.2,
        "held_out": 0.0, "evaluate_on": "test", "keep": "all", "seed": 0, "joint": False,
    }  # fmt: skip
    return FieldPlan(**{**values, **changes})


def later() -> float:
    """A clock by which files that are written now are complete."""
    return time.time() + 60


def tasks(state: Path, folder: Path, **changes: Any) -> FieldTasks:
    """As a process that has just started opens them."""
    return FieldTasks(state, plan(folder, **changes), clock=later)

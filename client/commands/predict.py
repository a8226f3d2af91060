"""`lightcl device predict`: the class of images, by the newest finished model of this board. Light at import."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.commands.shared import state_folder
from lightcl.errors import RequestError

if TYPE_CHECKING:
    import numpy as np

    from lightcl.export.model import Model

From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="FOLDER",
        help="A run folder, a device's state folder or the folder above it; default: this board's state folder",
    ),
]
DeviceNumber = Annotated[
    int | None,
    typer.Option("--device", min=0, help="Number of the device; default: 0 of a run, the newest state of a board"),
]


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...")],
    folder: From = None,
    device: DeviceNumber = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON")] = False,
) -> None:
    """Classify image files with the newest finished model of a device, also while it trains.

    Prints the class of each image, its score (the softmax over all classes) and the model's version.
    """
    import numpy as np

    from lightcl.export.folders import find_model
    from lightcl.export.model import read_model
    from lightcl.storage.state import StateError

    place = find_model(state_folder(folder), device)
    try:
        model = read_model(*place)
    except StateError as error:  # no run was started, so none has failed
        raise RequestError(str(error)) from error
    pictures = np.stack([model.read_image(str(image), str(image)) for image in images])
    answers = [answer(model, scores) for scores in model.scores(pictures)]
    if as_json:
        rows = [{"image": str(image)} | found for image, found in zip(images, answers, strict=True)]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    width = max(len(str(image)) for image in images)
    for image, found in zip(images, answers, strict=True):
        sys.stdout.write(f"{image!s:<{width}}  {found['class']}  {found['score']:.1%}\n")
    sys.stdout.write(f"model: device {place.about.device}, {model.label}\n")


def answer(model: Model, scores: np.ndarray) -> dict[str, Any]:
    """The most likely class, its score in 0..1, and the model's version."""
    best = int(scores.argmax())
    return {
        "class": model.about.classes[best],
        "score": float(scores[best]),
        "model": model.version_values,
    }

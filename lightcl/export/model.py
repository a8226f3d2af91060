"""A device's model as its state folder holds it, read-only: images in, a score per class out.

Reading needs no images, takes no lock and changes nothing, so it works while the device trains: a state is committed by
one rename, and its files have checksums.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightcl.assembly import build_network
from lightcl.data.images import Source
from lightcl.data.sources.decoding import decode, fitted
from lightcl.data.tasks import Batch
from lightcl.device.state import DeviceValues, Position, changing_tensors
from lightcl.errors import RequestError
from lightcl.methods import Method
from lightcl.networks.pruning import channel_digest
from lightcl.networks.staged import Backbone
from lightcl.networks.weights import digest
from lightcl.scenario import Scenario, scenario_from_json
from lightcl.scenario.digest import state_digest
from lightcl.storage.files import write_atomically
from lightcl.storage.state import Damaged, StateError, StateFolder, Stored, under

DESCRIPTION = "model.json"
"""What a board writes beside its state, so that the model can be read without the server and without images."""
BATCH = 64
"""Images that are computed at a time."""


@dataclass(frozen=True)
class Description:
    """Everything that a model needs besides the state. `classes` are the names of the head's rows; sizes in pixels."""

    scenario: Scenario
    device: int
    classes: tuple[str, ...]
    height: int
    width: int
    channels: int

    @classmethod
    def of(cls, scenario: Scenario, device: int, source: Source, head: Sequence[int]) -> Description:
        """`head` are the classes of the head's rows, as the source numbers them."""
        height, width, channels = source.train.images.shape[1:]
        return cls(scenario, device, tuple(source.classes[label] for label in head), height, width, channels)

    def write(self, folder: Path, *, durable: bool = True) -> None:
        """Writes `DESCRIPTION` unless it is there already. Raises OSError where the disk refuses it."""
        values = {
            "device": self.device, "classes": list(self.classes), "height": self.height, "width": self.width,
            "channels": self.channels, "scenario": self.scenario.model_dump(mode="json"),
        }  # fmt: skip
        file, text = folder / DESCRIPTION, json.dumps(values)
        if not file.exists() or file.read_text(encoding="utf-8", errors="replace") != text:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, text, durable=durable)

    @classmethod
    def read(cls, folder: Path) -> Description:
        """The description in a device's state folder. Raises RequestError for a file that is none."""
        file = folder / DESCRIPTION
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            scenario = scenario_from_json(json.dumps(values["scenario"]), str(file))
            sizes = [int(values[key]) for key in ("height", "width", "channels")]
            return cls(scenario, int(values["device"]), tuple(map(str, values["classes"])), *sizes)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f"{file}: not the description of a model ({type(error).__name__}: {error}); it is written again with "
                "the next message of the server"
            ) from error


class Model:
    """A network with its head at one point of its stream, on the CPU and in fp32."""

    def __init__(self, about: Description, method: Method, values: DeviceValues) -> None:
        self.about, self.method = about, method
        self.network = method.network
        self.position: Position = values.position
        self.version = values.version
        done = values.report and Position(values.report.task, values.report.epochs)
        self.finished = done == values.position
        """Whether the training that the server asked for was done; not at a checkpoint in the middle of it."""

    @property
    def label(self) -> str:
        """The version for people: `task 2, epoch 5 of 5`."""
        text = f"task {self.position.task}, epoch {self.position.epochs} of {self.about.scenario.training.epochs}"
        return text if self.finished else f"{text}, in training"

    @property
    def version_values(self) -> dict[str, Any]:
        """The version for programs; `shared` counts the tensors that the server has sent."""
        return {
            "device": self.about.device, "task": self.position.task, "epochs": self.position.epochs,
            "shared": self.version, "finished": self.finished,
        }  # fmt: skip

    def read_image(self, content: str | bytes, place: str) -> np.ndarray:
        """An image file (path or bytes) as uint8 `[H, W, C]` of the size that the model was trained on.

        Decoded and resized as the images of a source are. Raises RequestError naming `place`.
        """
        return fitted(decode(content, place, None), self.about.height, self.about.width, self.about.channels)

    def scores(self, images: np.ndarray) -> np.ndarray:
        """The softmax over all classes, float32 `[N, classes]`; `images` is uint8 `[N, H, W, C]`."""
        found = [self._scores(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return np.concatenate(found) if found else np.empty((0, len(self.about.classes)), dtype=np.float32)

    @torch.no_grad()
    def _scores(self, images: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)  # a copy: a decoded image is read-only
        logits = self.method.predict(Batch(tensor, torch.zeros(len(tensor), dtype=torch.int64)))
        scores: np.ndarray = logits.float().softmax(1).numpy()
        return scores


def read_model(about: Description, folder: Path) -> Model:
    """The newest finished model of a state folder: of its two generations, else the newest.

    Raises RequestError where nothing was trained yet and for a method that needs to know the task, StateError for a
    state that cannot be read or is not that of the description.
    """
    scenario = about.scenario
    if "cil" not in scenario.method.settings:
        raise RequestError(
            f"method {scenario.method.name} answers only where the task of an image is known, so there is no one model "
            "to use outside a run"
        )
    states = StateFolder(folder)
    stored = states.load()
    if stored is None or _values(stored).report is None:
        raise RequestError(f"{folder}: device {about.device} has trained nothing yet, so there is no model")
    newest = _model(about, stored, folder)
    if not newest.finished and (older := states.load_previous()) is not None:
        before = _model(about, older, folder)
        return before if before.finished else newest
    return newest


def _values(stored: Stored) -> DeviceValues:
    return DeviceValues.of(stored.values)


def _model(about: Description, stored: Stored, folder: Path) -> Model:
    scenario, values = about.scenario, _values(stored)
    network = build_network(scenario, in_channels=about.channels, classes=len(about.classes))
    for name, found, expected in (
        ("device", values.device, about.device),
        ("scenario", values.scenario, state_digest(scenario)),
        ("frozen prefix", values.prefix, digest(network.prefix)),
        ("channels", values.channels, channel_digest(network)),
    ):
        if found != expected:
            raise StateError(f"{folder}: the state's {name} is {found}, expected {expected}: it belongs to another run")
    if stored.lost:
        raise StateError(
            f"{folder}: the state refers to tensors that all devices shared ({stored.lost.name}), and a newer version "
            "has replaced them; choose a device that took part in the last round"
        )
    method = scenario.method.build(network)
    try:
        _adopt_(network, method, stored.tensors)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise Damaged(f"{folder}: the tensors are not those of this network ({reason})") from error
    network.eval()
    network.requires_grad_(False)
    return Model(about, method, values)


def _adopt_(network: Backbone, method: Method, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, target in changing_tensors(network).items():
            target.copy_(tensors[f"network/{name}"])
    method.load_state_dict(under(tensors, "method/"))

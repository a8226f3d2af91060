"""The Python interface for notebooks and scripts: open one device, train it task by task, test it, read its matrices.

    import lightcl

    scenario = lightcl.load_scenario("quickstart", {"training.epochs": 2})
    with lightcl.open_device(scenario) as device:
        for task in device.tasks:
            print(device.learn(task).loss, device.evaluate().til)
        print(device.matrix("til").values)

The numbers equal those of `lightcl train` with the same scenario and device. docs/reference/python.md describes all
public names; `lightcl/__init__.py` imports them on first use.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from lightcl.data.images import ImageSet, Source
from lightcl.data.partition import Share
from lightcl.data.tasks import Batch, Task
from lightcl.device.arithmetic import with_arithmetic
from lightcl.device.device import EdgeDevice
from lightcl.device.training import OnEpoch, autocast, evaluation_batch
from lightcl.errors import RequestError
from lightcl.exchange.messages import Tested, Trained
from lightcl.methods import Method
from lightcl.metrics import AccuracyMatrix
from lightcl.networks.staged import Backbone
from lightcl.scenario import Scenario


class OpenDevice:
    """One device of the fleet in this process. `edge` is the `EdgeDevice` that does the work.

    Without a folder its state lives in a temporary one, which `close`, the end of a `with` block or the end of the
    program removes.
    """

    def __init__(
        self,
        scenario: Scenario,
        number: int = 0,
        folder: str | Path | None = None,
        source: Source | None = None,
        share: Share | None = None,
    ) -> None:
        if not 0 <= number < scenario.fleet.devices:
            raise RequestError(f"device number is {number}; allowed: 0 to {scenario.fleet.devices - 1}")
        if scenario.method.sums_statistics:
            raise RequestError(
                "method.share_statistics needs a fleet, whose server adds up the sums: use simulations.run_fleet, or "
                "set it to false"
            )
        self.scenario, self.number = with_arithmetic(scenario), number
        self._temporary = tempfile.TemporaryDirectory(prefix="lightcl-") if folder is None else None
        self.folder = Path(self._temporary.name if self._temporary is not None else folder or ".")
        try:
            self.edge = EdgeDevice(self.scenario, number, self.folder, source=source, share=share)
        except BaseException:
            self.close()
            raise

    @property
    def tasks(self) -> Sequence[Task]:
        """The tasks to learn, in order, each with `id`, `classes`, `train`, `held_out` and `test`.

        Under joint training this is one task, which holds all images.
        """
        stream = self.edge.stream
        return [stream.to_learn(position) for position in range(stream.first, len(stream))]

    @property
    def network(self) -> Backbone:
        """The network, on the device's accelerator."""
        return self.edge.network

    @property
    def method(self) -> Method:
        """The method with what it keeps between tasks."""
        return self.edge.method

    def learn(self, task: Task | int, epochs: int | None = None, on_epoch: OnEpoch | None = None) -> Trained:
        """Trains a task (of `tasks`, or its id) until `epochs` of its epochs are done; default: all of them.

        Only a task with all epochs done is finished, so that the next one can begin; `learn` may be called again to go
        on. The state is saved at the end. `on_epoch(task, epochs done, mean loss)` is called after every epoch.
        Raises RequestError for a task that the device does not have, OutOfStep where it is not the turn of the task,
        TrainingFailure where the loss is no longer a number.
        """
        number = self.edge.stream.ids[self._position(task)]
        return self.edge.train(number, self.scenario.training.epochs if epochs is None else epochs, on_epoch)

    def evaluate(self) -> Tested:
        """Tests all tasks learned so far, keeps the row of the accuracy matrices, and saves the state."""
        return self.edge.evaluate()

    def matrix(self, setting: str = "til") -> AccuracyMatrix:
        """The accuracy matrix so far: `values[t, k]` is the accuracy on task k after task t, NaN where not tested.

        `setting` is "til" (task known) or "cil" (task not known).
        """
        if setting not in self.edge.rows:
            raise RequestError(f"setting is {setting!r}; allowed: {', '.join(self.edge.rows)}")
        return self.edge.matrix(setting)

    def predict(self, images: np.ndarray, task: Task | int | None = None) -> np.ndarray:
        """The class of each image, as the source numbers it, int64 `[N]`.

        The answer is one of the classes of the fleet's streams, or of those of `task` where it is known. `images` is
        uint8 `[N, H, W, C]`, or `[N, H, W]` for gray ones, of the size that the device was trained on.
        """
        logits, head = self.logits(images), np.asarray(self.edge.stream.head)
        if task is None:
            found: np.ndarray = head[logits.argmax(1)]
            return found
        rows = np.asarray(self.edge.stream.to_learn(self._position(task)).rows)
        chosen: np.ndarray = head[rows[logits[:, rows].argmax(1)]]
        return chosen

    def logits(self, images: np.ndarray) -> np.ndarray:
        """The method's logits, float32 `[N, rows]`; images as for `predict`.

        The head has a row for every class of the fleet's streams: row r is class `edge.stream.head[r]` of the source.
        """
        pictures = _pictures(images)
        if pictures.shape[3] != self.network.in_channels:
            raise RequestError(
                f"the images have {pictures.shape[3]} channels; the device was trained on {self.network.in_channels}"
            )
        tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        size = evaluation_batch(self.scenario)
        self.network.eval()
        found = []
        with torch.no_grad(), autocast(self.scenario, self.edge.accelerator):
            for part in torch.split(tensor, size) if len(tensor) else ():
                batch = Batch(part, torch.zeros(len(part), dtype=torch.int64)).to(self.edge.accelerator)
                found.append(self.method.predict(batch).float().cpu())
        classes = self.edge.stream.head_classes
        return torch.cat(found).numpy() if found else np.empty((0, classes), dtype=np.float32)

    def close(self) -> None:
        """Removes the temporary folder, if the device has one."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        here = self.edge.position
        return (
            f"<device {self.number}: method {self.scenario.method.name}, {len(self.tasks)} tasks, "
            f"{here.epochs} of {self.scenario.training.epochs} epochs of task {here.task} done>"
        )

    def _position(self, task: Task | int) -> int:
        """The place of a task in the device's stream. Raises RequestError."""
        wanted = task if isinstance(task, int) else task.id
        stream = self.edge.stream
        if wanted not in stream.ids:
            ids = ", ".join(map(str, stream.ids))
            raise RequestError(f"device {self.number} has no task {wanted} (allowed: {ids})")
        return stream.ids.index(wanted)


def open_device(
    scenario: Scenario,
    number: int = 0,
    folder: str | Path | None = None,
    source: Source | None = None,
    share: Share | None = None,
) -> OpenDevice:
    """Device `number` of the scenario's fleet, in this process and without Flower.

    `folder` keeps its state; a device that is opened on it again continues where it was. `source` replaces the images
    that `data.source` names (`source_from_arrays` makes one); then give `data.augmentation` too, since `auto` follows
    `data.source`. `share` names the device's images instead of the partition. Raises RequestError for a scenario that
    cannot be carried out, StateError for a folder of another scenario.
    """
    return OpenDevice(scenario, number, folder, source, share)


def source_from_arrays(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    classes: Sequence[str] | None = None,
) -> Source:
    """A data source from arrays: images uint8 `[N, H, W, C]` or `[N, H, W]`, labels integers `[N]` from 0 on.

    `classes` are the names of the classes; default: their numbers. Raises RequestError for other shapes or types, and
    for labels without a class.
    """
    labels = {"train": _labels("train", train_labels), "test": _labels("test", test_labels)}
    images = {"train": _pictures(train_images, "train images"), "test": _pictures(test_images, "test images")}
    if not len(images["train"]):
        raise RequestError("there are no training images")
    if images["train"].shape[1:] != images["test"].shape[1:]:
        raise RequestError(
            f"the training images are {list(images['train'].shape[1:])}, the test images "
            f"{list(images['test'].shape[1:])}; all must have one size"
        )
    for split in images:
        if len(images[split]) != len(labels[split]):
            raise RequestError(f"{len(images[split])} {split} images have {len(labels[split])} labels")
    highest = max(int(part.max(initial=-1)) for part in labels.values())
    names = tuple(classes) if classes is not None else tuple(str(number) for number in range(highest + 1))
    if highest >= len(names):
        raise RequestError(f"label {highest} has no class: {len(names)} classes are named, from 0 on")
    return Source(*(ImageSet(images[split], labels[split], names) for split in ("train", "test")))


def _pictures(images: np.ndarray, name: str = "images") -> np.ndarray:
    """Images as uint8 `[N, H, W, C]`. Raises RequestError."""
    pictures = np.asarray(images)
    if pictures.ndim == 3:
        pictures = pictures[..., None]
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] not in (1, 3):
        raise RequestError(
            f"{name}: {np.asarray(images).dtype} {list(np.shape(images))}; allowed: uint8 [N, H, W], [N, H, W, 1] or "
            "[N, H, W, 3]"
        )
    return np.ascontiguousarray(pictures)


def _labels(split: str, given: np.ndarray) -> np.ndarray:
    """Labels as int64 `[N]`. Raises RequestError."""
    labels = np.asarray(given)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or (labels < 0).any():
        raise RequestError(f"{split} labels: {labels.dtype} {list(labels.shape)}; allowed: integers [N] from 0 on")
    return labels.astype(np.int64)

"""The one typed configuration: read and checked once, at the edge; everything behind it gets typed values.

Defaults are the paper's values where it names one (Split CIFAR-10: 50 epochs, batch 32, SGD 0.01, 10 % held out).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lightcl.data.augment import Augmentation
from lightcl.data.sources import SourceName, SourceRequest
from lightcl.errors import shown
from lightcl.methods import AnyMethod, LightCLParameters
from lightcl.methods.base import Setting
from lightcl.networks.resnet import Stem
from lightcl.scenario.yaml_text import Dumper

StrategyName = Literal["FedAvg", "FedAvgM", "FedAdam", "FedAdagrad", "FedYogi", "FedMedian", "FedTrimmedAvg"]

NAMED_WEIGHTS = ("builtin", "imagenet", "none")
"""What `network.weights` may be beside a file."""


class Section(BaseModel):
    # strict: neither true nor '2' nor 2.0 is the integer 2 (an integer is a float all the same).
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Data(Section):
    source: SourceName = "digits"
    """digits ships with scikit-learn; cifar10, cifar100 and fashion-mnist are downloaded; the others are your files."""
    path: Path | None = Field(default=None, strict=False)
    """Your parquet file or image folder; for the downloaded sets, the folder that holds (or gets) the copy."""
    image_size: int | None = Field(default=None, ge=8, le=1024)
    """Bring all images to this many pixels a side; default: as they are."""
    image_column: str | None = None
    """Parquet: the column of encoded images; default: img or image."""
    label_column: str | None = None
    """Parquet: the column of labels; default: label."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of every class that becomes the test split where the source brings none."""
    download: bool = True
    """Whether a data set that is not there may be downloaded."""
    augmentation: Literal["auto", Augmentation] = "auto"
    """crop-flip: random crop and horizontal flip (the paper); crop: no flip; auto: crop-flip, but none on digits,
    which a flip would change."""
    crop_padding: int = Field(default=4, ge=0, lt=1024)
    """Black pixels around an image that its random crop is taken from; fewer than the image's side."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path is not None and self.source == "digits":
            raise ValueError(
                "data.path is given, but data.source is digits, which ships with scikit-learn; name another "
                "data.source, or leave data.path out"
            )
        for key in ("image_column", "label_column"):
            if getattr(self, key) is not None and self.source != "parquet":
                raise ValueError(f"data.{key} is for data.source: parquet, not {self.source}; leave it out")
        return self


class Stream(Section):
    tasks: int = Field(default=5, ge=1, le=100_000)
    """Tasks of a stream, met one after the other."""
    classes_per_task: int = Field(default=2, ge=1, le=100_000)
    """The source needs tasks x classes_per_task classes."""
    class_order: Literal["natural", "shuffled"] | tuple[int, ...] = "natural"
    """natural: as numbered in the source; shuffled: by the seed; or a list of class numbers."""
    per_device_order: bool = False
    """With `shuffled`: every device meets the classes in an order of its own."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of every task's training samples kept out of training."""
    evaluate_on: Literal["test", "held-out"] = "test"
    """test: the test split, for reports; held-out: the training samples kept out, to choose hyperparameters on."""
    settings: Literal["auto", "til", "til+cil"] = "auto"
    """Test with the task known (til), or also with it not known (cil); auto: all that the method can be tested for."""

    @field_validator("class_order", mode="before")
    @classmethod
    def _check_class_order(cls, given: object) -> object:
        """One error in place of one for every member of the union, each of which knows half of what is allowed."""
        if given in ("natural", "shuffled"):
            return given
        listed = given if isinstance(given, list | tuple) else ()
        if not listed or not all(type(c) is int and c >= 0 for c in listed) or len(set(listed)) < len(listed):
            raise ValueError(
                f"stream.class_order is {shown(given)}; allowed: natural, shuffled, or a list of different class "
                "numbers (from 0 on)"
            )
        return tuple(listed)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.per_device_order and self.class_order != "shuffled":
            given = "a list" if isinstance(self.class_order, tuple) else self.class_order
            raise ValueError(f"stream.per_device_order needs stream.class_order: shuffled, not {given}")
        if self.evaluate_on == "held-out" and self.held_out == 0:
            raise ValueError("stream.evaluate_on: held-out needs stream.held_out above 0")
        return self


class Fleet(Section):
    devices: int = Field(default=10, ge=1, le=100_000)
    """Devices of the fleet; the training images are shared out among all of them."""
    partition: Literal["iid", "dirichlet", "pathological"] = "iid"
    """iid: equal random shares; dirichlet: shares of each class by `alpha`; pathological: `classes_per_device` each."""
    alpha: float = Field(default=0.5, gt=0, le=1e6)
    """Dirichlet concentration: the smaller, the more the devices' class shares differ."""
    classes_per_device: int | None = Field(default=None, ge=1, le=100_000)
    """Pathological: how many classes a device holds; default: as many as its stream needs."""
    test_data: Literal["share", "whole"] = "share"
    """Test images of its classes a device is tested on. share: its part of them; whole: all (slower, less noise a
    device)."""


class Network(Section):
    name: Literal["resnet18"] = "resnet18"
    """The only architecture there is."""
    width: int | None = Field(default=None, ge=4, le=1024)
    """Channels of the first layer; default: that of the weights file, else the paper's 64."""
    stem: Stem | None = None
    """The first layer. cifar: 3x3 at full resolution; imagenet: 7x7 with stride 2, and pooling; default: that of the
    weights file, else cifar."""
    freeze: str | None = None
    """The last frozen block (stem, layer1.0 ... layer4.1), a whole layer, none, or auto: chosen by an analysis of
    device 0's stream before the run (docs/generalizability.md); default: the method's own."""
    freeze_threshold: float = Field(default=0.94, ge=0, le=1)
    """With `freeze: auto`: the memory stability and learning plasticity that a block needs to be frozen."""
    analysis_epochs: int = Field(default=5, ge=1, le=1_000_000)
    """Epochs a task of the analysis, and no more than `training.epochs`."""
    frozen_batch_norm: Literal["eval", "train"] | None = None
    """eval: frozen whole (ours); train: batch statistics that drift (the paper's code); default: the method's own."""
    weights: str = "builtin"
    """builtin (width 20, Tiny-ImageNet at 32x32), imagenet (torchvision, width 64), none, or a safetensors file."""


class Training(Section):
    epochs: int = Field(default=50, ge=1, le=1_000_000)
    """Local epochs a task."""
    batch_size: int = Field(default=32, ge=2, le=1_000_000)
    """Images of a training step."""
    learning_rate: float = Field(default=0.01, gt=0, le=1e30)  # float32 can hold it
    """Of SGD; constant."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Of SGD."""
    weight_decay: float = Field(default=0.0, ge=0, le=1000)
    """Of SGD (L2)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the forward pass; weights and loss stay fp32."""
    checkpoint_seconds: float = Field(default=60.0, ge=0, le=1e8)
    """A device that trains longer than this saves its state at the next epoch's end, not only after the message."""


class Server(Section):
    aggregation: Literal["none", "suffix", "suffix+head"] = "none"
    """none: isolated devices; suffix: its weighted average is shared, heads stay local; suffix+head: both shared."""
    strategy: StrategyName = "FedAvg"
    """The Flower strategy (flwr.serverapp.strategy) that makes the new shared weights. FedAvg: their mean, weighted by
    examples; FedAvgM: with momentum on the server; FedAdam, FedAdagrad, FedYogi: the mean change is the gradient of
    such an optimiser; FedMedian, FedTrimmedAvg: against outliers."""
    strategy_options: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = Field(default_factory=dict)
    """Its keyword arguments, e.g. {server_momentum: 0.9} or {eta: 0.01, tau: 0.001}."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the devices that train in a round; the least advanced ones go first, ties are drawn by seed."""
    rounds_per_task: int = Field(default=1, ge=1, le=1_000_000)
    """A task's epochs are spread over this many rounds."""
    round_timeout: float = Field(default=86_400.0, gt=0, le=1e8)
    """Seconds a round may take, queueing included."""
    connect_timeout: float = Field(default=600.0, gt=0, le=1e8)
    """Seconds to wait for all devices to connect; while none has, boards that are busy get up to `round_timeout`."""
    max_failures: int = Field(default=3, ge=1, le=1_000_000)
    """Consecutive failures after which a device is left out for the rest of the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for option in ("server_momentum", "beta_1", "beta_2"):
            share = self.strategy_options.get(option, 0.0)
            if share >= 1:
                raise ValueError(f"server.strategy_options.{option} is {share:g}; allowed: from 0 to below 1")
        return self


class Runtime(Section):
    workers: int = Field(default=2, ge=1, le=1024)
    """Ray workers of a simulation; has no influence on the numbers."""
    threads: int = Field(default=1, ge=1, le=1024)
    """Torch threads a device computes with. Part of the recipe: another count may round differently."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the CUDA device where there is one, else the CPU; cuda: an error where there is none."""


class Scenario(Section):
    name: str = Field(default="scenario", pattern=r"^[A-Za-z0-9._-]+$", max_length=80)
    """Letters, digits, dot, dash and underscore; names the default run folder."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Everything random derives from it: partition, order of classes, batches, initial weights."""
    data: Data = Data()
    stream: Stream = Stream()
    fleet: Fleet = Fleet()
    network: Network = Network()
    method: Annotated[AnyMethod, Field(discriminator="name")] = LightCLParameters()
    training: Training = Training()
    server: Server = Server()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.stream.class_order, tuple):
            wanted = self.stream.tasks * self.stream.classes_per_task
            if len(self.stream.class_order) < wanted:
                raise ValueError(
                    f"stream.class_order lists {len(self.stream.class_order)} classes, but {self.stream.tasks} tasks x "
                    f"{self.stream.classes_per_task} classes need {wanted}"
                )
        if self.stream.settings == "til+cil" and "cil" not in self.method.settings:
            raise ValueError(
                f"stream.settings asks for cil, but method {self.method.name} answers only where the task is known "
                "(allowed: auto, til)"
            )
        if self.server.aggregation != "none" and not self.method.shareable:
            raise ValueError(
                f"server.aggregation is {self.server.aggregation!r}, but what method {self.method.name} trains differs "
                "from device to device and cannot be averaged (allowed: none)"
            )
        if isinstance(self.method, LightCLParameters):
            least = self.method.smallest_memory(self.frozen_batch_norm)
            if self.method.memory_size < least:
                raise ValueError(
                    f"method.memory_size is {self.method.memory_size}, but batch-norm in training mode (method."
                    f"memory_batch_norm is {self.method.memory_batch_norm}, network.frozen_batch_norm "
                    f"{self.frozen_batch_norm}) has no variance over a single sample: at least {least}"
                )
        if self.server.rounds_per_task > self.training.epochs:
            raise ValueError(
                f"server.rounds_per_task is {self.server.rounds_per_task}, but training.epochs gives only "
                f"{self.training.epochs} epochs to spread over them"
            )
        if self.fleet.partition != "pathological":
            if self.fleet.classes_per_device is not None:
                raise ValueError(f"fleet.classes_per_device is for partition: pathological, not {self.fleet.partition}")
        elif self.fleet.classes_per_device is None:
            needed = self.stream.tasks * self.stream.classes_per_task
            return self.model_copy(update={"fleet": self.fleet.model_copy(update={"classes_per_device": needed})})
        return self

    def source_request(self) -> SourceRequest:
        data = self.data
        return SourceRequest(
            data.source, data.path, data.image_size, data.image_column, data.label_column, data.test_fraction,
            self.seed, data.download,
        )  # fmt: skip

    @property
    def augmentation(self) -> Augmentation:
        if self.data.augmentation != "auto":
            return self.data.augmentation
        return "none" if self.data.source == "digits" else "crop-flip"

    @property
    def frozen_batch_norm(self) -> Literal["eval", "train"]:
        return self.network.frozen_batch_norm or self.method.default_frozen_batch_norm

    @property
    def settings(self) -> tuple[Setting, ...]:
        """What the devices are tested for."""
        return ("til",) if self.stream.settings == "til" else self.method.settings

    @property
    def first_task(self) -> int:
        """The task a stream begins with: joint training waits until all are there."""
        return self.stream.tasks - 1 if self.method.joint else 0

    def epochs_until(self, part: int) -> int:
        """Epochs of a task that are done after its round number `part` (1-based): spread as evenly as they go."""
        return self.training.epochs * part // self.server.rounds_per_task

    def to_yaml(self) -> str:
        return yaml.dump(self.model_dump(mode="json"), Dumper=Dumper, sort_keys=False)


SECTIONS = {name for name in Scenario.model_fields if name not in ("name", "seed")}


def method_types() -> dict[str, type[AnyMethod]]:
    """The parameters of every method there is, by its name."""
    return {member.model_fields["name"].default: member for member in get_args(AnyMethod)}


def method_names() -> list[str]:
    return list(method_types())

"""The complete configuration: all sections, and the rules between them. It is read and checked once, on entry.

A section lives beside the code that it configures; `training`, `device` and `simulation` are here, since the code that
they configure lies above the scenario. Defaults are the paper's values where it names one (Split CIFAR-10: 50 epochs,
batch 32, SGD 0.01, 10 % held out).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from lightcl.data.augment import Augmentation
from lightcl.data.images import SourceRequest
from lightcl.data.section import Data, Fleet, Stream
from lightcl.data.sources.field import FIELD
from lightcl.errors import shown
from lightcl.exchange.section import Server
from lightcl.methods.base import METHODS, MethodParameters, Setting
from lightcl.methods.lightcl import LightCLParameters
from lightcl.networks.section import Network
from lightcl.registry import SectionByName
from lightcl.scenario.yaml_text import Dumper
from lightcl.section import Section


class Training(Section):
    epochs: int = Field(default=50, ge=1, le=1_000_000)
    """Local epochs per task."""
    batch_size: int = Field(default=32, ge=2, le=1_000_000)
    """Images per training step."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """The optimizer on each device; its state is reset with every task. adam and adamw keep two numbers per trained
    weight."""
    learning_rate: float = Field(default=0.01, gt=0, le=1e30)  # float32 can hold it
    """Learning rate, constant. For adam and adamw values around 0.001 are common."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """SGD momentum; must be 0 with adam and adamw, which have their own."""
    weight_decay: float = Field(default=0.0, ge=0, le=1000)
    """Weight decay. sgd, adam: added to the gradients (L2); adamw: decoupled."""
    checkpoint_seconds: float = Field(default=60.0, ge=0, le=1e8)
    """A device that trains longer than this saves its state at the next epoch's end, not only after the message."""

    update: Literal["after", "at-once"] = "after"
    """after: all gradients, then the optimizer's step; at-once: each weight moves when its gradient is complete, so
    that no two gradients exist together (sgd without momentum; the same numbers)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.update == "at-once" and (self.optimizer != "sgd" or self.momentum):
            given = f"optimizer {self.optimizer}" if self.optimizer != "sgd" else f"momentum {self.momentum:g}"
            raise ValueError(
                f"training.update is at-once, but training.{given} is not plain SGD (allowed: update after, or sgd "
                "with momentum 0)"
            )
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"training.momentum is {self.momentum:g}, but training.optimizer {self.optimizer} has no such momentum "
                "(allowed: 0, or optimizer: sgd)"
            )
        return self


OLD_NATIVE = "winograd-native"
"""What `device.convolutions: native` was called at first."""


class Device(Section):
    threads: int = Field(default=1, ge=1, le=1024)
    """PyTorch threads per device. Another number may round differently and so change the results slightly."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the CUDA device if there is one, otherwise the CPU; cuda: an error if there is none."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """bf16: autocast of the forward pass; weights and loss stay fp32. auto: bf16 where the machine is known to be
    faster in it, else fp32 (docs/how-to/many-devices.md)."""
    convolutions: Literal["auto", "direct", "winograd", "native"] = "direct"
    """winograd: 3x3 convolutions of the trained blocks with a quarter of the multiplications on maps whose sides are
    multiples of 4, in fp32 on the CPU; rounds differently. native: the same in C, compiled once on the machine
    that runs it, under precision: bf16 too (with AMX as products in bf16), for strided ones of many channels too, and
    for the frozen blocks; batch-norm, shortcut, ReLU and drift are in C as well. auto: what is known to be fastest
    (docs/how-to/many-devices.md)."""
    prefix_cache: Literal["auto", "on", "off"] = "auto"
    """Whether outputs of the frozen prefix are kept on disk, for images without augmentation and for data.views; auto:
    where data.views is above 0 and network and method allow it."""
    prefix_cache_dtype: Literal["exact", "fp16", "bf16"] = "exact"
    """exact: as computed; fp16, bf16: half the disk and reading, rounded (docs/how-to/cache-and-disk.md)."""
    prefix_cache_gb: float = Field(default=8.0, gt=0, le=1e6)
    """Upper limit of all cached prefix outputs on this disk, in 10^9 bytes; those used least recently go first."""

    @field_validator("prefix_cache", mode="before")
    @classmethod
    def _read_switch(cls, given: object) -> object:
        """YAML reads the plain words on and off as true and false."""
        return {True: "on", False: "off"}[given] if isinstance(given, bool) else given

    @field_validator("convolutions", mode="before")
    @classmethod
    def _read_old_name(cls, given: object) -> object:
        """Runs that began before more than Winograd's algorithm was in C have recorded its first name."""
        return "native" if given == OLD_NATIVE else given


_ADDRESS = re.compile(r"auto|(ray://)?([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


class Simulation(Section):
    """How a fleet is simulated. No key of this section changes the numbers."""

    engine: Literal["ray", "flower"] = "ray"
    """ray: Ray actors behind a Flower Grid of this project, for any number of devices; flower: Flower's own engine."""
    workers: int = Field(default=2, ge=1, le=1024)
    """Worker processes. Each trains one device at a time with device.threads threads."""
    address: str | None = None
    """Existing Ray cluster: auto, HOST:PORT or ray://HOST:PORT; null starts Ray on this machine."""
    keep_states: Literal["all", "none"] = "all"
    """none: delete the devices' states when the run is complete."""

    @field_validator("address")
    @classmethod
    def _check_address(cls, given: str | None) -> str | None:
        found = _ADDRESS.fullmatch(given) if given is not None else None
        if given is not None and (found is None or (found[3] and not 1 <= int(found[3]) <= 65535)):
            raise ValueError(
                f"simulation.address is {given!r} (allowed: null, auto, HOST:PORT or ray://HOST:PORT, with a port from "
                "1 to 65535)"
            )
        return given

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine == "flower" and self.address is not None:
            raise ValueError(
                f"simulation.address is {self.address!r}, but simulation.engine flower runs on this machine only "
                "(allowed: engine ray, or address null)"
            )
        return self


_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")


class Scenario(Section):
    name: str = Field(default="scenario", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=80)
    """Letters, digits, dot, dash and underscore, with no dot in front; names the default run folder."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything random: partition, order of classes, batches, initial weights."""
    data: Data = Data()
    stream: Stream = Stream()
    fleet: Fleet = Fleet()
    network: Network = Network()
    method: Annotated[MethodParameters, SectionByName(METHODS)] = LightCLParameters()
    training: Training = Training()
    server: Server = Server()
    device: Device = Device()
    simulation: Simulation = Simulation()

    @field_validator("name", mode="before")
    @classmethod
    def _check_name(cls, given: object) -> object:
        if isinstance(given, str) and not _NAME.fullmatch(given):
            raise ValueError(
                f"name is {shown(given)} (allowed: 1 to 80 letters, digits, dots, dashes and underscores, with no dot "
                "in front)"
            )
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.stream.class_order, tuple):
            wanted = self.stream.tasks * self.stream.classes_per_task
            if len(self.stream.class_order) < wanted:
                raise ValueError(
                    f"stream.class_order lists {len(self.stream.class_order)} classes, but {self.stream.tasks} tasks x "
                    f"{self.stream.classes_per_task} classes need {wanted}"
                )
        if self.data.source == FIELD:
            self._check_field()
        if self.stream.settings == "til+cil" and "cil" not in self.method.settings:
            raise ValueError(
                f"stream.settings asks for cil, but method {self.method.name} answers only where the task is known "
                "(allowed: auto, til)"
            )
        if self.server.aggregation != "none" and not self.method.shareable:
            raise ValueError(
                f"server.aggregation is {self.server.aggregation!r}, but the trained tensors of method "
                f"{self.method.name} differ from device to device and cannot be averaged (allowed: none)"
            )
        self.method.check(self)
        if self.device.prefix_cache == "on" and self.frozen_batch_norm == "train":
            raise ValueError(
                "device.prefix_cache is on, but network.frozen_batch_norm is train: the outputs of such a prefix "
                "depend on the batch (allowed: auto, off)"
            )
        if self.device.prefix_cache == "on" and self.freeze == "none":
            raise ValueError(
                f"device.prefix_cache is on, but method {self.method.name} freezes nothing (allowed: auto, off, or "
                "another network.freeze)"
            )
        if self.training.update == "at-once" and self.method.reads_gradients:
            raise ValueError(
                f"training.update is at-once, but method {self.method.name} changes the gradients of a step before the "
                "weights move (allowed: after)"
            )
        if self.server.rounds_per_task > self.training.epochs:
            raise ValueError(
                f"server.rounds_per_task is {self.server.rounds_per_task}, but training.epochs gives only "
                f"{self.training.epochs} epochs to spread over them"
            )
        if self.fleet.partition not in ("pathological", "distribution"):
            if self.fleet.classes_per_device is not None:
                raise ValueError(
                    f"fleet.classes_per_device is for partition: pathological or distribution, not "
                    f"{self.fleet.partition}"
                )
        elif self.fleet.classes_per_device is None:
            needed = self.stream.tasks * self.stream.classes_per_task
            return self.model_copy(update={"fleet": self.fleet.model_copy(update={"classes_per_device": needed})})
        return self

    def _check_field(self) -> None:
        """Rules of a stream whose images come with time. Raises ValueError."""
        classes = len(self.data.classes or ())
        if self.stream.classes_per_task > classes:
            raise ValueError(
                f"stream.classes_per_task is {self.stream.classes_per_task}, but data.classes has {classes} (allowed: "
                f"1 to {classes})"
            )
        if self.server.fraction < 1:
            raise ValueError(
                f"server.fraction is {self.server.fraction:g}, but with data.source: field devices that wait for "
                "images would be chosen again and again (allowed: 1)"
            )
        if self.method.joint and self.data.keep != "all":
            raise ValueError(
                f"data.keep is {self.data.keep!r}, but method {self.method.name} learns all tasks together at the end "
                "and needs their images until then (allowed: all)"
            )

    def source_request(self) -> SourceRequest:
        return self.data.request(self.seed, self.fleet.partition_by)

    @property
    def augmentation(self) -> Augmentation:
        return self.data.augmentation_kind

    @property
    def frozen_batch_norm(self) -> Literal["eval", "train"]:
        return self.network.frozen_batch_norm or self.method.default_frozen_batch_norm

    @property
    def freeze(self) -> str:
        """The freeze point: `network.freeze`, or the method's own."""
        return self.network.freeze or self.method.default_freeze

    @property
    def fixed_prefix(self) -> bool:
        """Whether the prefix is computed image by image, whatever the batch, so that its outputs may be cached."""
        wanted = self.device.prefix_cache == "on" or self.data.views > 0
        return wanted and self.frozen_batch_norm == "eval" and self.freeze != "none"

    @property
    def caches_prefix(self) -> bool:
        """Whether outputs of the prefix are kept on disk; `device.prefix_cache`, with auto resolved."""
        return self.fixed_prefix and self.device.prefix_cache != "off"

    @property
    def settings(self) -> tuple[Setting, ...]:
        """What the devices are tested for."""
        return ("til",) if self.stream.settings == "til" else self.method.settings

    @property
    def first_task(self) -> int:
        """The task a stream begins with: joint training waits until all are there."""
        return self.stream.tasks - 1 if self.method.joint else 0

    def epochs_until(self, part: int) -> int:
        """Epochs of a task that are done after its round number `part` (1-based), spread as evenly as possible."""
        return self.training.epochs * part // self.server.rounds_per_task

    def to_yaml(self) -> str:
        return yaml.dump(self.model_dump(mode="json"), Dumper=Dumper, sort_keys=False)


SECTIONS = {name for name in Scenario.model_fields if name not in ("name", "seed")}


def method_types() -> dict[str, type[MethodParameters]]:
    """The sections of all registered methods, by name."""
    return dict(METHODS.items())


def method_names() -> list[str]:
    return list(METHODS)

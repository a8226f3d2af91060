"""The scenario's sections `data`, `stream` and `fleet`: which images, in which tasks, on which devices."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from lightcl.data.augment import Augmentation
from lightcl.data.images import SourceRequest
from lightcl.data.partitioners import find_partitioner, partitioner_names
from lightcl.data.sources import source_kind, source_names
from lightcl.data.sources.field import FIELD, UNLABELED
from lightcl.errors import RequestError, shown
from lightcl.section import Section

CLASS_NAME = re.compile(r"(?!\.)[^/\\:*?\"<>|\x00-\x1f\x7f]{1,80}")
"""A name that a folder may have, also on the file system of a memory card."""


class Data(Section):
    source: str = Field(default="digits", json_schema_extra=lambda schema: _name(schema, source_names()))
    """digits ships with scikit-learn; cifar10, cifar100 and fashion-mnist are downloaded; parquet and image-folder read
    your files; field collects images on boards while the run goes on; a plugin may add more."""
    path: Path | None = Field(default=None, strict=False)
    """Your parquet file or image folder; for the downloaded sets, the folder that holds (or gets) the copy; field: no
    effect, each board names its own folder (`data` in its configuration)."""
    classes: tuple[str, ...] | None = Field(default=None, strict=False)
    """field: the names of all classes, e.g. [cup, bottle]: the head has a row for each, on every board."""
    keep: Literal["none", "buffer", "all"] = "all"
    """field: which images of a learned task stay on the board. all: every one; buffer: those that the device is still
    tested on (samples that a method replays are in its state); none: no image, so old tasks are not tested again.
    A board deletes images only where its own configuration has `delete_learned`."""
    image_size: int | None = Field(default=None, ge=8, le=1024)
    """Resize images to N x N pixels; default: keep their size. field needs it."""
    image_column: str | None = None
    """Parquet: the column of encoded images; default: img or image."""
    label_column: str | None = None
    """Parquet: the column of labels; default: label."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of every class that becomes the test split where the source has none."""
    download: bool = True
    """Whether a missing data set may be downloaded."""
    augmentation: Literal["auto", Augmentation] = "auto"
    """crop-flip: random crop and horizontal flip (the paper); crop: no flip; auto: crop-flip, but none on digits,
    which a flip would change."""
    crop_padding: int = Field(default=4, ge=0, lt=1024)
    """Black pixels added on every side before an image's random crop; fewer than the image's side."""
    views: int = Field(default=0, ge=0, le=1024)
    """Seeded augmentations of every training image, which epochs take in turn; the prefix cache keeps their outputs
    (`device.prefix_cache`). 0: new augmentation in every epoch, which is not cached."""

    @field_validator("source")
    @classmethod
    def _check_source(cls, given: str) -> str:
        return _known(given, source_kind)

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
        if self.source == FIELD:
            self._check_field()
        elif self.classes is not None or self.keep != "all":
            key = "classes" if self.classes is not None else "keep"
            raise ValueError(f"data.{key} is for data.source: field, not {self.source}; leave it out")
        return self

    def _check_field(self) -> None:
        """Raises ValueError where the classes are not names of folders, or what boards must agree on is missing."""
        if self.classes is None or self.image_size is None:
            key = "classes" if self.classes is None else "image_size"
            example = "data.classes: [cup, bottle]" if self.classes is None else "data.image_size: 32"
            raise ValueError(
                f"data.source: field needs data.{key}, since the boards must agree on it before any image is there; "
                f"for example {example}"
            )
        if self.augmentation_kind != "none" and self.crop_padding >= self.image_size:
            raise ValueError(
                f"data.crop_padding is {self.crop_padding}, but data.image_size is {self.image_size}; allowed: less"
            )
        for name in self.classes:
            if not CLASS_NAME.fullmatch(name) or name.casefold() == UNLABELED or name != name.strip():
                raise ValueError(
                    f"data.classes has {shown(name)} (allowed: 1 to 80 characters that a folder's name may have, with "
                    f"no dot in front, and not {UNLABELED})"
                )
        folded = [name.casefold() for name in self.classes]
        if len(folded) < 2 or len(set(folded)) < len(folded):
            raise ValueError(
                f"data.classes is {shown(list(self.classes))} (allowed: two or more names that differ in more than "
                "capital letters)"
            )

    def request(self, seed: int, group_column: str | None = None) -> SourceRequest:
        """Everything that decides which images are read; `group_column` is `fleet.partition_by`."""
        return SourceRequest(
            self.source, self.path, self.image_size, self.image_column, self.label_column, self.test_fraction, seed,
            self.download, group_column,
        )  # fmt: skip

    @property
    def augmentation_kind(self) -> Augmentation:
        """`augmentation`, with auto resolved."""
        if self.augmentation != "auto":
            return self.augmentation
        return "none" if self.source == "digits" else "crop-flip"


class Stream(Section):
    tasks: int = Field(default=5, ge=1, le=100_000)
    """Tasks of a stream, learned one after the other."""
    classes_per_task: int = Field(default=2, ge=1, le=100_000)
    """Classes per task; the source needs tasks x classes_per_task classes. field: a task has at least as many."""
    class_order: Literal["natural", "shuffled"] | tuple[int, ...] = "natural"
    """natural: as numbered in the source; shuffled: by the seed; or a list of class numbers."""
    per_device_order: bool = False
    """With `shuffled`: every device has its own class order."""
    cut: Literal["auto", "shared", "own"] = "auto"
    """shared: the same class groups on all devices; own: cut from the classes that a device holds; auto: own under the
    pathological and distribution partitions, else shared."""
    min_samples: int = Field(default=2, ge=2, le=1_000_000)
    """Training images that a device needs to learn a task; it skips tasks for which it has fewer."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of every task's training images kept out of training."""
    evaluate_on: Literal["test", "held-out"] = "test"
    """test: the test split, for reports; held-out: the training images kept out, to choose hyperparameters on."""
    settings: Literal["auto", "til", "til+cil"] = "auto"
    """Test with the task known (til), or also with it unknown (cil); auto: every setting that the method supports."""
    ready_images: int = Field(default=100, ge=2, le=1_000_000)
    """field: labeled images, test images included, that make the next task; all that are there then become the task."""
    ready_after: float | None = Field(default=None, gt=0, le=1e9)
    """field: seconds after which fewer images make a task, too, if they suffice for `min_samples` and
    `classes_per_task`: from the arrival of the first one on. Default: it waits for `ready_images`."""

    @field_validator("class_order", mode="before")
    @classmethod
    def _check_class_order(cls, given: object) -> object:
        """Raises one error; pydantic would raise one per member of the union, each with half of the allowed values."""
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
    """Devices of the fleet; the training images are divided among them."""
    partition: str = Field(default="iid", json_schema_extra=lambda schema: _name(schema, partitioner_names()))
    """iid: equal random shares; dirichlet: each class divided by `alpha`; inner-dirichlet: equal shares, each device's
    class proportions drawn by `alpha`; pathological: `classes_per_device` classes per device, divided equally;
    distribution: the same, divided by log-normal weights (`sigma`); linear, square, exponential: random shares whose
    sizes grow with the device's number; natural: one device per user, writer or camera (`partition_by`)."""
    alpha: float = Field(default=0.5, gt=0, le=1e6)
    """dirichlet, inner-dirichlet: concentration; with a smaller value the devices' class proportions differ more."""
    sigma: float = Field(default=2.0, ge=0, le=20)
    """distribution: standard deviation of the log-normal weights' logarithm."""
    classes_per_device: int | None = Field(default=None, ge=1, le=100_000)
    """pathological, distribution: classes that a device holds; default: as many as its stream needs."""
    partition_by: str | None = None
    """natural: the parquet column of users, writers or cameras."""
    test_data: Literal["share", "whole", "matched"] = "share"
    """Test images of a device, all of its classes. share: its part of them; whole: all of them (slower, less noise per
    device); matched: as many as possible in the proportions of its training images, shared between devices."""
    test_images: int | None = Field(default=None, ge=1, le=1_000_000)
    """matched: at most about this many test images per device, and at least one per class; default: no limit."""

    @field_validator("partition")
    @classmethod
    def _check_partition(cls, given: str) -> str:
        return _known(given, find_partitioner)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.partition == "natural") != (self.partition_by is not None):
            given = "not given" if self.partition_by is None else f"{self.partition_by!r}"
            raise ValueError(
                f"fleet.partition is {self.partition} and fleet.partition_by is {given}; partition: natural needs "
                "the column of users, writers or cameras, and no other partition uses it"
            )
        if self.test_images is not None and self.test_data != "matched":
            raise ValueError(f"fleet.test_images is for fleet.test_data: matched, not {self.test_data}; leave it out")
        return self


def _known(given: str, find: Callable[[str], object]) -> str:
    """The name, if `find` knows it; otherwise a ValueError, which pydantic expects."""
    try:
        find(given)
    except RequestError as error:
        raise ValueError(str(error)) from error
    return given


def _name(schema: dict[str, Any], names: tuple[str, ...]) -> None:
    """Lists the registered names in the JSON schema."""
    schema["enum"] = list(names)

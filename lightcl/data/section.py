"""The scenario's sections `data`, `stream` and `fleet`: which images, in which tasks, on which devices."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from lightcl.data.augment import Augmentation
from lightcl.data.sources import SourceName, SourceRequest
from lightcl.errors import shown
from lightcl.section import Section


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

    def request(self, seed: int) -> SourceRequest:
        """What decides which images come out, in which order."""
        return SourceRequest(
            self.source, self.path, self.image_size, self.image_column, self.label_column, self.test_fraction, seed,
            self.download,
        )  # fmt: skip

    @property
    def augmentation_kind(self) -> Augmentation:
        """`augmentation`, with auto resolved."""
        if self.augmentation != "auto":
            return self.augmentation
        return "none" if self.source == "digits" else "crop-flip"


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

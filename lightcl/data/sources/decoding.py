"""Decoding of images and labels into arrays, for the readers of files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from lightcl.data.images import ImageSet, Source
from lightcl.errors import RequestError

SIXTEEN_BITS_AS_I = ("PNG", "PPM")
"""Formats whose 16-bit images some versions of Pillow open with 32 bits; these formats have no 32-bit images."""
FORMATS = (
    "JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "PSD", "HEIF", "JXL", "TGA",
)  # fmt: skip
"""The formats that are read, by Pillow's names: those of `IMAGE_SUFFIXES` that are pixels. Plugins of Pillow that a
user loads bring HEIF and JXL. TGA comes last: its files have no mark by which they are known."""
MOST_PIXELS = 40_000_000
"""Of an image: 160 MB as RGB in memory, and for a moment twice that."""
MOST_CLASSES = 100_000
"""A head has a row per class up to the largest label, with or without images."""


@contextmanager
def opened(content: str | Path | bytes, place: str) -> Iterator[Image.Image]:
    """An image file, or bytes, of one of `FORMATS` and with at most `MOST_PIXELS`, whatever the file's name is.

    Pillow opens a file by its content, and would start Ghostscript for PostScript that is called photo.jpg. Raises
    RequestError naming `place`, also for whatever goes wrong inside: for damaged files, decoders raise errors of any
    kind.
    """
    Image.init()  # all of Pillow's formats, and those of its plugins that are loaded
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=formats) as picture:
            _check_size(picture, place)
            yield picture
    except RequestError:
        raise
    except UnidentifiedImageError as error:  # its text names the object that holds the bytes
        raise RequestError(f"{place}: the image does not decode (not an image, or an unknown format)") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{place}: the image is too large (allowed: up to {MOST_PIXELS} pixels): {error}") from error
    except FileNotFoundError as error:
        raise RequestError(f"{place}: there is no such file") from error
    except Exception as error:  # of any kind: one damaged file may not end the reading of the others
        if isinstance(error, OSError) and error.errno:  # the system's, such as a missing right; Pillow's have no number
            raise RequestError(f"{place}: cannot be read ({error.strerror})") from error
        raise RequestError(f"{place}: the image does not decode ({str(error) or type(error).__name__})") from error


def _check_size(picture: Image.Image, place: str) -> None:
    """A small file may have pixels that fill the memory of a board."""
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise RequestError(
            f"{place}: the image has {width}x{height} pixels, {width * height} in all (allowed: up to {MOST_PIXELS}); "
            "make it smaller"
        )


def decode(content: str | bytes, place: str, size: int | None) -> Image.Image:
    """Decodes a file or bytes to 8-bit gray or RGB (first frame of an animation), resized to `size` x `size` pixels.

    Raises RequestError naming `place` for content that does not decode, has too many pixels or an unknown range of
    values.
    """
    with opened(content, place) as picture:
        if picture.mode == "F" or (picture.mode == "I" and picture.format not in SIXTEEN_BITS_AS_I):
            raise RequestError(
                f"{place}: the image has {'float' if picture.mode == 'F' else '32-bit integer'} pixels, so its "
                "white level is unknown; allowed: 8 or 16 bits per channel"
            )
        picture.load()
        _check_size(picture, place)  # an icon may hold a larger image than it says
        if picture.mode.startswith("I"):  # 16 bits per pixel; convert() would clip them to white
            converted = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
            return converted if size is None else resized(converted, size)
        mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
        if picture.mode == mode and size is not None and picture.size != (size, size):
            return resized(picture, size)  # convert() would copy all pixels
        converted = picture.convert(mode)
        return converted if size is None else resized(converted, size)


def resized(picture: Image.Image, size: int) -> Image.Image:
    """The image with `size` x `size` pixels."""
    return picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.BILINEAR)


def fitted(picture: Image.Image, height: int, width: int, channels: int) -> np.ndarray:
    """The image as uint8 `[height, width, channels]`, resized as `resized` does and converted to gray or RGB."""
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    array = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    return array.reshape(height, width, channels)


def image_set(pictures: Sequence[Image.Image], places: Sequence[str], labels: Sequence[Any]) -> ImageSet:
    """Stacks decoded images; one RGB image makes all RGB.

    Raises RequestError for no images, several sizes, or labels that are not all names or all class numbers.
    """
    if not pictures:
        raise RequestError("data.path: no images found")
    color = any(picture.mode == "RGB" for picture in pictures)
    first = pictures[0].size
    for picture, place in zip(pictures, places, strict=True):
        if picture.size != first:
            raise RequestError(
                f"{place}: image of {picture.size[0]}x{picture.size[1]} pixels, but {places[0]} has "
                f"{first[0]}x{first[1]}; set data.image_size to resize all images to one size"
            )
    arrays = np.stack([np.asarray(picture.convert("RGB") if color else picture) for picture in pictures])
    names, encoded = _encode_labels(labels, places)
    return ImageSet(arrays if color else arrays[..., None], encoded, names)


def _encode_labels(labels: Sequence[Any], places: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and labels `[N]`: integer labels stay as they are, names are numbered in sorted order."""
    kind = int if isinstance(labels[0], int) else str
    for label, place in zip(labels, places, strict=True):
        if not isinstance(label, kind):
            raise RequestError(f"{place}: label {label!r} is neither an integer nor a name like the others")
    if kind is int:
        for label in (min(labels), max(labels)):
            if not 0 <= label < MOST_CLASSES:
                raise RequestError(
                    f"{places[labels.index(label)]}: label {label} is {'negative' if label < 0 else 'too large'}: "
                    f"integer labels number the classes from 0 (allowed: 0 to {MOST_CLASSES - 1}); renumber the "
                    "classes, or use names"
                )
        return tuple(str(i) for i in range(max(labels) + 1)), np.asarray(labels, dtype=np.int64)
    names = sorted(set(labels))
    numbers = {name: i for i, name in enumerate(names)}
    return tuple(names), np.asarray([numbers[label] for label in labels], dtype=np.int64)


def with_same_classes(train: ImageSet, test: ImageSet, path: Path) -> Source:
    """A source of two splits; the test split's classes are numbered as in the training split.

    Raises RequestError for test images of another shape and for test classes without training images.
    """
    shape, test_shape = ("x".join(map(str, images.images.shape[1:])) for images in (train, test))
    if test_shape != shape:
        raise RequestError(
            f"{path}: the test images are {test_shape}, the training images {shape} (height x width x channels); give "
            "both splits the same channels, and set data.image_size to resize all images to one size"
        )
    if set(test.classes) <= set(train.classes):
        numbers = {name: i for i, name in enumerate(train.classes)}
        renumber = np.asarray([numbers[name] for name in test.classes], dtype=np.int64)
        return Source(train, ImageSet(test.images, renumber[test.labels], train.classes))
    unknown = ", ".join(sorted(set(test.classes) - set(train.classes))[:5])
    raise RequestError(f"{path}: the test split has classes that the training split lacks: {unknown}")

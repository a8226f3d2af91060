"""Where images come from. Every source gives the same thing: uint8 images, integer labels, a train and a test split.

Images are decoded once and kept as memory-mapped arrays in a cache folder, so that a thousand simulated devices share
one copy and a device reads only the pages of its own samples.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from lightcl.errors import RequestError, required
from lightcl.storage.files import sync

SourceName = Literal["digits", "cifar10", "cifar100", "fashion-mnist", "parquet", "image-folder"]
OWN_FILES: tuple[SourceName, ...] = ("parquet", "image-folder")
"""Sources that are the user's files: they need a path."""
IMAGE_COLUMNS = ("img", "image", "images")
TEST_SPLITS = ("test", "val")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target")
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".jxl", ".avif", ".heic", ".heif", ".tga", ".ico", ".psd", ".svg",
)  # fmt: skip
SIXTEEN_BITS_AS_I = ("PNG", "PPM")
"""Formats whose images of 16 bits some versions of Pillow open with 32; they have none of 32."""
MOST_CLASSES = 100_000
"""A head has a row for every class up to the largest label, whether or not it has images."""
UNREADABLE = (OSError, ValueError, EOFError)
"""What reading an entry of the cache raises where it is missing, cut short or empty."""


@dataclass(frozen=True)
class ImageSet:
    """Images and their labels: `images` uint8 `[N, H, W, C]`, `labels` int64 `[N]` in 0..len(classes)-1."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Source:
    """A labelled image data set, split into train and test."""

    train: ImageSet
    test: ImageSet

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def channels(self) -> int:
        return int(self.train.images.shape[3])

    @property
    def labels(self) -> str:
        """Fingerprint of the class names, in order."""
        return hashlib.sha256(json.dumps(self.classes).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SourceRequest:
    """Everything that decides which images come out, in which order."""

    name: SourceName
    path: Path | None = None
    image_size: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    test_fraction: float = 0.2
    seed: int = 0
    download: bool = True


def cache_folder() -> Path:
    """Where decoded images are kept: `$LIGHTCL_CACHE`, else `~/.cache/lightcl`."""
    return Path(os.environ.get("LIGHTCL_CACHE") or Path.home() / ".cache" / "lightcl")


def load_source(request: SourceRequest) -> Source:
    """Train and test images of a source; decoded on first use, memory-mapped from the cache afterwards.

    Raises RequestError for a missing path, an unreadable image, images of several sizes, or labels out of range.
    """
    # Where the source brings its own test split, neither fraction nor seed decides anything.
    split = None if _has_test_split(request) else (request.test_fraction, request.seed)
    key = json.dumps([_fingerprint(request), request.image_size, split, 4])
    folder = cache_folder() / "images" / hashlib.sha256(key.encode()).hexdigest()[:20]
    with suppress(*UNREADABLE):
        return _stored(folder)
    _store(folder, _READERS[request.name](request))
    return _stored(folder)


def _stored(folder: Path) -> Source:
    """An entry of the cache. Raises one of UNREADABLE."""
    classes = tuple(json.loads((folder / "classes.json").read_text()))
    splits = [
        ImageSet(
            np.load(folder / f"{split}-images.npy", mmap_mode="r"), np.load(folder / f"{split}-labels.npy"), classes
        )
        for split in ("train", "test")
    ]
    return Source(*splits)


def _store(folder: Path, source: Source) -> None:
    """Writes the arrays into a temporary folder, syncs and renames it, so that neither a killed or a parallel process
    nor a power failure does harm. An entry that cannot be read is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        staging = Path(temporary) / "set"
        staging.mkdir()
        for split, images in (("train", source.train), ("test", source.test)):
            np.save(staging / f"{split}-images.npy", images.images)
            np.save(staging / f"{split}-labels.npy", images.labels)
        (staging / "classes.json").write_text(json.dumps(source.classes))
        for file in (*staging.iterdir(), staging):
            sync(file)
        try:
            _stored(folder)
        except UNREADABLE:
            with suppress(OSError):  # there is none
                folder.rename(Path(temporary) / "unreadable")
        with suppress(OSError):  # another process was first; its result is the same
            staging.rename(folder)
        sync(folder.parent)


def _fingerprint(request: SourceRequest) -> list[Any]:
    """Changes when the files behind the source change."""
    parts: list[Any] = [request.name, request.image_column, request.label_column]
    if request.name in OWN_FILES:
        path = _existing(request)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        stats = [(str(p.resolve()), s.st_size, s.st_mtime_ns) for p in files for s in [p.stat()]]
        parts.append(hashlib.sha256(json.dumps(stats).encode()).hexdigest())
    elif request.path is not None:  # somebody's copy of a downloaded set
        parts.append(str(request.path.resolve()))
    return parts


def _existing(request: SourceRequest) -> Path:
    if request.path is None:
        raise RequestError(f"data.source {request.name!r} needs data.path (a file or folder of yours)")
    if not request.path.exists():
        raise RequestError(f"data.path: no such file or folder: {request.path}")
    return request.path


def _has_test_split(request: SourceRequest) -> bool:
    if request.name in ("cifar10", "cifar100", "fashion-mnist"):
        return True
    folder = request.path
    if request.name == "digits" or folder is None or not folder.is_dir():
        return False
    if request.name == "image-folder":  # without a folder `train` those named so are classes
        return (folder / "train").is_dir() and any((folder / name).is_dir() for name in TEST_SPLITS)
    return any(next(folder.glob(f"{name}*.parquet"), None) for name in TEST_SPLITS)


def split_off_test(images: ImageSet, fraction: float, seed: int) -> Source:
    """A deterministic test split with the same share of every class, for sources that bring none."""
    generator = np.random.default_rng([seed, 0x7E57])
    test = np.zeros(len(images), dtype=bool)
    for label in range(len(images.classes)):
        members = np.flatnonzero(images.labels == label)
        test[generator.permutation(members)[: round(len(members) * fraction)]] = True
    if test.all() or not test.any():
        raise RequestError(
            f"data.test_fraction: {fraction} of every class of {len(images)} images leaves none to "
            f"{'train' if test.all() else 'test'} on; {'lower' if test.all() else 'raise'} it"
        )
    return Source(
        ImageSet(images.images[~test], images.labels[~test], images.classes),
        ImageSet(images.images[test], images.labels[test], images.classes),
    )


# -- readers: one a source -----------------------------------------------------------------------------------------


def _digits(request: SourceRequest) -> Source:
    """scikit-learn's bundled 8x8 handwritten digits (UCI; 1,797 images), values 0..16 scaled to 0..255."""
    bunch = required("sklearn.datasets", "data", "for data.source 'digits'").load_digits()
    scaled = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    size = request.image_size or 8
    pictures = np.stack([np.asarray(_resized(Image.fromarray(image), size)) for image in scaled])
    everything = ImageSet(pictures[..., None], bunch.target.astype(np.int64), tuple(str(i) for i in range(10)))
    return split_off_test(everything, request.test_fraction, request.seed)


def _torchvision(request: SourceRequest) -> Source:
    """CIFAR-10, CIFAR-100 and Fashion-MNIST: torchvision's download, or a folder it was downloaded to before."""
    datasets = required("torchvision.datasets", "data", f"for data.source {request.name!r}")

    kinds = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashion-mnist": datasets.FashionMNIST}
    root = request.path or cache_folder() / "downloads"
    splits: list[ImageSet] = []
    for train in (True, False):
        try:
            data = kinds[request.name](root, train=train, download=request.download)
        except (RuntimeError, OSError) as error:
            raise RequestError(
                f"data.source {request.name!r}: not found under {root} and not downloaded ({error}). "
                f"Set data.path to the folder that holds torchvision's copy, or use data.source=parquet with your file"
            ) from error
        images = np.asarray(data.data)
        pictures = images if images.ndim == 4 else images[..., None]
        if request.image_size and request.image_size != pictures.shape[1]:
            modes = [Image.fromarray(p.squeeze()) for p in pictures]
            resized = np.stack([np.asarray(_resized(m, request.image_size)) for m in modes])
            pictures = resized if resized.ndim == 4 else resized[..., None]
        splits.append(ImageSet(pictures, np.asarray(data.targets, dtype=np.int64), tuple(data.classes)))
    return Source(*splits)


def _parquet(request: SourceRequest) -> Source:
    """A parquet file, or a folder with `train*.parquet` and, if there is one, `test*.parquet` (or val, validation)."""
    path = _existing(request)
    if path.is_file():
        return split_off_test(_read_parquet([path], request), request.test_fraction, request.seed)
    train = sorted(path.glob("train*.parquet"))
    if not train:
        raise RequestError(f"data.path: {path} holds no train*.parquet (a single file may be named instead)")
    images = _read_parquet(train, request)
    for name in TEST_SPLITS:
        files = sorted(path.glob(f"{name}*.parquet"))
        if files:
            return _with_same_classes(images, _read_parquet(files, request), path)
    return split_off_test(images, request.test_fraction, request.seed)


def _read_parquet(files: Sequence[Path], request: SourceRequest) -> ImageSet:
    pa = required("pyarrow", "data", "for data.source 'parquet'")
    pq = required("pyarrow.parquet", "data", "for data.source 'parquet'")

    pictures: list[Image.Image] = []
    places: list[str] = []
    labels: list[Any] = []
    for file in files:
        try:
            table = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise RequestError(f"{file}: not a parquet file ({error})") from error
        names = table.schema_arrow.names
        image_column = _column(file, names, request.image_column, IMAGE_COLUMNS, "image_column")
        label_column = _column(file, names, request.label_column, LABEL_COLUMNS, "label_column")
        try:
            rows = [
                pair
                for batch in table.iter_batches(1024, columns=[image_column, label_column])
                for pair in zip(batch[image_column].to_pylist(), batch[label_column].to_pylist(), strict=True)
            ]
        except (pa.ArrowException, OSError) as error:
            raise RequestError(f"{file}: damaged ({error})") from error
        for row, (cell, label) in enumerate(rows):
            place = f"{file}, row {row}"
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            if not isinstance(content, bytes):
                raise RequestError(f"{place}: column {image_column!r} holds no encoded image bytes")
            pictures.append(_decode(content, place, request.image_size))
            places.append(place)
            labels.append(label)
    return _image_set(pictures, places, labels)


def _column(file: Path, names: list[str], wanted: str | None, usual: tuple[str, ...], key: str) -> str:
    candidates = (wanted,) if wanted else usual
    for name in candidates:
        if name in names:
            return name
    raise RequestError(f"{file}: no column {' or '.join(candidates)} (it has: {', '.join(names)}); set data.{key}")


def _image_folder(request: SourceRequest) -> Source:
    """A folder a class, either directly below the path or below its `train` and `test` (or `val`) folders."""
    path = _existing(request)
    if (path / "train").is_dir():
        images = _read_folder(path / "train", request)
        for name in TEST_SPLITS:
            if (path / name).is_dir():
                return _with_same_classes(images, _read_folder(path / name, request), path)
        return split_off_test(images, request.test_fraction, request.seed)
    return split_off_test(_read_folder(path, request), request.test_fraction, request.seed)


def _read_folder(path: Path, request: SourceRequest) -> ImageSet:
    """One folder per class, classes and files in alphabetical order; images may lie in folders below their class."""
    if not path.is_dir():
        raise RequestError(f"data.path: {path} is no image folder: expected a folder with one folder per class")
    classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    if not classes:
        raise RequestError(f"data.path: {path} is no image folder: expected one folder per class, found none")
    files, labels = [], []
    for name in classes:
        found = list(_images_below(path / name))
        if not found:
            raise RequestError(f"data.path: {path} is no image folder: class {name!r} has no images")
        files += found
        labels += [name] * len(found)
    return _image_set([_decode(file, file, request.image_size) for file in files], files, labels)


def _images_below(folder: Path) -> Iterator[str]:
    """Paths of the images in a folder and the folders below it, folder by folder in alphabetical order."""
    for parent, _, names in sorted(os.walk(folder, followlinks=True)):
        for name in sorted(names):
            if _is_image(name):
                yield os.path.join(parent, name)  # noqa: PTH118, a string is what the decoder names in errors


def _is_image(file: str) -> bool:
    """By its name, so that notes may lie among the images; one that cannot be decoded is refused, not left out."""
    return file.lower().endswith(IMAGE_SUFFIXES)


_READERS: dict[str, Callable[[SourceRequest], Source]] = {
    "digits": _digits,
    "cifar10": _torchvision,
    "cifar100": _torchvision,
    "fashion-mnist": _torchvision,
    "parquet": _parquet,
    "image-folder": _image_folder,
}


# -- images --------------------------------------------------------------------------------------------------------


def _decode(content: str | bytes, place: str, size: int | None) -> Image.Image:
    """The image (of an animated one the first frame) in a file or in bytes, as 8-bit grey or RGB."""
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as picture:
            if picture.mode == "F" or (picture.mode == "I" and picture.format not in SIXTEEN_BITS_AS_I):
                raise RequestError(
                    f"{place}: the image has {'float' if picture.mode == 'F' else '32-bit integer'} pixels, and what "
                    "is white in them is not known; allowed: 8 or 16 bits a channel"
                )
            if picture.mode.startswith("I"):  # 16 bits a pixel; convert() would clip them to white
                converted = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
            else:
                converted = picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, UnidentifiedImageError):  # its text names the object that holds the bytes
            raise RequestError(f"{place}: the image does not decode (no image, or of an unknown format)") from error
        raise RequestError(f"{place}: the image does not decode ({error})") from error
    return converted if size is None else _resized(converted, size)


def _resized(picture: Image.Image, size: int) -> Image.Image:
    return picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.BILINEAR)


def _image_set(pictures: Sequence[Image.Image], places: Sequence[str], labels: Sequence[Any]) -> ImageSet:
    if not pictures:
        raise RequestError("data.path: no images found")
    colour = any(picture.mode == "RGB" for picture in pictures)
    first = pictures[0].size
    for picture, place in zip(pictures, places, strict=True):
        if picture.size != first:
            raise RequestError(
                f"{place}: image of {picture.size[0]}x{picture.size[1]} pixels, but {places[0]} has "
                f"{first[0]}x{first[1]}; set data.image_size to bring all to one size"
            )
    arrays = np.stack([np.asarray(picture.convert("RGB") if colour else picture) for picture in pictures])
    names, encoded = _encode_labels(labels, places)
    return ImageSet(arrays if colour else arrays[..., None], encoded, names)


def _encode_labels(labels: Sequence[Any], places: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Integer labels stay as they are, names are numbered in sorted order."""
    kind = int if isinstance(labels[0], int) else str
    for label, place in zip(labels, places, strict=True):
        if not isinstance(label, kind):
            raise RequestError(f"{place}: label {label!r} is neither an integer nor a name like the others")
    if kind is int:
        for label in (min(labels), max(labels)):
            if not 0 <= label < MOST_CLASSES:
                raise RequestError(
                    f"{places[labels.index(label)]}: label {label} is {'negative' if label < 0 else 'too large'}: "
                    f"integer labels number the classes from 0 on (allowed: 0 to {MOST_CLASSES - 1}); number them "
                    "anew, or give names"
                )
        return tuple(str(i) for i in range(max(labels) + 1)), np.asarray(labels, dtype=np.int64)
    names = sorted(set(labels))
    numbers = {name: i for i, name in enumerate(names)}
    return tuple(names), np.asarray([numbers[label] for label in labels], dtype=np.int64)


def _with_same_classes(train: ImageSet, test: ImageSet, path: Path) -> Source:
    ours, theirs = ("x".join(map(str, images.images.shape[1:])) for images in (train, test))
    if theirs != ours:
        raise RequestError(
            f"{path}: the test images are {theirs}, the training images {ours} (height x width x channels); give both "
            "splits the same channels, and set data.image_size to bring all to one size"
        )
    if set(test.classes) <= set(train.classes):
        numbers = {name: i for i, name in enumerate(train.classes)}
        renumber = np.asarray([numbers[name] for name in test.classes], dtype=np.int64)
        return Source(train, ImageSet(test.images, renumber[test.labels], train.classes))
    unknown = ", ".join(sorted(set(test.classes) - set(train.classes))[:5])
    raise RequestError(f"{path}: the test split has classes that the training split lacks: {unknown}")


def iter_batches(images: ImageSet, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Consecutive batches `(images, labels)`; the last one may be smaller."""
    for start in range(0, len(images), size):
        yield images.images[start : start + size], images.labels[start : start + size]

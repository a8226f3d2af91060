"""Parquet files of encoded images and labels, as Hugging Face stores image data sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lightcl.data.images import ImageSet, Source, SourceRequest, split_off_test
from lightcl.data.sources.decoding import decode, image_set, with_same_classes
from lightcl.data.sources.files import TEST_SPLITS, existing_path
from lightcl.errors import RequestError, required

IMAGE_COLUMNS = ("img", "image", "images")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target")


def has_test_file(request: SourceRequest) -> bool:
    """Whether the path is a folder with a test split."""
    folder = request.path
    return bool(folder and folder.is_dir() and any(next(folder.glob(f"{n}*.parquet"), None) for n in TEST_SPLITS))


def read_parquet(request: SourceRequest) -> Source:
    """A parquet file, or a folder with `train*.parquet` and optionally `test*.parquet` (or val, validation)."""
    path = existing_path(request)
    if path.is_file():
        return _split(_read([path], request), request)
    train = sorted(path.glob("train*.parquet"))
    if not train:
        raise RequestError(f"data.path: {path} holds no train*.parquet (a single file may be named instead)")
    images, owners = _read(train, request)
    for name in TEST_SPLITS:
        files = sorted(path.glob(f"{name}*.parquet"))
        if files:
            test, test_owners = _read(files, request)
            source = with_same_classes(images, test, path)
            if request.group_column is None:
                return source
            names = _group_names([*owners, *test_owners])
            return Source(_grouped(source.train, owners, names), _grouped(source.test, test_owners, names))
    return _split((images, owners), request)


def _split(read: tuple[ImageSet, list[str]], request: SourceRequest) -> Source:
    images, owners = read
    if request.group_column is not None:
        images = _grouped(images, owners, _group_names(owners))
    return split_off_test(images, request.test_fraction, request.seed)


def _group_names(owners: Sequence[str]) -> tuple[str, ...]:
    """Sorted names; numbers in the order of their value."""
    return tuple(sorted(set(owners), key=lambda name: (len(name), name) if name.isdecimal() else (0, name)))


def _grouped(images: ImageSet, owners: Sequence[str], names: tuple[str, ...]) -> ImageSet:
    numbers = {name: i for i, name in enumerate(names)}
    groups = np.asarray([numbers[owner] for owner in owners], dtype=np.int64)
    return replace(images, groups=groups, group_names=names)


def _read(files: Sequence[Path], request: SourceRequest) -> tuple[ImageSet, list[str]]:
    """Images, and per image the value of `request.group_column` as text (an empty list without that column)."""
    pictures: list[Image.Image] = []
    places: list[str] = []
    labels: list[Any] = []
    owners: list[str] = []
    for file in files:
        table = _open(file, request)
        columns = _columns(file, table.schema_arrow.names, request)
        for row, (cell, label, *owner) in enumerate(_rows(file, table, columns)):
            place = f"{file}, row {row}"
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            if not isinstance(content, bytes):
                raise RequestError(f"{place}: column {columns[0]!r} holds no encoded image bytes")
            if owner and not isinstance(owner[0], int | str):
                raise RequestError(
                    f"{place}: column {request.group_column!r} is {owner[0]!r}, neither an integer nor a name; name "
                    "another column by fleet.partition_by"
                )
            pictures.append(decode(content, place, request.image_size))
            places.append(place)
            labels.append(label)
            owners += [str(value) for value in owner]
    return image_set(pictures, places, labels), owners


def _open(file: Path, request: SourceRequest) -> Any:
    """pyarrow's ParquetFile."""
    pa, pq = (
        required("pyarrow", "data", f"for data.source: {request.name}"),
        required("pyarrow.parquet", "data", f"for data.source: {request.name}"),
    )
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise RequestError(f"{file}: not a parquet file ({error})") from error


def _columns(file: Path, names: list[str], request: SourceRequest) -> list[str]:
    """Names of the image column, the label column and, if requested, the group column."""
    columns = [
        _column(file, names, request.image_column, IMAGE_COLUMNS, "data.image_column"),
        _column(file, names, request.label_column, LABEL_COLUMNS, "data.label_column"),
    ]
    if request.group_column is not None:
        columns.append(_column(file, names, request.group_column, (), "fleet.partition_by"))
    return columns


def _rows(file: Path, table: Any, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """The values of these columns, row by row."""
    import pyarrow as pa

    try:
        for batch in table.iter_batches(1024, columns=list(dict.fromkeys(columns))):
            yield from zip(*(batch[column].to_pylist() for column in columns), strict=True)
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{file}: damaged ({error})") from error


def _column(file: Path, names: list[str], wanted: str | None, usual: tuple[str, ...], key: str) -> str:
    candidates = (wanted,) if wanted else usual
    for name in candidates:
        if name in names:
            return name
    raise RequestError(f"{file}: no column {' or '.join(candidates)} (it has: {', '.join(names)}); set {key}")

"""Sources of images by name: one file per reader, and a registry for your own sources.

A reader returns uint8 images and integer labels in a train and a test split (`Source`); `load_source` decodes them once
and serves them from the cache afterwards. A plugin adds a source with `register_source(name, reader)`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightcl.data.images import (
    UNREADABLE,
    ImageSet,
    Source,
    SourceRequest,
    iter_batches,
    read_source,
    return_freed_memory,
    split_off_test,
    write_source,
)
from lightcl.data.sources.digits import read_digits
from lightcl.data.sources.field import FIELD, refuse_field
from lightcl.data.sources.files import existing_path, files_below
from lightcl.data.sources.image_folder import IMAGE_SUFFIXES, has_test_folder, read_image_folder
from lightcl.data.sources.parquet import has_test_file, read_parquet
from lightcl.data.sources.torchvision_sets import read_torchvision_set
from lightcl.errors import RequestError, nearest
from lightcl.plugins import source_digest
from lightcl.registry import Registry
from lightcl.storage.files import cache_folder

__all__ = [
    "ImageSet", "Source", "SourceRequest", "comes_to_boards", "iter_batches", "load_source",
    "reads_own_files", "register_source", "source_kind", "source_names", "split_off_test",
]  # fmt: skip

Reader = Callable[[SourceRequest], Source]


@dataclass(frozen=True)
class SourceKind:
    """A named source. `own_files`: it reads the user's files, so that it needs `data.path`.

    `has_test_split` says whether the source has its own test split; `data.test_fraction` and the seed then have no
    effect. `code` is a digest of the reader's file, so that a changed plugin is read again.
    """

    read: Reader
    own_files: bool = False
    has_test_split: Callable[[SourceRequest], bool] = lambda request: False
    code: str | None = None
    suffixes: tuple[str, ...] = ("",)
    """Of the files below `data.path` that are read; by default any file may be."""
    on_boards: bool = False
    """Its images come to boards while a run goes on: nothing can be loaded before, or on another machine."""


_BUILT_IN = {
    "digits": SourceKind(read_digits),
    "cifar10": SourceKind(read_torchvision_set, has_test_split=lambda request: True),
    "cifar100": SourceKind(read_torchvision_set, has_test_split=lambda request: True),
    "fashion-mnist": SourceKind(read_torchvision_set, has_test_split=lambda request: True),
    "parquet": SourceKind(read_parquet, own_files=True, has_test_split=has_test_file),
    "image-folder": SourceKind(
        read_image_folder, own_files=True, has_test_split=has_test_folder, suffixes=IMAGE_SUFFIXES
    ),
    FIELD: SourceKind(refuse_field, on_boards=True),
}
SOURCES: Registry[SourceKind] = Registry("data source", "data.source", origin=lambda kind: kind.read)
"""All sources by name, including those of plugins."""
for _name, _kind in _BUILT_IN.items():
    SOURCES.register(_name, _kind)


def register_source(
    name: str,
    reader: Reader,
    *,
    own_files: bool = False,
    has_test_split: Callable[[SourceRequest], bool] = lambda request: False,
) -> None:
    """Makes `reader` available as `data.source: NAME`; a plugin that is loaded twice replaces its own entry.

    Raises RequestError for the name of a built-in source, and for a name that another reader has.
    """
    if name in _BUILT_IN:
        raise RequestError(f"data source {name!r} is built in; register yours under another name")
    SOURCES.register(name, SourceKind(reader, own_files, has_test_split, source_digest(reader)))


def source_names() -> tuple[str, ...]:
    """Names of all sources, built in and registered."""
    return tuple(SOURCES)


def source_kind(name: str) -> SourceKind:
    """The source of this name. Raises RequestError for an unknown one."""
    if name not in SOURCES:
        raise RequestError(
            f"data.source is {name!r}: unknown{nearest(name, SOURCES)} (allowed: {', '.join(SOURCES)}, or a source "
            "that a plugin registers)"
        )
    return SOURCES[name]


def reads_own_files(name: str) -> bool:
    """Whether this source reads the user's files and so needs `data.path`."""
    return source_kind(name).own_files


def comes_to_boards(name: str) -> bool:
    """Whether the images of this source come to boards while a run goes on (`field`)."""
    return source_kind(name).on_boards


def load_source(request: SourceRequest) -> Source:
    """Train and test images of a source; decoded on first use, memory-mapped from the cache afterwards.

    Raises RequestError for an unknown source, a missing path or package, an unreadable image, images of several sizes,
    or labels out of range.
    """
    kind = source_kind(request.name)
    split = None if kind.has_test_split(request) else (request.test_fraction, request.seed)
    parts: list[Any] = [_fingerprint(request), request.image_size, split, 4]
    if request.group_column is not None:
        parts.append(request.group_column)
    folder = cache_folder() / "images" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
    with suppress(*UNREADABLE):
        return read_source(folder)
    write_source(folder, kind.read(request))
    return_freed_memory()
    return read_source(folder)


def _fingerprint(request: SourceRequest) -> list[Any]:
    """Changes when the files behind the source, or a plugin's code, change."""
    kind = source_kind(request.name)
    parts: list[Any] = [request.name, request.image_column, request.label_column]
    if kind.code is not None:
        parts.append(kind.code)
    if kind.own_files or (kind.code is not None and request.path is not None):
        path = existing_path(request)
        files = files_below(path, kind.suffixes) if path.is_dir() else [path]
        # The name counts beside the place that it leads to: the folder of a link is the class of the images behind it.
        stats = [
            (os.path.relpath(p, path), str(p.resolve()), s.st_size, s.st_mtime_ns)
            for p in map(Path, files)
            if p.is_file()
            for s in [p.stat()]
        ]
        parts.append(hashlib.sha256(json.dumps(stats).encode()).hexdigest())
    elif request.path is not None:  # a user's copy of a downloaded set
        parts.append(str(request.path.resolve()))
    return parts

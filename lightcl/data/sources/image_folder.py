"""One folder of image files per class; needs only Pillow."""

from __future__ import annotations

from pathlib import Path

from lightcl.data.images import ImageSet, Source, SourceRequest, split_off_test
from lightcl.data.sources.decoding import decode, image_set, with_same_classes
from lightcl.data.sources.files import TEST_SPLITS, existing_path, files_below
from lightcl.errors import RequestError

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm", ".jp2", ".jxl", ".avif", ".heic", ".heif", ".tga", ".ico", ".psd", ".svg",
)  # fmt: skip
"""Files with other suffixes, such as notes, are ignored; an image that does not decode is an error."""


def has_test_folder(request: SourceRequest) -> bool:
    """Whether the path has folders `train` and `test` (or `val`); without `train`, these names are classes."""
    folder = request.path
    return bool(folder and (folder / "train").is_dir() and any((folder / name).is_dir() for name in TEST_SPLITS))


def read_image_folder(request: SourceRequest) -> Source:
    """A folder per class, either directly below the path or below its `train` and `test` (or `val`) folders."""
    path = existing_path(request)
    if (path / "train").is_dir():
        images = _read(path / "train", request)
        for name in TEST_SPLITS:
            if (path / name).is_dir():
                return with_same_classes(images, _read(path / name, request), path)
        return split_off_test(images, request.test_fraction, request.seed)
    return split_off_test(_read(path, request), request.test_fraction, request.seed)


def _read(path: Path, request: SourceRequest) -> ImageSet:
    files, labels = [], []
    for name in _class_names(path):
        found = _image_files(path / name)
        if not found:
            raise RequestError(f"data.path: {path} is not an image folder: its class folder {name!r} holds no image")
        files += found
        labels += [name] * len(found)
    return image_set([decode(file, file, request.image_size) for file in files], files, labels)


def _class_names(path: Path) -> list[str]:
    """Names of the class folders, sorted."""
    if not path.is_dir():
        raise RequestError(f"data.path: {path} is not an image folder: it is a file")
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if not names:
        raise RequestError(f"data.path: {path} is not an image folder: it holds no class folders")
    return names


def _image_files(folder: Path) -> list[str]:
    """Image files below a class folder."""
    return files_below(folder, IMAGE_SUFFIXES)

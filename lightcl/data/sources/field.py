"""What lies in the folder of a field source: images that came to a board, with or without a label.

    FOLDER/cup/*.jpg          labeled by the folder; folders below it count as well
    FOLDER/unlabeled/*.jpg    waits for a label
    FOLDER/labels.csv         rows `image,label` for images anywhere below FOLDER; the last row of an image counts

`lightcl/data/streams/field.py` makes tasks of it. Nothing here opens an image.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NoReturn

from lightcl.data.images import SourceRequest
from lightcl.data.sources.image_folder import IMAGE_SUFFIXES
from lightcl.errors import RequestError, nearest, one_line, shown

FIELD = "field"
UNLABELED = "unlabeled"
ROWS = "labels.csv"
SETTLE_SECONDS = 5.0
"""A file that changed less long ago may still be copied."""
MOST_ROW_PROBLEMS = 3


@dataclass(frozen=True)
class FieldFile:
    """An image file; `name` is its path below the folder, `arrived` when it was last written, moved or renamed."""

    name: str
    size: int
    modified: int
    arrived: float

    @property
    def stamp(self) -> tuple[str, int, int]:
        """Another one says that the content may be another."""
        return self.name, self.size, self.modified


@dataclass
class Contents:
    """The images of a folder. `arriving` counts files that may still be copied; `problems` are texts for people."""

    labeled: list[tuple[FieldFile, str]] = field(default_factory=list)
    unlabeled: list[FieldFile] = field(default_factory=list)
    arriving: int = 0
    problems: list[str] = field(default_factory=list)


def refuse_field(request: SourceRequest) -> NoReturn:
    """The reader of the source: there is nothing to read beforehand."""
    raise RequestError(
        f"data.source: {FIELD} collects images on boards while a run goes on, so this command has no images to load; "
        "start the run with `lightcl server run` (docs/how-to/field.md). To try the other keys on images that are "
        "there already, set data.source: image-folder, and leave data.classes and data.keep out"
    )


def read_contents(
    folder: Path, classes: Sequence[str], now: float, settle: float = SETTLE_SECONDS, taken: Collection[str] = ()
) -> Contents:
    """Looks at all files, opens none but `ROWS`. `taken` are names that may be missing: their images were learned.

    Raises OSError where the folder cannot be read.
    """
    found = Contents()
    files = {}
    for file in _image_files(folder):
        if settled(file.arrived, now, settle):
            files[file.name] = file
        else:
            found.arriving += 1
    rows = _labels(folder, classes, files, taken, now, settle, found)
    stray: Counter[str] = Counter()
    for name, file in sorted(files.items()):
        place = PurePosixPath(name).parts[0] if "/" in name else ""
        by_folder = place if place in classes else None
        label = rows.get(name, by_folder)
        if by_folder and label != by_folder:
            found.problems.append(f"{name} has the label {label!r} in {ROWS}, but lies in {by_folder!r}: not used")
        elif label is not None:
            found.labeled.append((file, label))
        elif place == UNLABELED:
            found.unlabeled.append(file)
        else:
            stray[place] += 1
    found.problems += [_about_stray(place, count, classes) for place, count in sorted(stray.items())]
    return found


def settled(arrived: float, now: float, settle: float) -> bool:
    """Whether a file is complete, as far as its time says; a time in the future is that of a clock that was set."""
    return abs(now - arrived) >= settle


def _about_stray(place: str, count: int, classes: Sequence[str]) -> str:
    images = f"{count} image{'s' if count > 1 else ''}"
    if not place:
        return f"{images} beside the folders, not used: move to a class's folder or to {UNLABELED}"
    return f"folder {shown(place)} is not a class{nearest(place, classes)} ({images}, not used)"


def _image_files(folder: Path) -> Iterator[FieldFile]:
    """Image files below a folder; hidden files and folders are left out: copying programs use them."""
    places = [""]
    while places:
        place = places.pop()
        with os.scandir(folder / place) as entries:
            for entry in entries:
                name = f"{place}{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    places.append(f"{name}/")
                elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file(follow_symlinks=False):
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # moved in this moment
                        continue
                    yield FieldFile(name, status.st_size, status.st_mtime_ns, status.st_ctime)


def _labels(
    folder: Path, classes: Sequence[str], files: Mapping[str, FieldFile], taken: Collection[str], now: float,
    settle: float, found: Contents,
) -> dict[str, str]:  # fmt: skip
    """The labels in `ROWS` by image; adds what is wrong with rows to the problems."""
    try:
        status = (folder / ROWS).stat()
        content = (folder / ROWS).read_bytes()
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        found.problems.append(f"{ROWS} is not UTF-8 ({error}): none of its rows is used")
        return {}
    if not text.endswith("\n") and not settled(status.st_ctime, now, settle):
        text = text[: text.rfind("\n") + 1]  # its last row is being written
    labels: dict[str, str] = {}
    wrong: list[str] = []
    missing: list[str] = []
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            if not row or (reader.line_num == 1 and [cell.strip().lower() for cell in row] == ["image", "label"]):
                continue
            problem = _problem_of(row, classes)
            if problem:
                wrong.append(f"{ROWS}, line {reader.line_num}: {problem}")
                continue
            name, label = PurePosixPath(row[0].strip()).as_posix(), row[1].strip()
            if name in files:
                labels[name] = label
            elif name not in taken and not (folder / name).exists():
                missing.append(name)
    except csv.Error as error:
        wrong.append(f"{ROWS}, line {reader.line_num}: {error}")
    if missing:
        count = f"{len(missing)} image{'s' if len(missing) > 1 else ''}"
        wrong.append(f"{ROWS} names {count} not in the folder, such as {shown(missing[0])}")
    found.problems += wrong[:MOST_ROW_PROBLEMS]
    if len(wrong) > MOST_ROW_PROBLEMS:
        found.problems.append(f"{len(wrong) - MOST_ROW_PROBLEMS} more problems in {ROWS}")
    return labels


def _problem_of(row: Sequence[str], classes: Sequence[str]) -> str | None:
    """What is wrong with a row, or None."""
    if len(row) != 2:
        return f"expected two cells, image,label, found {len(row)}"
    path, label = PurePosixPath(row[0].strip()), row[1].strip()
    if path.is_absolute() or ".." in path.parts or "\0" in row[0] or not path.parts:
        return f"{shown(row[0])} is not a path below the folder"
    if not path.name.lower().endswith(IMAGE_SUFFIXES):
        return f"{shown(row[0])} is not the name of an image"
    if label not in classes:
        return f"{one_line(shown(label), 80)} is not a class{nearest(label, classes)}"
    return None

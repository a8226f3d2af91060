"""Tasks from the field: labeled images that came to a board become its tasks.

A task is cut when `stream.ready_images` images have come, or `stream.ready_after` seconds after the first of them. It
takes all labeled images that are there, each by the digest of its file and each once in a stream. From then on the task
is exactly these images: they are kept decoded in the device's state folder, whatever happens to the files.

    <device>/field/about.json             FieldPlan: for `lightcl device status` and `label`
    <device>/field/task-00003/task.json   the images: file, label, digest, and part: train, held-out or test
    <device>/field/task-00003/train.npy   uint8 [N, H, W, 3]; also held-out.npy, test.npy
    <device>/field/task-00003/deleted     which parts `data.keep` has deleted: written when it is done

A task's folder is written under another name, synced and renamed, so that a killed process leaves all of it or nothing.

`lightcl device status` and `label` import this file, so it does not need PyTorch; `lightcl/data/streams/field.py` does.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from lightcl.data.images import ImageSet
from lightcl.data.sources.decoding import decode
from lightcl.data.sources.field import SETTLE_SECONDS, UNLABELED, FieldFile, read_contents
from lightcl.errors import Failure, RequestError, shown
from lightcl.seeds import numpy_generator
from lightcl.storage.files import sync, write_atomically

if TYPE_CHECKING:
    from lightcl.data.streams.plan import StreamPlan

Part = Literal["train", "held-out", "test"]
PARTS: tuple[Part, ...] = ("train", "held-out", "test")
CHANNELS = 3
"""Images are RGB: boards must agree on the channels before any image is there."""
ASK_SECONDS, ARRIVING_SECONDS = 30.0, 10.0
"""After which a device that waits for images wants to be asked again; while files are arriving, sooner."""
MOST_PROBLEMS = 3
ABOUT, MANIFEST, DELETED = "about.json", "task.json", "deleted"
JPEG, EMPTY_END = b"\xff\xd8", b"\0" * 512
INSPECTED = 16_384
"""Files whose content is remembered, so that images that wait are read once per process."""


class NotReady(Exception):
    """The images of a task are not there so far; it may be asked for again after `seconds`."""

    def __init__(self, reason: str, seconds: float) -> None:
        super().__init__(reason)
        self.reason, self.seconds = reason, seconds


class FieldDamaged(Failure):
    """A task that was cut cannot be read; the text says what to do."""


@dataclass(frozen=True)
class FieldPlan:
    """Everything that decides how a folder's images become tasks."""

    path: str
    classes: tuple[str, ...]
    device: int
    tasks: int
    ready_images: int
    ready_after: float | None
    min_samples: int
    min_classes: int
    image_size: int
    test_fraction: float
    held_out: float
    evaluate_on: Literal["test", "held-out"]
    keep: Literal["none", "buffer", "all"]
    seed: int
    joint: bool

    @classmethod
    def of(cls, plan: StreamPlan, device: int) -> Self:
        """`data.path` is set: a board names its own folder."""
        data, stream = plan.data, plan.stream
        assert data.path is not None
        assert data.classes is not None  # checked with the section
        assert data.image_size is not None
        return cls(
            str(data.path), data.classes, device, stream.tasks, stream.ready_images, stream.ready_after,
            stream.min_samples, stream.classes_per_task, data.image_size, data.test_fraction, stream.held_out,
            stream.evaluate_on, data.keep, plan.seed, plan.joint,
        )  # fmt: skip

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From a folder `field`. Raises OSError, and ValueError for another file."""
        try:
            values = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            return cls(**{**values, "classes": tuple(values["classes"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / ABOUT}: not a field's description ({error})") from error

    def prepare(self, folder: Path) -> None:
        """Makes the folders of the classes and `unlabeled`, and notes the plan in `folder`.

        Raises RequestError where `path` is not a folder: a disk may not be mounted.
        """
        path = Path(self.path)
        if not path.is_dir():
            raise RequestError(f"{path} is not a folder (data of this board); make it, or mount its disk")
        for name in (*self.classes, UNLABELED):
            with suppress(OSError):  # a read-only disk: its images can be learned as well
                (path / name).mkdir(exist_ok=True)
        self.note(folder)

    def note(self, folder: Path) -> None:
        """Writes `ABOUT`, unless it is there already. Raises OSError where the disk refuses it."""
        text = json.dumps(asdict(self))
        file = folder / ABOUT
        if not file.exists() or file.read_text(encoding="utf-8", errors="replace") != text:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, text)


@dataclass(frozen=True)
class FieldImage:
    """An image of a cut task. `digest` is the SHA-256 of its file."""

    file: str
    size: int
    modified: int
    digest: str
    label: str
    part: Part

    @property
    def stamp(self) -> tuple[str, int, int]:
        return self.file, self.size, self.modified


@dataclass(frozen=True)
class CutTask:
    """A task that was cut: its number, its folder and its images."""

    number: int
    folder: Path
    images: tuple[FieldImage, ...]

    def of_part(self, part: Part) -> list[FieldImage]:
        return [image for image in self.images if image.part == part]

    @property
    def labels(self) -> set[str]:
        return {image.label for image in self.images}

    @property
    def deleted(self) -> frozenset[Part]:
        """The parts whose images are deleted."""
        with suppress(OSError):
            return frozenset(part for part in PARTS if part in (self.folder / DELETED).read_text().split())
        return frozenset()


@dataclass
class Waiting:
    """What waits in the folder for the next task."""

    labeled: list[tuple[FieldFile, str]] = field(default_factory=list)
    unlabeled: int = 0
    arriving: int = 0
    duplicates: int = 0
    """Copies of images that are in a task, or that wait under another name."""
    problems: list[str] = field(default_factory=list)

    @property
    def classes(self) -> int:
        return len({label for _, label in self.labeled})

    def text(self, task: int, plan: FieldPlan) -> str:
        """For people: `task 3: 40 of 100 labeled images (12 wait for a label)`."""
        notes = []
        if self.classes < plan.min_classes and len(self.labeled) >= plan.ready_images:
            notes.append(f"of {self.classes} class{'' if self.classes == 1 else 'es'}, at least {plan.min_classes}")
        if self.unlabeled:
            notes.append(f"{self.unlabeled} wait for a label")
        if self.arriving:
            notes.append(f"{self.arriving} are arriving")
        if self.duplicates:
            notes.append(f"{self.duplicates} copies are left out")
        text = f"task {task}: {len(self.labeled)} of {plan.ready_images} labeled images"
        text += f" ({', '.join(notes)})" if notes else ""
        more = len(self.problems) - MOST_PROBLEMS
        problems = self.problems[:MOST_PROBLEMS] + ([f"{more} more problems"] if more > 0 else [])
        return "; ".join([text, *problems])


def choose_parts(labels: Sequence[str], plan: FieldPlan, task: int) -> list[Part]:
    """The part of each image, drawn by the seed: test images first, then held-out ones among the others.

    Each class gives about its share, all together round(fraction x N) where the classes allow it, and every class keeps
    an image to train on. By hand: 10 images of one class and `test_fraction` 0.2 owe 0.5 + 0.2 per image, so the third
    and the eighth of a drawn order are test images.
    """
    random = numpy_generator(plan.seed, "field", plan.device, task)
    order = sorted(random.permutation(len(labels)).tolist(), key=lambda number: labels[number])
    left = Counter(labels)
    parts: list[Part] = ["train"] * len(labels)
    wanted: tuple[tuple[Part, float], ...] = (("test", plan.test_fraction), ("held-out", plan.held_out))
    for part, fraction in wanted:
        owed = 0.5
        for number in order:
            if parts[number] != "train":
                continue
            owed += fraction
            if owed > 1 - 1e-9 and left[labels[number]] > 1:
                parts[number], owed = part, owed - 1
                left[labels[number]] -= 1
    return parts


class FieldTasks:
    """The tasks of one device: those that were cut, in `folder`, and the images that wait for the next one.

    `clock` gives seconds since 1970; a file that changed less than `settle` seconds ago may still be copied.
    """

    def __init__(
        self, folder: Path, plan: FieldPlan, *, clock: Callable[[], float] = time.time, settle: float = SETTLE_SECONDS
    ) -> None:
        self.folder, self.plan = folder, plan
        self._clock, self._settle = clock, settle

    # -- tasks that were cut -----------------------------------------------------------------------------------

    @cached_property
    def cut(self) -> list[CutTask]:
        """All of them, by number. Raises FieldDamaged."""
        found: list[CutTask] = []
        while (folder := self._folder_of(len(found))).is_dir():
            found.append(CutTask(len(found), folder, _images_of(folder / MANIFEST, _time_of(folder / MANIFEST))))
        return found

    def _folder_of(self, number: int) -> Path:
        return self.folder / f"task-{number:05d}"

    def images(self, task: CutTask, part: Part) -> ImageSet:
        """The images of a part, memory-mapped; empty where they are deleted. Raises FieldDamaged."""
        plan = self.plan
        chosen = [] if part in task.deleted else task.of_part(part)
        numbers = {name: number for number, name in enumerate(plan.classes)}
        try:
            labels = np.asarray([numbers[image.label] for image in chosen], dtype=np.int64)
            shape = (len(chosen), plan.image_size, plan.image_size, CHANNELS)
            stored = _array(task.folder / f"{part}.npy") if chosen else np.zeros(shape, dtype=np.uint8)
            if stored.shape != shape or stored.dtype != np.uint8:
                raise ValueError(f"{part}.npy has the shape {stored.shape}, expected {shape}")
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise _damaged(task.folder, error) from error
        return ImageSet(stored, labels, plan.classes)

    # -- the next task -----------------------------------------------------------------------------------------

    def waiting(self, *, inspect: bool = True) -> Waiting:
        """What is there for the next task. Raises NotReady where the folder cannot be read.

        `inspect`: reads each image once, to leave out copies and files that are no images. Otherwise only names count.
        """
        names = {image.file for task in self.cut for image in task.images}
        stamps = {image.stamp for task in self.cut for image in task.images}
        try:
            contents = read_contents(Path(self.plan.path), self.plan.classes, self._clock(), self._settle, names)
        except OSError as error:
            raise NotReady(f"{self.plan.path} cannot be read ({error.strerror})", ASK_SECONDS) from error
        found = Waiting(unlabeled=len(contents.unlabeled), arriving=contents.arriving, problems=contents.problems)
        new = [(file, label) for file, label in contents.labeled if file.stamp not in stamps]
        if inspect:
            self._inspect(new, found)
        else:
            found.labeled = new
        return found

    def _inspect(self, new: Sequence[tuple[FieldFile, str]], found: Waiting) -> None:
        """Sorts labeled images into those that may be learned, copies, and files that are no images."""
        taken = {image.digest for task in self.cut for image in task.images}
        first: dict[str, tuple[FieldFile, str]] = {}
        for file, label in new:
            try:
                digest, problem = _inspected(self.plan.path, *file.stamp)
            except OSError as error:
                digest, problem = "", f"{file.name} cannot be read ({error.strerror})"
            if problem is not None:
                found.problems.append(problem)
            elif digest in taken:
                found.duplicates += 1
            elif digest in first:
                other, other_label = first[digest]
                if label == other_label:
                    found.duplicates += 1
                else:
                    found.problems.append(f"{other.name} and {file.name} are one image with two labels: not used")
                    first[digest] = (other, "")
            else:
                first[digest] = (file, label)
        found.labeled = [(file, label) for file, label in first.values() if label]

    def gather(self, number: int) -> CutTask:
        """The task of this number, cut now if its images are there. Raises NotReady, FieldDamaged, OSError."""
        while len(self.cut) <= number:
            self._cut_next()
        return self.cut[number]

    def _cut_next(self) -> None:
        task, changed = len(self.cut), set[str]()
        while True:
            found = self.waiting()
            found.labeled = [(file, label) for file, label in found.labeled if file.name not in changed]
            parts = choose_parts([label for _, label in found.labeled], self.plan, task)
            if not self._ready(found, parts):
                left = ARRIVING_SECONDS if found.arriving or changed else self._seconds_left(found)
                raise NotReady(self._reason(task, found), left if left > 0 else ASK_SECONDS)
            changed_now = self._write(task, found.labeled, parts)
            if not changed_now:
                del self.cut  # it is read again
                return
            changed |= changed_now

    def _ready(self, found: Waiting, parts: Sequence[Part]) -> bool:
        """Whether what waits makes a task, with these parts."""
        plan, count = self.plan, Counter(parts)
        if count["train"] < plan.min_samples or not count[plan.evaluate_on] or found.classes < plan.min_classes:
            return False
        return len(found.labeled) >= plan.ready_images or self._seconds_left(found) <= 0

    def _reason(self, task: int, found: Waiting) -> str:
        """Why what waits makes no task."""
        text = found.text(task, self.plan)
        if len(found.labeled) >= self.plan.ready_images and found.classes >= self.plan.min_classes:
            least = self.plan.min_samples
            text += f"; too few to train on (stream.min_samples: {least}) and to test on (data.test_fraction)"
        return text

    def _seconds_left(self, found: Waiting) -> float:
        """Until the images that wait may make a task though they are few; at most ASK_SECONDS."""
        if self.plan.ready_after is None or not found.labeled:
            return ASK_SECONDS
        first = min(file.arrived for file, _ in found.labeled)
        return min(first + self.plan.ready_after - self._clock(), ASK_SECONDS)

    def _write(self, number: int, chosen: Sequence[tuple[FieldFile, str]], parts: Sequence[Part]) -> set[str]:
        """Writes the task; or nothing, and returns the files that have changed since they were inspected."""
        staging = self.folder / ".cutting"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            images: list[FieldImage] = []
            changed: set[str] = set()
            for part in PARTS:
                members = [entry for entry, its in zip(chosen, parts, strict=True) if its == part]
                self._write_part(staging, part, members, images, changed)
            if changed:
                return changed
            values = {"task": number, "cut_at": self._clock(), "images": [asdict(image) for image in images]}
            (staging / MANIFEST).write_text(json.dumps(values), encoding="utf-8")
            for file in (*staging.iterdir(), staging):
                sync(file)
            staging.rename(self._folder_of(number))
            sync(self.folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # it is there only where the task is not
        return set()

    def _write_part(
        self, staging: Path, part: Part, members: Sequence[tuple[FieldFile, str]], images: list[FieldImage],
        changed: set[str],
    ) -> None:  # fmt: skip
        """Decodes the images of a part into its file, one at a time; notes them in `images`, or in `changed`."""
        if not members:
            return
        shape = (len(members), self.plan.image_size, self.plan.image_size, CHANNELS)
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        with (staging / f"{part}.npy").open("wb") as array:  # no memory map: a full disk would kill the process
            np.lib.format.write_array_header_1_0(array, header)
            for file, label in members:
                digest, pixels = self._read(file)
                if pixels is None:
                    changed.add(file.name)
                    continue
                array.write(pixels.tobytes())
                images.append(FieldImage(file.name, file.size, file.modified, digest, label, part))

    def _read(self, file: FieldFile) -> tuple[str, np.ndarray | None]:
        """Digest and pixels `[H, W, 3]` of a file; None where it is not the one that was inspected."""
        expected = ""
        try:
            expected, _ = _inspected(self.plan.path, *file.stamp)
            content = (Path(self.plan.path) / file.name).read_bytes()
            if (digest := hashlib.sha256(content).hexdigest()) != expected:
                return digest, None
            return digest, np.asarray(decode(content, file.name, self.plan.image_size).convert("RGB"))
        except (OSError, RequestError):
            return expected, None

    # -- images that may go ------------------------------------------------------------------------------------

    def delete_before(self, number: int) -> None:
        """Deletes what `data.keep` does not keep of the tasks before `number`; repeats what a crash left undone.

        Call it when the state with task `number` begun is saved: then no state on disk needs the older tasks' images.
        """
        keep = self.plan.keep
        if keep == "all":
            return
        gone: frozenset[Part] = frozenset(PARTS) if keep == "none" else frozenset(PARTS) - {self.plan.evaluate_on}
        for task in self.cut[:number]:
            if task.deleted != gone:
                self._delete(task, gone)

    def _delete(self, task: CutTask, gone: Collection[Part]) -> None:
        files = {Path(self.plan.path) / image.file: image for image in task.images if image.part in gone}
        for file, image in files.items():
            _unlink_same(file, image)
        for place in {file.parent for file in files}:  # or a power cut brings them back, and nobody looks again
            with suppress(FileNotFoundError):
                sync(place)
        write_atomically(task.folder / DELETED, " ".join(part for part in PARTS if part in gone))
        for part in gone:
            (task.folder / f"{part}.npy").unlink(missing_ok=True)


# -- files ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=INSPECTED)
def _inspected(folder: str, name: str, size: int, modified: int) -> tuple[str, str | None]:
    """SHA-256 of a file's content, and why it is not used, or None. It is decoded: half a file may look settled.

    Raises OSError.
    """
    content = (Path(folder) / name).read_bytes()
    if content.startswith(JPEG) and content.endswith(EMPTY_END):
        return "", f"{name} ends with zeros, as a file that is not copied to its end"  # it would decode, half gray
    try:
        decode(content, name, None)
    except RequestError as error:
        return "", str(error)
    return hashlib.sha256(content).hexdigest(), None


def _unlink_same(file: Path, image: FieldImage) -> None:
    """Deletes a file if it still has this image's content. Raises OSError where the disk refuses it."""
    with suppress(FileNotFoundError):
        if hashlib.sha256(file.read_bytes()).hexdigest() == image.digest:
            file.unlink()


def _array(file: Path) -> np.ndarray:
    array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    return array


def _time_of(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError as error:
        raise _damaged(file.parent, error) from error


@lru_cache(maxsize=1024)
def _images_of(file: Path, modified: int) -> tuple[FieldImage, ...]:
    """The images in a manifest, which never changes once it is there. Raises FieldDamaged."""
    try:
        entries: list[Mapping[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["images"]
        return tuple(FieldImage(**entry) for entry in entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file.parent, error) from error


def _damaged(folder: Path, error: Exception) -> FieldDamaged:
    return FieldDamaged(
        f"{folder}: the images of a task cannot be read ({type(error).__name__}: {error}); restore the folder from a "
        f"copy, or remove the device's state folder {shown(str(folder.parents[1]))}: it then begins its stream again"
    )

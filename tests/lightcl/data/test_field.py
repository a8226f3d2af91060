"""Tasks from the field: when a task is cut, from which images, what is refused, and what is deleted."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightcl.data import field
from lightcl.data.field import ASK_SECONDS, FieldDamaged, FieldTasks, NotReady, choose_parts
from lightcl.data.sources.field import read_contents
from lightcl.errors import RequestError
from tests.lightcl.data.field import draw, drop, later, plan, tasks
from tests.lightcl.data.odd_images import EPS, blank_png, fake_ghostscript


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "images"
    place.mkdir()
    plan(place).prepare(tmp_path / "state")
    return place


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def reason(found: FieldTasks, number: int = 0) -> str:
    with pytest.raises(NotReady) as refused:
        found.gather(number)
    return refused.value.reason


def names(found: FieldTasks, number: int) -> list[str]:
    return sorted(image.file for image in found.cut[number].images)


# -- which part an image gets ----------------------------------------------------------------------------------------


def test_the_parts_of_ten_images_of_one_class(tmp_path: Path) -> None:
    """0.5 + 0.2 per image: the third owes 1.1, of which 0.1 is left; so the eighth is the next."""
    one = plan(tmp_path, test_fraction=0.2)
    parts = choose_parts(["cup"] * 10, one, task=0)
    order = field.numpy_generator(0, "field", 0, 0).permutation(10).tolist()
    assert [position for position, number in enumerate(order) if parts[number] == "test"] == [2, 7]
    assert choose_parts(["cup"] * 10, one, task=0) == parts
    assert choose_parts(["cup"] * 10, one, task=1) != parts, "another task is drawn anew"


def test_held_out_images_are_drawn_among_those_that_are_left(tmp_path: Path) -> None:
    """20 images: round(0.2 x 20) = 4 to test on; of the other 16, round(0.25 x 16) = 4 are held out."""
    parts = choose_parts(["cup", "bottle"] * 10, plan(tmp_path, held_out=0.25), task=0)
    assert [parts.count(part) for part in ("train", "held-out", "test")] == [12, 4, 4]
    by_class = {label: [part for part, its in zip(parts, ["cup", "bottle"] * 10, strict=True) if its == label]
                for label in ("cup", "bottle")}  # fmt: skip
    assert all(1 <= found.count("test") <= 3 for found in by_class.values())


def test_every_class_keeps_an_image_to_train_on(tmp_path: Path) -> None:
    labels = ["cup"] * 8 + ["bottle"]
    parts = choose_parts(labels, plan(tmp_path, test_fraction=0.9), task=0)
    assert parts[8] == "train"
    assert parts[:8].count("train") == 1


# -- when a task is cut ----------------------------------------------------------------------------------------------


def test_a_task_is_cut_when_enough_labeled_images_have_come(folder: Path, state: Path) -> None:
    drop(folder, "cup", range(5))
    drop(folder, "bottle", range(10, 14))
    drop(folder, "unlabeled", range(20, 32))
    assert reason(tasks(state, folder)) == "task 0: 9 of 10 labeled images (12 wait for a label)"
    drop(folder, "bottle/more", range(14, 16))
    cut = tasks(state, folder).gather(0)
    assert len(cut.images) == 11, "all that are there"
    assert cut.labels == {"cup", "bottle"}
    assert len(cut.of_part("test")) == 2  # round(0.2 x 11)
    assert reason(tasks(state, folder), 1) == "task 1: 0 of 10 labeled images (12 wait for a label)"


def test_a_task_needs_more_than_one_class(folder: Path, state: Path) -> None:
    drop(folder, "cup", range(12))
    assert reason(tasks(state, folder)) == "task 0: 12 of 10 labeled images (of 1 class, at least 2)"
    drop(folder, "bottle", range(20, 21))
    assert tasks(state, folder).gather(0).labels == {"cup", "bottle"}


def test_after_a_time_fewer_images_make_a_task(folder: Path, state: Path) -> None:
    drop(folder, "cup", range(3))
    drop(folder, "bottle", range(10, 12))
    early = FieldTasks(state, plan(folder, ready_after=100.0), clock=later)  # 60 s after they came
    with pytest.raises(NotReady) as refused:
        early.gather(0)
    assert refused.value.seconds == ASK_SECONDS
    soon = FieldTasks(state, plan(folder, ready_after=70.0), clock=later)
    with pytest.raises(NotReady) as refused:
        soon.gather(0)
    assert 5 < refused.value.seconds <= 10, "it is asked again when the time has come"
    cut = FieldTasks(state, plan(folder, ready_after=59.0), clock=later).gather(0)
    assert len(cut.images) == 5
    drop(folder, "cup", range(30, 32))
    drop(folder, "bottle", range(40, 41))
    few = FieldTasks(state, plan(folder, ready_after=1.0, min_samples=3), clock=later)
    with pytest.raises(NotReady) as refused:
        few.gather(1)
    assert refused.value.seconds == ASK_SECONDS, "not at once, though the time is over"


def test_files_that_are_being_copied_wait(folder: Path, state: Path) -> None:
    drop(folder, "cup", range(6))
    drop(folder, "bottle", range(10, 16))
    now = FieldTasks(state, plan(folder))
    with pytest.raises(NotReady) as refused:
        now.gather(0)
    assert refused.value.reason == "task 0: 0 of 10 labeled images (12 are arriving)"
    assert refused.value.seconds < ASK_SECONDS
    ahead = FieldTasks(state, plan(folder), clock=lambda: time.time() - 3600)  # the clock was set back
    assert len(ahead.gather(0).images) == 12


def test_half_a_file_is_never_learned_and_the_whole_one_is(folder: Path, state: Path) -> None:
    drop(folder, "cup", range(6))
    file = drop(folder, "bottle", range(10, 16))[0]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    found = tasks(state, folder)
    cut = found.gather(0)
    assert len(cut.images) == 11
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))  # as a copy that keeps the time of the photo
    drop(folder, "cup", range(30, 33))
    waiting = tasks(state, folder).waiting()
    assert len(waiting.labeled) == 4
    shutil.copy(folder / "cup" / "0000.png", folder / "cup" / "empty.jpg")
    (folder / "cup" / "empty.jpg").write_bytes(b"")
    assert "empty.jpg: the image does not decode" in tasks(state, folder).waiting().problems[0]


def test_a_file_that_is_dangerous_to_open_is_a_problem_of_this_file(
    folder: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghostscript = fake_ghostscript(folder.parent, monkeypatch)
    drop(folder, "cup", range(6))
    drop(folder, "bottle", range(10, 16))
    (folder / "cup" / "drawing.jpg").write_bytes(EPS)
    (folder / "cup" / "large.png").write_bytes(blank_png(8000, 6000))
    found = tasks(state, folder)
    assert len(found.gather(0).images) == 12
    problems = found.waiting().problems
    assert problems[0].startswith("cup/drawing.jpg: the image does not decode (not an image")
    assert problems[1].startswith("cup/large.png: the image has 8000x6000 pixels")
    assert not ghostscript.exists()


def test_hidden_and_other_files_are_left_out(folder: Path, state: Path) -> None:
    draw(folder / "cup" / ".0001.png", 1)
    draw(folder / ".trash" / "0002.png", 2)
    (folder / "cup" / "notes.txt").write_text("no image")
    (folder / "cup" / "linked.png").symlink_to(draw(folder.parent / "elsewhere.png", 3))
    assert tasks(state, folder).waiting().labeled == []


# -- each image once -------------------------------------------------------------------------------------------------


def test_a_restarted_process_has_the_same_tasks_and_learns_nothing_twice(folder: Path, state: Path) -> None:
    drop(folder, "cup", range(5))
    drop(folder, "bottle", range(10, 15))
    first = tasks(state, folder).gather(0)
    drop(folder, "cup", range(20, 25))
    drop(folder, "bottle", range(30, 35))
    again = tasks(state, folder)
    assert again.gather(0) == first
    second = again.gather(1)
    assert not {image.digest for image in first.images} & {image.digest for image in second.images}
    assert len(second.images) == 10
    assert reason(tasks(state, folder), 2) == "task 2: 0 of 10 labeled images"


def test_a_process_that_dies_while_it_cuts_leaves_no_task(
    folder: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(folder, "cup", range(5))
    drop(folder, "bottle", range(10, 15))
    monkeypatch.setattr(field.shutil, "rmtree", lambda *_, **__: None)  # nothing tidies up after a kill

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(field, "sync", killed)
    with pytest.raises(KeyboardInterrupt):
        tasks(state, folder).gather(0)
    monkeypatch.undo()
    found = tasks(state, folder)
    assert found.cut == []
    assert (state / ".cutting").exists()
    assert len(found.gather(0).images) == 10
    assert not (state / ".cutting").exists()


def test_a_cut_task_stays_whatever_happens_to_its_files(folder: Path, state: Path) -> None:
    drop(folder, "cup", range(5))
    drop(folder, "bottle", range(10, 15))
    found = tasks(state, folder)
    cut = found.gather(0)
    before = {part: np.array(found.images(cut, part).images) for part in field.PARTS}
    shutil.rmtree(folder)
    after = tasks(state, folder)
    for part in field.PARTS:
        assert np.array_equal(after.images(after.cut[0], part).images, before[part])
    assert reason(after, 1) == f"{folder} cannot be read (No such file or directory)"


def test_the_kept_pixels_are_those_of_the_files(folder: Path, state: Path) -> None:
    drop(folder, "cup", range(5))
    gray = folder / "bottle" / "gray.png"
    Image.new("L", (8, 8), 77).save(gray)
    drop(folder, "bottle", range(10, 15))
    found = tasks(state, folder)
    cut = found.gather(0)
    for part in field.PARTS:
        images = found.images(cut, part)
        for row, image in enumerate(cut.of_part(part)):
            with Image.open(folder / image.file) as picture:
                expected = picture.convert("RGB").resize((8, 8), Image.Resampling.BILINEAR)
            assert np.array_equal(images.images[row], np.asarray(expected))
            assert images.classes[images.labels[row]] == image.label
    assert any((found.images(cut, part).images == 77).all(axis=(1, 2, 3)).any() for part in field.PARTS)


def test_a_copy_of_an_image_is_not_learned_again(folder: Path, state: Path) -> None:
    drop(folder, "cup", range(5))
    drop(folder, "bottle", range(10, 15))
    shutil.copy(folder / "cup" / "0000.png", folder / "cup" / "same.png")
    found = tasks(state, folder)
    assert len(found.gather(0).images) == 10
    shutil.copy(folder / "bottle" / "0010.png", folder / "cup" / "renamed.png")  # under another label, too
    assert reason(tasks(state, folder), 1) == "task 1: 0 of 10 labeled images (2 copies are left out)"


def test_one_image_with_two_labels_is_left_out_until_someone_decides(folder: Path, state: Path) -> None:
    drop(folder, "cup", range(5))
    drop(folder, "bottle", range(10, 15))
    shutil.copy(folder / "cup" / "0000.png", folder / "bottle" / "0000.png")
    said = reason(tasks(state, folder))
    assert said.startswith("task 0: 9 of 10 labeled images; ")
    assert "bottle/0000.png and cup/0000.png are one image with two labels: not used" in said
    (folder / "bottle" / "0000.png").unlink()
    assert len(tasks(state, folder).gather(0).images) == 10


def test_a_file_with_new_content_under_an_old_name_is_a_new_image(folder: Path, state: Path) -> None:
    drop(folder, "cup", range(5))
    drop(folder, "bottle", range(10, 15))
    tasks(state, folder).gather(0)
    draw(folder / "cup" / "0000.png", 99)
    assert len(tasks(state, folder).waiting().labeled) == 1


# -- labels ----------------------------------------------------------------------------------------------------------


def test_folders_that_are_no_classes_are_named(folder: Path, state: Path) -> None:
    drop(folder, "Cup", range(3))
    draw(folder / "loose.png", 50)
    problems = tasks(state, folder).waiting().problems
    assert problems == [
        "1 image beside the folders, not used: move to a class's folder or to unlabeled",
        "folder \"Cup\" is not a class, did you mean 'cup'? (3 images, not used)",
    ]


def test_rows_of_a_csv_label_images_and_more_rows_may_come(folder: Path, state: Path) -> None:
    drop(folder, "camera", range(4))
    drop(folder, "unlabeled", range(10, 12))
    rows = folder / "labels.csv"
    rows.write_text("image,label\ncamera/0000.png,cup\ncamera/0001.png, bottle\nunlabeled/0010.png,cup\n")
    found = tasks(state, folder).waiting()
    assert [(file.name, label) for file, label in found.labeled] == [
        ("camera/0000.png", "cup"), ("camera/0001.png", "bottle"), ("unlabeled/0010.png", "cup"),
    ]  # fmt: skip
    assert found.unlabeled == 1
    with rows.open("a") as file:
        file.write("camera/0000.png,bottle\r\n./camera/0002.png,cup\n")
    labels = {file.name: label for file, label in tasks(state, folder).waiting().labeled}
    assert labels["camera/0000.png"] == "bottle", "the last row counts"
    assert labels["camera/0002.png"] == "cup"


def test_what_is_wrong_with_a_csv_is_said_by_line(folder: Path, state: Path) -> None:
    draw(folder / "a.png", 1)
    (folder / "labels.csv").write_text(
        "a.png,cupp\n../a.png,cup\n/etc/a.png,cup\na.txt,cup\na.png\nmissing.png,cup\na.png,cup\n"
    )
    contents = read_contents(folder, ("cup", "bottle"), later())
    assert [label for _, label in contents.labeled] == ["cup"]
    assert contents.problems == [
        "labels.csv, line 1: \"cupp\" is not a class, did you mean 'cup'?",
        'labels.csv, line 2: "../a.png" is not a path below the folder',
        'labels.csv, line 3: "/etc/a.png" is not a path below the folder',
        "3 more problems in labels.csv",
    ]
    (folder / "labels.csv").write_bytes(b"\xff\xfe")
    assert "labels.csv is not UTF-8" in read_contents(folder, ("cup", "bottle"), later()).problems[0]
    (folder / "labels.csv").write_text("missing.png,cup\ngone.png,cup\n")
    assert read_contents(folder, ("cup",), later(), taken={"gone.png"}).problems[0] == (
        'labels.csv names 1 image not in the folder, such as "missing.png"'
    )


def test_half_a_row_waits_for_its_end(folder: Path) -> None:
    draw(folder / "a.png", 1)
    draw(folder / "b.png", 2)
    (folder / "labels.csv").write_text("a.png,cup\nb.png,cu")
    now = time.time()
    assert read_contents(folder, ("cup",), now, settle=0.0).problems  # complete, as far as one can know
    soon = read_contents(folder, ("cup",), now + 2, settle=5.0)
    assert not [problem for problem in soon.problems if "labels.csv" in problem]


def test_a_row_against_the_folder_is_named(folder: Path) -> None:
    drop(folder, "cup", range(1))
    (folder / "labels.csv").write_text("cup/0000.png,bottle\n")
    contents = read_contents(folder, ("cup", "bottle"), later())
    assert contents.problems == ["cup/0000.png has the label 'bottle' in labels.csv, but lies in 'cup': not used"]
    assert contents.labeled == []


# -- what is kept ----------------------------------------------------------------------------------------------------


def two_tasks(folder: Path, state: Path, **changes: object) -> FieldTasks:
    for task in range(2):
        drop(folder, "cup", range(100 * task, 100 * task + 6))
        drop(folder, "bottle", range(100 * task + 10, 100 * task + 16))
        found = tasks(state, folder, **changes)
        found.gather(task)
    return found


def there(folder: Path, found: FieldTasks, number: int) -> dict[str, bool]:
    """Which parts have their files; each has all of them or none."""
    task, result = found.cut[number], {}
    for part in field.PARTS:
        files = {(folder / image.file).exists() for image in task.of_part(part)}
        files.add(len(found.images(task, part)) > 0)
        (result[part],) = files
    return result


@pytest.mark.parametrize(
    ("keep", "evaluate_on", "expected"),
    [
        ("all", "test", (True, True, True)),
        ("buffer", "test", (False, False, True)),
        ("buffer", "held-out", (False, True, False)),
        ("none", "test", (False, False, False)),
    ],
)
def test_what_stays_of_a_learned_task(
    folder: Path, state: Path, keep: str, evaluate_on: str, expected: tuple[bool, ...]
) -> None:
    found = two_tasks(folder, state, keep=keep, evaluate_on=evaluate_on, held_out=0.3)
    found.delete_before(0)
    assert there(folder, found, 0) == dict.fromkeys(field.PARTS, True), "its task is not over"
    found.delete_before(1)
    assert tuple(there(folder, found, 0).values()) == expected
    assert there(folder, found, 1) == dict.fromkeys(field.PARTS, True)
    again = tasks(state, folder, keep=keep, evaluate_on=evaluate_on, held_out=0.3)
    assert tuple(there(folder, again, 0).values()) == expected
    assert again.waiting().labeled == []


def test_a_deletion_that_a_crash_ended_is_repeated(folder: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = two_tasks(folder, state, keep="none")
    deleted: list[str] = []
    original = field._unlink_same

    def killed(file: Path, image: field.FieldImage) -> None:
        if len(deleted) == 3:
            raise KeyboardInterrupt
        deleted.append(image.file)
        original(file, image)

    monkeypatch.setattr(field, "_unlink_same", killed)
    with pytest.raises(KeyboardInterrupt):
        found.delete_before(1)
    monkeypatch.undo()
    again = tasks(state, folder, keep="none")
    assert len(again.images(again.cut[0], "train")) > 0, "the pixels go last"
    again.delete_before(1)
    assert there(folder, again, 0) == dict.fromkeys(field.PARTS, False)


def test_only_what_was_learned_is_deleted(folder: Path, state: Path) -> None:
    """A new image under the name of a learned one, and images that came since, stay."""
    found = two_tasks(folder, state, keep="none")
    replaced = folder / found.cut[0].images[0].file
    draw(replaced, 999)
    waiting = drop(folder, "cup", range(500, 503))
    found.delete_before(1)
    assert replaced.exists()
    assert all(file.exists() for file in waiting)
    assert sorted(file.name for file, _ in tasks(state, folder, keep="none").waiting().labeled) == sorted(
        [found.cut[0].images[0].file, *(f"cup/{file.name}" for file in waiting)]
    )


def test_a_folder_that_may_not_be_changed_is_an_error_and_tried_again(
    folder: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = two_tasks(folder, state, keep="none", held_out=0.3)

    def refuse(file: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(PermissionError):
        found.delete_before(1)
    monkeypatch.undo()
    assert there(folder, found, 0) == dict.fromkeys(field.PARTS, True)
    found.delete_before(1)
    assert there(folder, found, 0) == dict.fromkeys(field.PARTS, False)


# -- the folder and the state ----------------------------------------------------------------------------------------


def test_the_folders_of_the_classes_are_made(folder: Path, state: Path) -> None:
    assert sorted(place.name for place in folder.iterdir()) == ["bottle", "cup", "unlabeled"]
    assert field.FieldPlan.read(state) == plan(folder)
    with pytest.raises(RequestError, match="is not a folder"):
        plan(folder / "cup" / "missing").prepare(state)
    (state / "about.json").write_text("{}")
    with pytest.raises(ValueError, match="not a field's description"):
        field.FieldPlan.read(state)


@pytest.mark.parametrize("damage", ["text", "missing", "array"])
def test_a_damaged_task_is_refused_with_advice(folder: Path, state: Path, damage: str) -> None:
    drop(folder, "cup", range(6))
    drop(folder, "bottle", range(10, 16))
    tasks(state, folder).gather(0)
    place = state / "task-00000"
    if damage == "array":
        (place / "train.npy").write_bytes((place / "train.npy").read_bytes()[:-7])
    elif damage == "text":
        (place / "task.json").write_text(json.dumps({"images": [{"file": 1}]}))
    else:
        (place / "task.json").unlink()
    found = tasks(state, folder)
    with pytest.raises(FieldDamaged, match="remove the device's state folder"):
        found.images(found.cut[0], "train")


def test_a_full_disk_leaves_nothing_half_written(folder: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(folder, "cup", range(6))
    drop(folder, "bottle", range(10, 16))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(field, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        tasks(state, folder).gather(0)
    monkeypatch.undo()
    assert [file.name for file in state.iterdir()] == ["about.json"]

"""A device whose tasks come from the field: every method learns them, is restored, and loses images of old tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightcl.assembly import stream_plan
from lightcl.data import field
from lightcl.data.field import FieldDamaged, FieldPlan, FieldTasks, NotReady
from lightcl.data.streams.field import FieldStream
from lightcl.device.device import EdgeDevice
from lightcl.scenario import Scenario
from tests.lightcl import toys
from tests.lightcl.data.field import drop, later
from tests.lightcl.device.test_device import everything
from tests.lightcl.methods.test_restart import METHODS

CLASSES = ["bottle", "cup", "jars"]


def scenario(folder: Path, keep: str = "all", **sections: Any) -> Scenario:
    data = {
        "source": "field",
        "path": str(folder),
        "classes": CLASSES,
        "image_size": 16,
        "keep": keep,
        "crop_padding": 1,
    }
    return toys.scenario(
        **sections
        | {
            "data": data | sections.get("data", {}),
            "stream": {"tasks": 3, "ready_images": 16, "held_out": 0.1} | sections.get("stream", {}),
        }
    )


def opened(state: Path, folder: Path, **options: Any) -> EdgeDevice:
    """A device as a process that has just started opens it."""
    chosen = scenario(folder, **options)
    tasks = FieldTasks(state / "field", FieldPlan.of(stream_plan(chosen), 0), clock=later)
    return EdgeDevice(chosen, 0, state, stream=FieldStream(tasks))


def bring(folder: Path, task: int) -> None:
    """The images of a task; each one has two of the three classes, so that classes come again."""
    for number, label in enumerate((CLASSES[task % 3], CLASSES[(task + 1) % 3])):
        drop(folder, label, range(1000 * task + 100 * number, 1000 * task + 100 * number + 10))


def test_a_task_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    device = opened(tmp_path / "state", tmp_path / "images")
    before = everything(device)
    with pytest.raises(NotReady, match="task 0: 0 of 16 labeled images"):
        device.train(0, 2)
    toys.assert_same(everything(device), before)
    assert not device.finished
    bring(tmp_path / "images", 0)
    assert device.train(0, 2).examples == 14  # 20, of which 4 are test images and 2 of the other 16 held out
    tested = device.evaluate()
    assert (tested.tasks, tested.images) == ([0], [4])
    with pytest.raises(NotReady, match="task 1: 0 of 16"):
        device.train(1, 1)
    assert device.train(0, 2).loss == device.last_report.loss, "asked again, it answers the same"


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(str(v) for v in m.values() if isinstance(v, str)))
def test_restored_after_every_epoch_while_images_come_and_go(tmp_path: Path, method: dict[str, Any]) -> None:
    """Straight, with all images kept; and restored after each epoch, with the old images deleted meanwhile."""
    sections = {"method": method, "training": {"epochs": 2, "momentum": 0.9}, "network": {"freeze": "layer2"}}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    straight = opened(tmp_path / "straight", tmp_path / "a", **sections)
    for task in range(3):
        for name in ("a", "b"):
            bring(tmp_path / name, task)
        straight.train(task, 2)
        straight.evaluate()
        for epochs in (1, 2):
            killed = opened(tmp_path / "killed", tmp_path / "b", keep="buffer", **sections)
            report = killed.train(task, epochs)
            killed.stream.delete_before(killed.position.task)
        killed.evaluate()
        assert report.loss == straight.last_report.loss
    toys.assert_same(everything(killed), everything(straight))
    assert killed.rows == straight.rows
    left = list((tmp_path / "b").rglob("*.png"))
    assert len(left) == 20 + 2 * 4, "the last task's images, and the test images of the others"
    assert straight.finished


def test_joint_learns_all_tasks_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    sections = {"method": {"name": "joint"}, "data": {"views": 2}, "network": {"freeze": "layer2"}}
    with pytest.raises(NotReady, match="task 0: 0 of 16"):
        opened(tmp_path / "state", tmp_path / "images", **sections).train(2, 2)
    for task in range(3):
        bring(tmp_path / "images", task)
        if task < 2:
            with pytest.raises(NotReady, match=f"task {task + 1}: 0 of 16"):
                opened(tmp_path / "state", tmp_path / "images", **sections).train(2, 2)
    device = opened(tmp_path / "state", tmp_path / "images", **sections)
    assert device.train(2, 2).examples == 3 * 14
    assert device.evaluate().tasks == [0, 1, 2]


def test_without_old_test_images_the_matrix_has_holes(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for task in range(3):
        bring(tmp_path / "images", task)
        device = opened(tmp_path / "state", tmp_path / "images", keep="none")
        device.train(task, 2)
        device.stream.delete_before(device.position.task)
        tested = device.evaluate()
        assert (tested.tasks, tested.images, len(tested.cil)) == ([task], [4], 1)
    matrix = opened(tmp_path / "state", tmp_path / "images", keep="none").matrix("til")
    assert np.array_equal(np.isnan(matrix.values), ~np.eye(3, dtype=bool))
    assert matrix.learned.tolist() == [0, 1, 2]
    assert matrix.average_accuracy() == matrix.values[2, 2]
    assert np.isnan(matrix.forgetting())
    assert len(list((tmp_path / "images").rglob("*.png"))) == 20


def test_a_device_that_lost_its_state_after_the_images_says_so(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for task in range(2):
        bring(tmp_path / "images", task)
        device = opened(tmp_path / "state", tmp_path / "images", keep="buffer")
        device.train(task, 2)
        device.stream.delete_before(device.position.task)
    for file in (tmp_path / "state").glob("*.*"):
        file.unlink()
    lost = opened(tmp_path / "state", tmp_path / "images", keep="buffer")
    with pytest.raises(FieldDamaged, match=r"task 0's training images were deleted \(data.keep: buffer\)"):
        lost.train(0, 1)


def test_the_prefix_cache_serves_tasks_that_came_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the cache the same numbers; a second test computes nothing anew."""
    (tmp_path / "images").mkdir()

    def cached(state: Path, switch: str) -> EdgeDevice:
        sections: dict[str, Any] = {"data": {"views": 2}, "network": {"freeze": "layer2"}}
        return opened(state, tmp_path / "images", **sections, device={"accelerator": "cpu", "prefix_cache": switch})

    expected = []
    for task in range(2):
        bring(tmp_path / "images", task)
        device = cached(tmp_path / "on", "on")
        expected.append((device.train(task, 2).loss, device.evaluate().til))
    without = cached(tmp_path / "off", "off")
    without.stream.tasks.folder = tmp_path / "on" / "field"  # the same tasks
    assert [(without.train(task, 2).loss, without.evaluate().til) for task in range(2)] == expected
    again = cached(tmp_path / "on", "on")
    monkeypatch.setattr(again.method.prefix_features, "_compute", lambda images: pytest.fail("computed anew"))
    assert again.evaluate().til == expected[1][1]


def test_classes_that_come_again_are_one_class(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for task in range(2):
        bring(tmp_path / "images", task)
        device = opened(tmp_path / "state", tmp_path / "images")
        device.train(task, 2)
    assert [task.classes for task in device.stream[:2]] == [(0, 1), (1, 2)]
    assert device.stream.head == (0, 1, 2)
    context = device._context(1)
    assert context.seen_classes.tolist() == [0, 1, 2]
    assert context.old_classes.tolist() == [0]
    assert field.PARTS == ("train", "held-out", "test")

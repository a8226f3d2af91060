"""The Python interface: names on first use, scenarios from code, one device from first task to last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lightcl
from lightcl.data.partition import Share
from lightcl.data.tasks import Batch
from lightcl.device.device import OutOfStep
from lightcl.errors import RequestError
from lightcl.scenario import load_scenario
from tests.lightcl import toys


def test_every_public_name_is_there_and_importing_the_package_loads_nothing_heavy() -> None:
    assert [name for name in lightcl.__all__ if getattr(lightcl, name) is None] == []
    assert set(lightcl.__all__) <= set(dir(lightcl))
    assert lightcl.load_scenario is load_scenario
    with pytest.raises(AttributeError, match="no attribute 'open_devise'"):
        lightcl.open_devise  # noqa: B018
    code = (
        "import sys, lightcl, simulations\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'flwr', 'ray', 'lightcl.scenario'} & set(sys.modules)\n"
        "lightcl.load_scenario\n"
        "print(sorted(heavy), 'lightcl.scenario' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_the_programs_help_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['lightcl', '--help']\n"
        "from simulations.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'numpy', 'flwr', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "simulate" in done.stdout


# -- scenarios from code -------------------------------------------------------------------------------------------


def test_changes_in_code_are_those_of_the_command_line() -> None:
    expected = load_scenario(
        Path("quickstart"), ["training.epochs=2", "method.name=derpp", "method.alpha=0.3", "seed=4"]
    )
    changes = {"training.epochs": 2, "method.alpha": 0.3, "method.name": "derpp", "seed": 4}
    assert lightcl.load_scenario("quickstart", changes) == expected
    sections = {"training": {"epochs": 2}, "method": {"name": "derpp", "alpha": 0.3}, "seed": 4}
    assert lightcl.load_scenario("quickstart", **sections) == expected
    assert lightcl.load_scenario("quickstart", {"training.epochs": 2, "seed": 4}, method=sections["method"]) == expected


def test_a_scenario_from_a_dictionary_and_from_a_file(tmp_path: Path) -> None:
    values = {"name": "mine", "stream": {"tasks": 2}, "method": {"memory_size": 7}}
    built = lightcl.load_scenario(values, {"stream.tasks": 3}, training={"epochs": 4})
    assert (built.name, built.stream.tasks, built.method.memory_size, built.training.epochs) == ("mine", 3, 7, 4)
    assert values == {"name": "mine", "stream": {"tasks": 2}, "method": {"memory_size": 7}}, "the caller's own"
    file = tmp_path / "mine.yaml"
    file.write_text(built.to_yaml())
    assert lightcl.load_scenario(file) == lightcl.load_scenario(str(file)) == built


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ("quickstart", {"training.epoch": 2}, r"training\.epoch \(given in code\): unknown key, did you mean 'epochs'"),
        ("quickstart", {"training.epochs": 0}, r"training\.epochs \(given in code\): input should be .*, not 0"),
        ("quickstart", {"training.epochs": "2"}, r"training\.epochs \(given in code\): .*, not \"2\""),
        ("quickstart", {"seed.x": 2}, r"seed\.x \(given in code\): 'seed' is a value, not a section"),
        ("quickstart", {"training..epochs": 2}, r"changes: 'training\.\.epochs' is not a key"),
        ({"training": {"epochs": 0}}, {}, r"scenario: training\.epochs: input should be .*, not 0"),
        ("quickstrat", {}, r"no such bundled scenario, did you mean 'quickstart'\?"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_named(given: object, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        lightcl.load_scenario(given, changes)


# -- a source from arrays ------------------------------------------------------------------------------------------


def arrays(per_class: int, seed: int, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[N, 16, 16, 3]` and labels `[N]`."""
    images = toys.image_set(list(range(classes)) * per_class, classes, size=16, seed=seed)
    return images.images, images.labels


def test_a_source_from_arrays_is_what_the_arrays_are() -> None:
    train, labels = arrays(20, 1)
    test, answers = arrays(5, 2)
    source = lightcl.source_from_arrays(train, labels.astype(np.int32), test, answers, ["a", "b", "c", "d"])
    assert (source.classes, source.channels) == (("a", "b", "c", "d"), 3)
    assert source.train.labels.dtype == np.int64
    np.testing.assert_array_equal(source.train.images, train)
    np.testing.assert_array_equal(source.test.labels, answers)
    gray = lightcl.source_from_arrays(train[..., 0], labels, test[..., 0], answers)
    assert (gray.classes, gray.channels, gray.train.images.shape) == (("0", "1", "2", "3"), 1, (80, 16, 16, 1))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": np.zeros((8, 16, 16, 3), np.float32)}, r"train images: float32 \[8, 16, 16, 3\]; allowed"),
        ({"train_images": np.zeros((8, 3, 16, 16), np.uint8)}, r"train images: uint8 \[8, 3, 16, 16\]; allowed"),
        ({"train_images": np.zeros((7, 16, 16, 3), np.uint8)}, "7 train images have 8 labels"),
        ({"test_images": np.zeros((4, 8, 8, 3), np.uint8)}, r"training images are \[16, 16, 3\], the test images"),
        ({"test_labels": np.array([0, 1, 2, -1])}, r"test labels: int64 \[4\]; allowed: integers \[N\] from 0 on"),
        ({"test_labels": np.array([0, 1, 2, 9])}, "label 9 has no class: 4 classes are named"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_source_are_refused(changed: dict[str, np.ndarray], message: str) -> None:
    train, labels = arrays(2, 1)
    test, answers = arrays(1, 2)
    given = {"train_images": train, "train_labels": labels, "test_images": test, "test_labels": answers} | changed
    with pytest.raises(RequestError, match=message):
        lightcl.source_from_arrays(**given, classes=list("abcd"))


# -- one device ----------------------------------------------------------------------------------------------------


def open_toy(**options: object) -> lightcl.OpenDevice:
    source = lightcl.source_from_arrays(*arrays(20, 1), *arrays(5, 2))
    return lightcl.open_device(toys.scenario(method={"name": "er"}), source=source, **options)


def test_a_device_learns_its_tasks_and_its_numbers_are_those_of_the_edge_device(tmp_path: Path) -> None:
    epochs: list[tuple[int, int]] = []
    device = open_toy(folder=tmp_path / "interface")
    assert [(task.id, task.classes, len(task.train), len(task.test)) for task in device.tasks] == [
        (0, (0, 1), 36, 10),
        (1, (2, 3), 36, 10),
    ]
    tested = []
    for task in device.tasks:
        trained = device.learn(task, on_epoch=lambda number, epoch, loss: epochs.append((number, epoch)))
        assert (trained.task, trained.epochs, trained.examples) == (task.id, 2, 36)
        tested.append(device.evaluate())
    assert epochs == [(0, 1), (0, 2), (1, 1), (1, 2)]
    matrix = device.matrix("til").values
    assert matrix[0, 0] == tested[0].til[0]
    assert matrix[1].tolist() == tested[1].til
    assert np.isnan(matrix[0, 1])

    literal = toys.device(tmp_path / "literal", method={"name": "er"})
    for position in (0, 1):
        literal.train(position, 2)
        assert literal.evaluate().til == tested[position].til
    toys.assert_same(device.network.state_dict(), literal.network.state_dict())


def test_epochs_may_be_done_in_parts_and_a_device_continues_from_its_folder(tmp_path: Path) -> None:
    whole, parts = open_toy(folder=tmp_path / "whole"), open_toy(folder=tmp_path / "parts")
    whole.learn(0)
    assert parts.learn(0, epochs=1).epochs == 1
    parts = open_toy(folder=tmp_path / "parts")
    assert "1 of 2 epochs of task 0 done" in repr(parts)
    parts.learn(0)
    toys.assert_same(parts.network.state_dict(), whole.network.state_dict())


def test_predictions_agree_with_the_test(tmp_path: Path) -> None:
    device = open_toy(folder=tmp_path)
    device.learn(0)
    tested = device.evaluate()
    samples = device.tasks[0].test
    images, labels = samples.source.images[samples.indices], samples.source.labels[samples.indices]
    assert (device.predict(images, task=0) == labels).mean() == tested.til[0]
    assert (device.predict(images) == labels).mean() == tested.cil[0]
    logits = device.logits(images)
    assert logits.shape == (10, 4)
    with torch.no_grad():
        batch = Batch(torch.from_numpy(images[:3]).permute(0, 3, 1, 2), torch.zeros(3, dtype=torch.int64))
        np.testing.assert_allclose(device.method.predict(batch).numpy(), logits[:3], rtol=1e-4, atol=1e-5)
    assert device.predict(images[:0]).shape == (0,)
    with pytest.raises(RequestError, match="the images have 1 channels; the device was trained on 3"):
        device.predict(images[..., 0])


def test_closing_the_device_removes_its_temporary_folder() -> None:
    with open_toy() as device:
        device.learn(0, epochs=1)
        assert list(device.folder.iterdir())
    assert not device.folder.exists()


def test_what_a_device_cannot_do_is_refused(tmp_path: Path) -> None:
    device = open_toy(folder=tmp_path)
    with pytest.raises(RequestError, match=r"device 0 has no task 5 \(allowed: 0, 1\)"):
        device.learn(5)
    with pytest.raises(RequestError, match="setting is 'tli'; allowed: til, cil"):
        device.matrix("tli")
    with pytest.raises(OutOfStep, match="cannot go to task 1"):
        device.learn(1)
    with pytest.raises(RequestError, match="device number is 1; allowed: 0 to 0"):
        open_toy(number=1)


def test_joint_training_has_one_task(tmp_path: Path) -> None:
    source = lightcl.source_from_arrays(*arrays(20, 1), *arrays(5, 2))
    device = lightcl.open_device(toys.scenario(method={"name": "joint"}), folder=tmp_path, source=source)
    (task,) = device.tasks
    assert task.classes == (0, 1, 2, 3)
    assert device.learn(task, epochs=1).examples == len(task.train) == 72


def test_a_device_that_skips_its_first_task_and_classes_that_are_not_the_first_of_the_source() -> None:
    """Tasks (2, 7) and (5, 9) of ten classes; the device has images of the second alone."""
    held = toys.source(classes=10, train=20, test=5, size=16)
    train, test = (np.flatnonzero(np.isin(split.labels, (5, 9))) for split in (held.train, held.test))
    scenario = toys.scenario(stream={"tasks": 2, "class_order": (2, 7, 5, 9)})
    with lightcl.open_device(scenario, source=held, share=Share(train, test)) as device:
        (task,) = device.tasks
        assert (task.id, task.classes, device.edge.stream.head) == (1, (5, 9), (2, 5, 7, 9))
        tested = [device.learn(task), device.evaluate()][1]
        images = held.test.images[test]
        assert device.logits(images).shape == (10, 4)
        right = (device.predict(images, task) == held.test.labels[test]).mean()
        assert [right] == tested.til
        answers = device.predict(images)
        assert set(answers) <= {2, 5, 7, 9}
        assert [(answers == held.test.labels[test]).mean()] == tested.cil

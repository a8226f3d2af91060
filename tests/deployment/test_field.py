"""A stream from the field with real processes: images arrive while the run goes on, and a board is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch

from client.board.field import newest_field
from lightcl.assembly import stream_plan
from lightcl.data.field import FieldPlan, FieldTasks
from lightcl.data.streams.field import FieldStream
from lightcl.device.device import EdgeDevice
from lightcl.scenario import load_scenario
from lightcl.storage.state import StateFolder
from tests.deployment.processes import BIN, LightServer, Processes, neutral, processes, rows, wait_for, wait_until
from tests.lightcl.data.field import drop, later

__all__ = ["neutral", "processes"]  # fixtures

pytestmark = pytest.mark.slow

CLASSES = ["bottle", "cup", "plates"]
SCENARIO = """
name: field
data: {source: field, classes: [bottle, cup, plates], image_size: 16, keep: buffer}
stream: {tasks: 3, ready_images: 20}
network: {weights: none, width: 4}
method: {name: er, buffer_size: 6}
fleet: {devices: 2}
training: {epochs: 120, batch_size: 8, learning_rate: 0.02, checkpoint_seconds: 1}
server: {aggregation: none}
"""


def bring(folder: Path, task: int) -> None:
    """24 images of two classes; those of one task alone."""
    for number, label in enumerate((CLASSES[task % 3], CLASSES[(task + 1) % 3])):
        drop(folder, label, range(1000 * task + 100 * number, 1000 * task + 100 * number + 12))


def node_of(config: Path) -> psutil.Process:
    """The process that trains, below `lightcl device run`."""
    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(config) in (process.info["cmdline"] or []) and "client.board.node" in process.info["cmdline"]
    ]
    assert found
    return found[0]


def undisturbed(scenario: Path, number: int, place: Path) -> dict[str, torch.Tensor]:
    """The state of a device that learns the same images without a server, in one process, and keeps all of them."""
    folder = place / "images"
    folder.mkdir(parents=True)
    chosen = load_scenario(scenario, ["data.keep=all", f"data.path={folder}"])
    tasks = FieldTasks(place / "field", FieldPlan.of(stream_plan(chosen), number), clock=later)
    device = EdgeDevice(chosen, number, place / "state", stream=FieldStream(tasks))
    for task in range(tasks.plan.tasks):
        bring(folder, task)
        device.train(task, chosen.training.epochs)
    stored = StateFolder(place / "state").load()
    assert stored is not None
    return stored.tensors


def test_images_arrive_while_the_run_goes_on_and_a_board_is_killed(processes: Processes, tmp_path: Path) -> None:
    file, out = tmp_path / "field.yaml", tmp_path / "run"
    file.write_text(SCENARIO)
    folders = [tmp_path / f"images-{number}" for number in range(2)]
    states = [tmp_path / f"board-{number}" / "state" for number in range(2)]
    server = LightServer(processes, tmp_path, 2)
    server.run(str(file), "--out", str(out))
    for number, folder in enumerate(folders):
        folder.mkdir()
        server.kit_board(number, "--data", str(folder), "--delete-learned")
    for folder in folders:
        wait_until((folder / "unlabeled").is_dir, "the folders of the classes are made", processes, 200)

    def learned(number: int, task: int) -> bool:
        return any(row["device"] == number and row["task"] == task and row.get("til") for row in rows(out))

    # A board alone has images: it does not wait for the other one.
    bring(folders[0], 0)
    drop(folders[1], "unlabeled", range(9000, 9005))
    wait_until(lambda: learned(0, 0), "board 0 learns its first task", processes, 200)
    assert not any(row["device"] == 1 for row in rows(out))
    config = tmp_path / "board-1" / "device.toml"
    status = subprocess.run(
        [BIN / "lightcl", "device", "status", "--config", config], env=processes.environment, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "field       task 0: 0 of 20 labeled images (5 wait for a label)" in status.stdout, status.stdout
    assert "waits: task 0: 0 of 20 labeled images (5 wait for a label)" in status.stdout

    # The other one gets its images, and is killed in the middle of learning them.
    bring(folders[1], 0)
    bring(folders[0], 1)
    saved = lambda: list(states[1].glob("*/device-00001/tensors-*.safetensors"))  # noqa: E731
    wait_until(lambda: bool(saved()), "board 1 has saved its first steps", processes, 200)
    os.kill(node_of(config).pid, signal.SIGKILL)
    (unknown,) = drop(folders[1], "Plates", range(7000, 7001))
    wait_until(lambda: learned(1, 0), "board 1 learns its first task all the same", processes, 300)
    bring(folders[1], 1)
    for number in range(2):
        wait_until(lambda number=number: learned(number, 1), f"board {number}: task 1", processes, 300)
        bring(folders[number], 2)
    wait_for(out / "results.json", processes, 400)

    results = json.loads((out / "results.json").read_text())
    assert (results["devices_finished"], results["dropped"]) == (2, {})
    assert unknown.exists()
    for number, folder in enumerate(folders):
        field = newest_field(states[number])
        assert field is not None
        assert len(field.cut) == 3
        digests = Counter(image.digest for task in field.cut for image in task.images)
        assert len(digests) == 72
        assert set(digests.values()) == {1}, "an image is in two tasks"
        trained = {row["task"]: row["examples"] for row in rows(out) if row["device"] == number and "examples" in row}
        assert trained == {task.number: len(task.of_part("train")) for task in field.cut}
        left = {file.relative_to(folder).as_posix() for file in folder.rglob("*.png")}
        kept = {image.file for task in field.cut for image in task.images if image.part == "test" or task.number == 2}
        assert {name for name in left if name.split("/")[0] in CLASSES} == kept
        assert FieldTasks(field.folder, field.plan, clock=later).waiting().labeled == []
        stored = StateFolder(field.folder.parent).load()
        assert stored is not None
        expected = undisturbed(file, number, tmp_path / f"twin-{number}")
        assert stored.tensors.keys() == expected.keys()
        for name, tensor in stored.tensors.items():
            assert torch.equal(tensor, expected[name]), name

"""Damaged states and disks that refuse, through the real ClientApp and the real server: an answer, never a crash."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from safetensors.torch import load_file

from client.app import make_app
from lightcl.records import Results
from lightcl.records.folder import RunFolder
from lightcl.storage.state import MANIFEST
from server.rounds import Coordinator
from tests.client.test_app import ask
from tests.inprocess import InProcessGrid, Silent, small
from tests.lightcl.storage.test_damage import flip, newest

ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    trial = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no user namespaces here, and so no disk to fill")
@pytest.mark.parametrize(
    ("kind", "expected"), [("full", "No space left on device"), ("read-only", "Read-only file system")]
)
def test_a_disk_that_refuses_is_a_short_refusal_and_costs_nothing(tmp_path: Path, kind: str, expected: str) -> None:
    """A real file system of 8 MB in a namespace of its own: filled, or mounted read-only."""
    command = [*NAMESPACE, sys.executable, "-m", "tests.client.refusing_disk", kind, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    reason, changed, same = json.loads(done.stdout)
    assert reason.startswith("StateError: ")
    assert expected in reason
    assert len(reason) < 500
    assert changed == []
    assert same


def test_a_state_folder_that_cannot_be_made_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    reason = ask(InProcessGrid(tmp_path, 1), "train")["reason"]
    assert reason.startswith("StateError: ")
    assert "the state folder cannot be used" in reason
    assert "state-dir" in reason


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped byte": lambda folder: flip(newest(folder)),
    "a manifest of null": lambda folder: (folder / MANIFEST).write_text("null"),
    "a manifest of []": lambda folder: (folder / MANIFEST).write_text("[]"),
    "a deleted manifest": lambda folder: (folder / MANIFEST).unlink(),
}


def run(folder: Path, damage: Callable[[Path], object] | None, *, durable: bool, **sections: Any) -> Results:
    """Three devices; the state of device 1 is damaged once, after the test of its second task of three."""
    damaged: list[bool] = []
    state = folder / "s" / "r" / "device-00001"

    def tamper(message: Message, reply: Message) -> Message:
        instruction = message.content.config_records["instruction"]
        tested = message.metadata.message_type == "evaluate" or instruction.get("evaluate")
        if damage and not damaged and (instruction["device"], instruction["task"]) == (1, 1) and tested:
            damaged.append(True)
            damage(state)
        return reply

    grid = InProcessGrid(folder / "s", 3, tamper)
    grid.app = make_app(folder / "s", durable=durable)
    run_folder = RunFolder(folder / "run")
    scenario = small(stream={"tasks": 3}, training={"learning_rate": 0.01}, **sections)
    run_folder.begin(scenario, {"run": "r"}, [])
    results = Coordinator(scenario, run_folder, "r", Silent(), durable=durable).run(grid)
    assert bool(damaged) == bool(damage)
    return results


@pytest.mark.filterwarnings("ignore:.*the last saved state cannot be read:RuntimeWarning")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("aggregation", ["none", "suffix"])
def test_a_damaged_state_costs_a_round_and_not_the_device(
    tmp_path: Path, damage: Callable[[Path], object], aggregation: str
) -> None:
    """The device goes back one generation and says where it is; the server follows."""
    results = run(tmp_path, damage, durable=True, server={"aggregation": aggregation})
    assert results.devices_finished == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "devices.jsonl").read_text().splitlines()]
    refused = [row["error"] for row in rows if row.get("error")]
    assert len(refused) == 1
    assert refused[0].startswith("OutOfStep: ")
    if aggregation == "none":  # it has learned the same again
        straight = run(tmp_path / "straight", None, durable=True)
        assert results.til == straight.til


def test_a_simulation_keeps_one_generation_and_drops_the_device_with_the_way_out(tmp_path: Path) -> None:
    results = run(tmp_path, DAMAGES["a flipped byte"], durable=False)
    assert results.devices_finished == 2
    assert "StateError: " in results.dropped[1]
    assert "remove the folder: the device then begins its stream again" in results.dropped[1]


def test_states_of_idle_devices_hold_no_shared_weights_and_the_numbers_are_the_same(tmp_path: Path) -> None:
    """One device of three per round, so that the others stop at older versions, which are removed."""
    sections: dict[str, Any] = {"server": {"aggregation": "suffix", "fraction": 0.34}}
    lean = run(tmp_path / "lean", None, durable=False, **sections)
    full = run(tmp_path / "full", None, durable=True, **sections)  # every state holds all of its tensors
    assert (lean.til, lean.cil, lean.devices_finished) == (full.til, full.cil, 3)
    states = tmp_path / "lean" / "s" / "r"
    assert len(list((states / "shared").glob("version-*"))) == 1
    for device in range(3):
        assert not any("layer4" in n and "conv" in n for n in load_file(newest(states / f"device-{device:05d}")))

"""The predicted disk space of a run, compared with the states that devices write."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from client.app import make_app
from lightcl.errors import RequestError
from lightcl.preparation import prepare
from lightcl.records.folder import RunFolder
from lightcl.storage.state import StateFolder
from server.rounds import Coordinator
from simulations.fleet import disk_of_states
from simulations.runtime.disk import BLOCK, DiskNeed, check_disk
from tests.inprocess import InProcessGrid, Silent, small

DEVICES = 5


def size_of(states: Path) -> int:
    """The blocks of all files below, and one per device's folder."""
    blocks = sum(-(-file.stat().st_size // BLOCK) for file in states.rglob("*") if file.is_file())
    return BLOCK * (blocks + len(list(states.glob("*/device-*"))))


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> tuple[DiskNeed, int, int]:
    """A run as a simulation with one worker does it: what was announced, the peak, and what stays."""
    sections = {
        "simulation": {"workers": 1},
        "fleet": {"devices": DEVICES},
        "training": {"learning_rate": 0.01},
        **sections,
    }
    scenario = small(**sections)
    states, peak = tmp_path / "s", [0]
    clean_up = StateFolder._clean_up

    def look_first(self: StateFolder, needed: set[str]) -> None:
        """When the new state is there and the old one, too."""
        peak[0] = max(peak[0], size_of(states))
        clean_up(self, needed)

    monkeypatch.setattr(StateFolder, "_clean_up", look_first)
    folder = RunFolder(tmp_path / "run")
    folder.begin(scenario, {"run": "r"}, [])
    grid = InProcessGrid(states, DEVICES)
    grid.app = make_app(states, durable=False)
    results = Coordinator(scenario, folder, "r", Silent(), durable=False).run(grid)
    assert results.devices_finished == DEVICES
    return disk_of_states(prepare(scenario)), peak[0], size_of(states)


KINDS: dict[str, dict[str, Any]] = {
    "isolated": {"server": {"aggregation": "none"}},
    "suffix": {"server": {"aggregation": "suffix"}},
    "suffix, two devices a round": {"server": {"aggregation": "suffix+head", "fraction": 0.4}},
    "a task in two parts": {
        "server": {"aggregation": "suffix", "rounds_per_task": 2},
        "training": {"learning_rate": 0.01, "momentum": 0.9},
    },
    "a replay buffer": {"method": {"name": "er", "buffer_size": 200}, "network": {"freeze": "layer3"}},
    "a buffer larger than the share": {"method": {"name": "derpp", "buffer_size": 10**5}, "fleet": {
        "devices": DEVICES, "partition": "dirichlet", "alpha": 1.0}},
    "copies of the weights": {"method": {"name": "ewc"}},
    "columns": {"method": {"name": "pnn"}, "stream": {"tasks": 3}},
    "masks": {"method": {"name": "sparcl-er"}},
    "class sums": {"method": {"name": "lightcl-plus", "share_statistics": True}, "server": {"aggregation": "suffix"}},
    "adam": {"training": {"optimizer": "adam", "learning_rate": 0.001}},
}  # fmt: skip


@pytest.mark.parametrize("sections", KINDS.values(), ids=KINDS.keys())
def test_the_announced_disk_is_the_measured_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    need, peak, afterwards = run(tmp_path, monkeypatch, **sections)
    assert need.total == pytest.approx(peak, rel=0.2)
    assert need.afterwards == pytest.approx(afterwards, rel=0.2)


def test_idle_devices_hold_a_fraction_of_a_network_where_the_suffix_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolated, _, all_networks = run(tmp_path / "a", monkeypatch, server={"aggregation": "none"})
    shared, _, one_network = run(tmp_path / "b", monkeypatch, server={"aggregation": "suffix", "fraction": 0.2})
    assert one_network < all_networks / 3
    assert shared.afterwards < isolated.afterwards / 3
    versions = list((tmp_path / "b" / "s" / "r" / "shared").glob("version-*"))
    assert len(versions) == 1, "five rounds made more versions"


def test_a_buffer_counts_what_a_device_can_hold(tmp_path: Path) -> None:
    def own(size: int) -> int:
        scenario = small(method={"name": "er", "buffer_size": size}, network={"freeze": "layer3"})
        return disk_of_states(prepare(scenario)).own

    held = prepare(small()).counts.train_used
    most = own(10**6)
    assert most - own(1) == pytest.approx(float(np.sum(held)) * (64 + 16), abs=3 * BLOCK)
    assert own(int(held.max())) == most


def test_devices_without_tasks_take_no_disk(tmp_path: Path) -> None:
    scenario = small(stream={"tasks": 5}, fleet={"devices": 400, "partition": "dirichlet", "alpha": 0.1})
    prepared = prepare(scenario)
    learning = sum(bool(tasks) for tasks in prepared.tasks)
    assert learning < 400
    assert disk_of_states(prepared).devices == learning


def test_a_run_that_does_not_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    need = DiskNeed(devices=10, own=10**16)
    with pytest.raises(RequestError, match=r"10 devices take up to 10000000.0 GB .* but the disk of .* left; name"):
        check_disk(need, tmp_path / "run" / "devices")
    check_disk(DiskNeed(devices=10, own=10), tmp_path / "run" / "devices")


def test_the_sentence_says_what_a_run_takes_and_what_stays() -> None:
    need = DiskNeed(devices=10, own=10**6, at_once=2, working=10**6, shared=3 * 10**6, replaced=10**6)
    assert str(need) == "the states of 10 devices take up to 7 MB of disk, 4 MB afterwards"
    thrown_away = DiskNeed(devices=10, own=10**6, kept=False)
    assert str(thrown_away) == "the states of 10 devices take up to 1 MB of disk, nothing afterwards"
    assert json.dumps(thrown_away.afterwards) == "0"


def test_states_that_are_there_already_are_part_of_the_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "devices" / "run" / "device-00000"
    state.mkdir(parents=True)
    (state / "tensors-3.safetensors").write_bytes(bytes(10 * BLOCK))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=BLOCK))
    check_disk(DiskNeed(devices=2, own=11 * BLOCK), tmp_path / "devices")
    with pytest.raises(RequestError, match=r"take up to 49 KB of disk, .* has 4 KB left"):
        check_disk(DiskNeed(devices=2, own=12 * BLOCK), tmp_path / "devices")

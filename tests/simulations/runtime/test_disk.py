"""The predicted disk space of a run, compared with the states that devices write."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from client.app import make_app
from lightcl.assembly import build_network
from lightcl.device.state import changing_tensors
from lightcl.errors import RequestError
from lightcl.records.folder import RunFolder
from server.rounds import Coordinator
from simulations.runtime.disk import DiskNeed, check_disk, disk_need
from tests.inprocess import InProcessGrid, Silent, small


def states_after(tmp_path: Path, aggregation: str) -> tuple[DiskNeed, list[Path]]:
    """A run of three devices as a simulation does it: what was announced, and the tensor files that are there."""
    scenario = small(server={"aggregation": aggregation}, training={"epochs": 1})
    folder = RunFolder(tmp_path / "run")
    folder.begin(scenario, {"run": "r"}, [])
    grid = InProcessGrid(tmp_path / "s", 3)
    grid.app = make_app(tmp_path / "s", durable=False)
    assert Coordinator(scenario, folder, "r", Silent(), durable=False).run(grid).devices_finished == 3
    return disk_need(scenario, channels=1, classes=10, image_bytes=64), sorted((tmp_path / "s").rglob("*.safetensors"))


def test_a_shared_suffix_is_on_disk_once(tmp_path: Path) -> None:
    need, files = states_after(tmp_path, "suffix")
    shared = {file.stat().st_ino for file in files if file.name.startswith("version-")}
    assert len(shared) == 1
    own = [file for file in files if file.name.startswith("tensors-")]
    assert len(own) == 3
    assert all(file.stat().st_size <= need.own for file in own)
    blocks = {file.stat().st_ino: file.stat().st_size for file in files}
    assert sum(blocks.values()) <= need.total


def test_isolated_devices_keep_what_training_changes(tmp_path: Path) -> None:
    need, files = states_after(tmp_path, "none")
    network = build_network(small(), in_channels=1, classes=10)
    changing = sum(t.numel() * t.element_size() for t in changing_tensors(network).values())
    assert need.shared == 0
    assert len(files) == 3
    assert all(changing <= file.stat().st_size <= 1.2 * need.own for file in files)


def test_a_run_that_does_not_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    need = DiskNeed(devices=10, per_round=2, own=10**15, shared=0)
    with pytest.raises(RequestError, match=r"10 devices take up to 10000000.0 GB .* but the disk of .* left; name"):
        check_disk(need, tmp_path / "run" / "devices")
    check_disk(DiskNeed(10, 2, 1, 0), tmp_path / "run" / "devices")


def test_a_file_that_many_states_link_to_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = tmp_path / "devices" / "run"
    for number in range(10):
        (states / f"device-{number:05d}").mkdir(parents=True)
    first = states / "device-00000" / "version-1.safetensors"
    first.write_bytes(bytes(1000))
    for number in range(1, 10):
        (states / f"device-{number:05d}" / "version-1.safetensors").hardlink_to(first)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    check_disk(DiskNeed(devices=2, per_round=0, own=1000, shared=0), tmp_path / "devices")
    with pytest.raises(RequestError, match=r"take up to 3 KB of disk, .* has 1 KB left"):
        check_disk(DiskNeed(devices=3, per_round=0, own=1000, shared=0), tmp_path / "devices")

"""Plugins through the command line: methods, networks and data sources of a user's file, also in Ray's workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
METHOD = CHECKOUT / "examples" / "a_new_method.py"
NETWORK = CHECKOUT / "examples" / "a_new_network.py"
SOURCE = '''
"""Stripes: vertical ones are class 0, horizontal ones class 1, checkers class 2, plain images class 3."""

import numpy as np

import lightcl


def read_stripes(request: lightcl.SourceRequest) -> lightcl.Source:
    size = request.image_size or 16
    rows, columns = np.indices((size, size))
    patterns = np.stack([columns % 4 < 2, rows % 4 < 2, (rows + columns) % 4 < 2, rows < size]) * 200
    generator = np.random.default_rng(request.seed)

    def images(count):
        labels = np.arange(count) % 4
        return (patterns[labels] + generator.integers(0, 50, (count, size, size))).astype(np.uint8), labels

    names = ("vertical", "horizontal", "checkers", "plain")
    return lightcl.source_from_arrays(*images(120), *images(40), classes=names)


lightcl.register_source("stripes", read_stripes, has_test_split=lambda request: True)
'''
TOY = """\
name: toy
data: {image_size: 8}
stream: {tasks: 2}
fleet: {devices: 2, test_data: whole}
network: {weights: none, width: 4}
method: {name: sgd}
training: {epochs: 1, batch_size: 16}
simulation: {workers: 1}
"""


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    file = tmp_path / "toy.yaml"
    file.write_text(TOY)
    return file


@pytest.fixture
def stripes(tmp_path: Path) -> Path:
    file = tmp_path / "stripes.py"
    file.write_text(SOURCE)
    return file


def lightcl(folder: Path, *words: object, code: int = 0, **variables: str) -> str:
    """Runs the program in its own process and gives its output."""
    environment = os.environ | {
        "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    } | variables  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "simulations.main", *map(str, words)], cwd=folder, env=environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def learned(run: Path) -> list[dict[str, object]]:
    """What was learned: the rows of devices.jsonl without times, memory, bytes and names."""
    rows = [json.loads(line) for line in (run / "devices.jsonl").read_text().splitlines()]
    kept = ("device", "task", "epochs", "examples", "loss", "til", "cil", "error")
    return [{key: row.get(key) for key in kept} for row in rows]


@pytest.mark.ray
def test_a_method_from_a_file_on_one_device_and_in_rays_workers(toy: Path, tmp_path: Path) -> None:
    chosen = ["--plugin", METHOD, "--set", "method.name=hold-head", "--set", "method.strength=100"]
    lightcl(tmp_path, "train", toy, *chosen, "--out", "alone")
    lightcl(tmp_path, "simulate", toy, *chosen, "--out", "fleet")
    alone, fleet = learned(tmp_path / "alone"), learned(tmp_path / "fleet")
    assert len(alone) == 2
    assert [row for row in fleet if row["device"] == 0] == alone
    refused = lightcl(tmp_path, "report", "alone", code=2)
    assert "with --plugin FILE (report, compare, export) or in LIGHTCL_PLUGINS" in " ".join(refused.split())
    assert "<message>" not in refused
    lightcl(tmp_path, "report", "alone", "--plugin", METHOD)
    lightcl(tmp_path, "report", "alone", LIGHTCL_PLUGINS=str(METHOD))
    lightcl(tmp_path, "train", toy, "--out", "sgd")
    plain = learned(tmp_path / "sgd")
    assert plain[0]["loss"] == alone[0]["loss"], "the first task has no anchor"
    assert plain[1]["loss"] != alone[1]["loss"], "the second one has"


def test_a_plugin_that_the_environment_names(toy: Path, tmp_path: Path) -> None:
    output = lightcl(tmp_path, "validate", toy, "--set", "method.name=hold-head", LIGHTCL_PLUGINS=str(METHOD))
    assert "valid" in output
    assert "hold-head" in output
    refused = lightcl(tmp_path, "validate", toy, "--set", "method.name=hold-head", code=2)
    assert 'unknown method "hold-head"' in refused


def test_a_network_from_a_file(toy: Path, tmp_path: Path) -> None:
    chosen = ["--plugin", NETWORK, "--set", "network.name=small-cnn", "--set", "network.freeze=block1"]
    assert "toy.yaml: valid" in lightcl(tmp_path, "validate", toy, *chosen)
    refused = lightcl(tmp_path, "validate", toy, *chosen, "--set", "network.freeze=block4", code=2)
    assert "network.freeze 'block4' is not a block of this network" in refused
    lightcl(tmp_path, "train", toy, *chosen, "--set", "stream.tasks=1", "--out", "run")
    (row,) = learned(tmp_path / "run")
    assert isinstance(row["loss"], float)
    assert 0 < row["loss"] < 10


@pytest.mark.ray
def test_a_data_source_from_a_file(toy: Path, stripes: Path, tmp_path: Path) -> None:
    chosen = ["--plugin", stripes, "--set", "data.source=stripes", "--set", "data.augmentation=none"]
    assert "valid" in lightcl(tmp_path, "validate", toy, *chosen)
    assert "data.source is 'stripes': unknown" in lightcl(tmp_path, "validate", toy, *chosen[2:], code=2)
    lightcl(tmp_path, "simulate", toy, *chosen, "--out", "run", "--set", "training.epochs=2")
    rows = learned(tmp_path / "run")
    assert [row["examples"] for row in rows] == [27] * 4  # 120 / 2 devices / 2 tasks, a tenth held out
    assert [row["error"] for row in rows] == [None] * 4


@pytest.mark.ray
def test_a_package_with_an_entry_point(toy: Path, tmp_path: Path) -> None:
    """An installed package: its metadata names the module, and nothing else does."""
    site = tmp_path / "site"
    metadata = site / "hold_head-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hold-head\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[lightcl.plugins]\nhold-head = hold_head\n")
    (site / "hold_head.py").write_text(METHOD.read_text())
    path = os.pathsep.join([str(CHECKOUT), str(site)])
    lightcl(tmp_path, "simulate", toy, "--set", "method.name=hold-head", "--out", "run", PYTHONPATH=path)
    assert [row["error"] for row in learned(tmp_path / "run")] == [None] * 4
    assert (tmp_path / "run" / "results.json").is_file()

"""Real simulations on real Ray workers, small enough for every run of the suite."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.ray

LIGHTCL = Path(sys.executable).with_name("lightcl")
SCENARIO = """\
name: small
network: {weights: none, width: 8}
stream: {tasks: 3}
fleet: {devices: 4, test_data: whole, partition: dirichlet, alpha: 2.0}
training: {epochs: 2, batch_size: 16, learning_rate: 0.05, momentum: 0.5, checkpoint_seconds: 0}
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(SCENARIO)
    return file


def lightcl(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([LIGHTCL, *map(str, words)], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def rows(run: Path) -> list[dict[str, Any]]:
    """devices.jsonl without what depends on the clock and the host."""
    kept = [json.loads(line) for line in (run / "devices.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("timing", "name")} for row in kept]


def test_neither_workers_nor_engine_change_a_number_and_one_device_alone_learns_the_same(
    scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, flower, alone = (scenario.parent / name for name in ("one", "two", "flower", "alone"))
    printed = lightcl("simulate", scenario, "--out", one, "--set", "simulation.workers=1").stdout
    assert "round 3/3" in printed
    assert "TIL (task known)" in printed
    assert (one / "report.html").stat().st_size > 10_000
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # another Ray is not meant
    lightcl("simulate", scenario, "--out", two, "--set", "simulation.workers=2")
    assert rows(one) == rows(two)
    lightcl("simulate", scenario, "--out", flower, "--set", "simulation.engine=flower")
    assert rows(one) == rows(flower)
    lightcl("train", scenario, "--device", 2, "--out", alone)
    assert rows(alone) == [row for row in rows(one) if row["device"] == 2]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "flower"])
def test_averaged_suffixes_are_the_same_on_both_engines(scenario: Path, engine: str) -> None:
    """Tensors are read from devices' files on one and travel through Flower's link state on the other."""
    changes = ("--set", "server.aggregation=suffix", "--set", "simulation.keep_states=none")
    first, second = scenario.parent / "first", scenario.parent / "second"
    lightcl("simulate", scenario, "--out", first, *changes, "--set", f"simulation.engine={engine}")
    assert not (first / "devices").exists(), "keep_states: none"
    lightcl("simulate", scenario, "--out", second, *changes, "--set", "simulation.workers=1")
    assert rows(first) == rows(second)


def test_a_simulation_killed_in_a_task_continues_to_the_same_numbers(scenario: Path) -> None:
    """SIGKILL to the driver and its workers while devices train; --resume; nothing differs but the clock."""
    whole, killed = scenario.parent / "whole", scenario.parent / "killed"
    change = ("--set", "server.aggregation=suffix", "--set", "training.epochs=6")
    lightcl("simulate", scenario, "--out", whole, *change)
    process = _run_until_second_task(scenario, killed, *change)
    _kill(process)
    assert not (killed / "results.json").exists()
    assert lightcl("simulate", scenario, "--out", killed, *change, check=False).returncode == 2
    lightcl("simulate", scenario, "--out", killed, *change, "--resume")
    assert rows(killed) == rows(whole)
    results = [json.loads((run / "results.json").read_text()) for run in (killed, whole)]
    assert results[0]["til"] == results[1]["til"]


@pytest.mark.slow
def test_the_prefix_cache_changes_no_number_not_even_in_a_run_that_is_killed(
    scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fixed views, two workers: without the cache, with a cache that a killed run has filled in part, and with all of
    it."""
    off, killed, full = (scenario.parent / name for name in ("off", "killed", "full"))
    cache = scenario.parent / "cache"
    monkeypatch.setenv("LIGHTCL_CACHE", str(cache))
    views = ("data.views=2", "data.augmentation=crop", "training.epochs=6", "simulation.workers=2")
    change = [word for value in views for word in ("--set", value)]
    lightcl("simulate", scenario, "--out", off, *change, "--set", "device.prefix_cache=off")
    assert not list(cache.glob("prefix/*/*.rows"))
    process = _run_until_second_task(scenario, killed, *change)
    _kill(process)
    assert not (killed / "results.json").exists()
    assert list(cache.glob("prefix/*/*.rows"))
    lightcl("simulate", scenario, "--out", killed, *change, "--resume")
    assert rows(killed) == rows(off)
    lightcl("simulate", scenario, "--out", full, *change)
    assert rows(full) == rows(off)


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_changes_no_number(scenario: Path) -> None:
    """SIGKILL to one of two workers while it trains, as the kernel does when memory runs out."""
    whole, hurt = scenario.parent / "whole", scenario.parent / "hurt"
    change = ("--set", "server.aggregation=suffix", "--set", "training.epochs=6")
    lightcl("simulate", scenario, "--out", whole, *change)
    process = _run_until_second_task(scenario, hurt, *change)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "DeviceWorker" in _command(p)]
    assert len(workers) == 2
    workers[0].kill()
    assert process.wait(timeout=120) == 0
    assert rows(hurt) == rows(whole)


@pytest.mark.slow
def test_with_flowers_engine_a_worker_that_dies_ends_the_run_and_resume_loses_nothing(scenario: Path) -> None:
    whole, hurt = scenario.parent / "whole", scenario.parent / "hurt"
    change = ("--set", "server.aggregation=suffix", "--set", "training.epochs=6")
    lightcl("simulate", scenario, "--out", whole, *change)
    process = _run_until_second_task(scenario, hurt, *change, "--set", "simulation.engine=flower")
    family = psutil.Process(process.pid).children(recursive=True)
    next(p for p in family if "ClientAppActor" in _command(p)).kill()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "a Ray worker died" in said
    assert not (hurt / "results.json").exists()
    lightcl("simulate", scenario, "--out", hurt, *change, "--set", "simulation.workers=1", "--resume")
    assert rows(hurt) == rows(whole)


def _run_until_second_task(scenario: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    """A simulation of which some device is within its second task."""
    process = subprocess.Popen(
        [LIGHTCL, "simulate", scenario, "--out", out, *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not _in_second_task(out):
        assert process.poll() is None, "the run was over too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def _kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the driver and its workers."""
    for member in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()


def _command(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


def _in_second_task(run: Path) -> bool:
    """Whether some device has begun its second task and not ended it."""
    for manifest in run.glob("devices/*/*/state.json"):
        try:
            position = json.loads(manifest.read_text())["position"]
        except (OSError, ValueError, KeyError):  # nothing is saved yet
            continue
        if position["task"] == 1 and 0 < position["epochs"] < 6:
            return True
    return False


@pytest.mark.parametrize("sign", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ctrl_c_ends_the_run_and_ray(scenario: Path, sign: signal.Signals) -> None:
    out = scenario.parent / "stopped"
    process = subprocess.Popen(
        [LIGHTCL, "simulate", scenario, "--out", out, "--set", "training.epochs=2000"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        # A suite that runs in the background inherits an ignored SIGINT, and would pass it on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(out.glob("devices/*/*/state.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, sign)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "--resume" in printed
    assert "Traceback" not in printed
    assert "***" not in printed, "what Ray prints when a signal ends it"
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def test_a_run_that_fails_ends_with_1(scenario: Path) -> None:
    done = lightcl(
        "simulate", scenario, "--out", scenario.parent / "run", "--set", "training.learning_rate=1e30",
        "--set", "server.max_failures=1", check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "the loss became" in done.stderr

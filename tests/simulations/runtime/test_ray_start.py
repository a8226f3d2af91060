"""Ray gives its own start 30 s. On a machine that is slower than that, a run tries again instead of ending."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from lightcl.errors import Failure
from lightcl.scenario import Scenario
from simulations.runtime import ray_engine
from simulations.runtime.ray_engine import STARTS, connected

TOO_SLOW = Exception("The current node timed out during startup. This could happen because ...")


def starts(monkeypatch: pytest.MonkeyPatch, *outcomes: Exception | None) -> list[dict[str, Any]]:
    """Lets `ray.init` end in these ways, one after the other; returns the arguments of its calls."""
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        outcome = outcomes[len(calls)]
        calls.append(options)
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(ray_engine.ray, "init", init)
    return calls


def test_a_slow_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = starts(monkeypatch, TOO_SLOW, TOO_SLOW, None)
    with connected(Scenario()) as connection:
        assert connection.address is None
    assert len(calls) == 3
    assert all(call["address"] == "local" for call in calls)


def test_what_a_slow_start_has_left_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[subprocess.Popen[bytes]] = []
    other = subprocess.Popen(["sleep", "60"])

    def init(**options: Any) -> None:
        if not left:
            left.append(subprocess.Popen(["sleep", "60"]))
            raise TOO_SLOW

    monkeypatch.setattr(ray_engine.ray, "init", init)
    try:
        with connected(Scenario()):
            assert left[0].wait(10) == -signal.SIGKILL
            assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_it_gives_up_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = starts(monkeypatch, *[TOO_SLOW] * STARTS)
    with pytest.raises(Failure, match="Ray did not start"), connected(Scenario()):
        pass
    assert len(calls) == STARTS


def test_any_other_error_is_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = starts(monkeypatch, RuntimeError("no such file"))
    with pytest.raises(RuntimeError, match="no such file"), connected(Scenario()):
        pass
    assert len(calls) == 1


WITHOUT_RAYLET = """
import os, signal, sys, threading, time
from pathlib import Path
from flwr.serverapp import ServerApp
from lightcl.scenario import Scenario
from server.mailbox import WorkerDied
from simulations.runtime import pool, ray_engine

app = ServerApp()

@app.main()
def main(grid, context):
    while not grid.wait_for_replies(0.1):
        if (pids := [pid for pid, name in found.processes.items() if name == sys.argv[2]]):
            os.kill(pids[0], signal.SIGKILL)

pool.PROBE_SECONDS = 0.5
connecting = ray_engine.Connection

def connection(*given):
    global found
    found = connecting(*given)
    return found

ray_engine.Connection = connection
threading.Timer(240, os._exit, [3]).start()
try:
    ray_engine.run(app, Path(sys.argv[1]), Scenario.model_validate({"simulation": {"workers": 1}}))
except WorkerDied as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.ray
@pytest.mark.parametrize("program", ["raylet", pytest.param("gcs_server", marks=pytest.mark.slow)])
def test_a_run_whose_ray_on_this_machine_dies_ends_with_a_reason(tmp_path: Path, program: str) -> None:
    """As after the system's out-of-memory killer; Ray itself says nothing, and the run would wait forever."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAYLET, str(tmp_path), program],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert "the Ray cluster no longer answers; continue with --resume" in done.stdout, done.stderr[-2000:]


def test_this_version_of_ray_still_says_what_is_looked_for() -> None:
    import inspect

    from ray._private import node

    assert "timed out during startup" in inspect.getsource(node.Node.__init__)
    assert not ray.is_initialized()

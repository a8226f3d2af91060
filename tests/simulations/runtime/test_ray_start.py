"""Ray gives its own start 30 s. On a machine that is slower than that, a run tries again instead of ending."""

from __future__ import annotations

import signal
import subprocess
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


def test_this_version_of_ray_still_says_what_is_looked_for() -> None:
    import inspect

    from ray._private import node

    assert "timed out during startup" in inspect.getsource(node.Node.__init__)
    assert not ray.is_initialized()

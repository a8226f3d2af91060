"""What is said where a worker's code is not that of the command."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from lightcl.errors import RequestError
from simulations.runtime.identity import code_folder
from simulations.runtime.pool import PoolBroken
from simulations.runtime.ray_engine import WorkerCheck
from simulations.runtime.ray_grid import RayGrid
from simulations.runtime.worker import Greeting


def said(local: bool, code: str, folder: str) -> str:
    check = WorkerCheck("abc", Path("/state"), local=local)
    with pytest.raises(PoolBroken) as raised:
        check.admit(Greeting("host", 1, True, code, folder))
    return str(raised.value)


def test_another_checkout_on_one_machine_is_named_with_the_way_out() -> None:
    here = code_folder()
    assert (Path(here) / "simulations" / "runtime" / "identity.py").exists()
    text = said(True, "def", "/elsewhere")
    assert f"the code in {here}" in text
    assert "the installed code in /elsewhere" in text
    assert f"PYTHONPATH={here}" in text
    assert "cluster" not in text
    assert "was changed while the workers started" in said(True, "def", here)


def test_other_code_in_a_cluster() -> None:
    assert "install the same version of lightcl-fleet on every machine of the cluster" in said(False, "def", "/there")
    WorkerCheck("abc", Path("/state"), local=False).admit(Greeting("host", 1, True, "abc", "/there"))


def test_waiting_for_the_first_worker_ends_when_none_can_be_built() -> None:
    closed: list[bool] = []
    failed = cast(
        RayGrid, SimpleNamespace(failure="a worker could not start: no flwr", close=lambda: closed.append(True))
    )
    with pytest.raises(RequestError, match=r"^simulation.address: a worker could not start: no flwr$"):
        WorkerCheck("abc", Path("/state"), local=False).wait(failed, seconds=20)
    assert closed

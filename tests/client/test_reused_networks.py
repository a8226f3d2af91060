"""In a simulation one network object goes from device to device; a board gets a new one for every message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.clientapp import ClientApp

import client.app
from lightcl.networks.lending import NetworkLender
from lightcl.networks.native import NativeConv3x3
from lightcl.networks.winograd import WinogradConv2d
from lightcl.scenario import Scenario, method_names
from simulations.runtime.devices import make_local_app
from tests.inprocess import rows_of_a_run, small
from tests.lightcl import toys

ISOLATED = ("pnn", "sparcl-er", "sparcl-derpp")


def rows(
    folder: Path, scenario: Scenario, make_client: Callable[[Path], ClientApp] = make_local_app
) -> list[dict[str, Any]]:
    client.app._lender.cache_clear()  # as in a new process
    return rows_of_a_run(folder, scenario, make_client)


@pytest.mark.parametrize("method", method_names())
def test_the_numbers_are_those_of_new_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    scenario = small(
        method={"name": method},
        fleet={"devices": 2},
        server={"aggregation": "none" if method in ISOLATED else "suffix"},
        training={"epochs": 1},
    )
    kept: list[bool] = []
    set_back = NetworkLender._set_back_
    monkeypatch.setattr(NetworkLender, "_set_back_", lambda *given: (kept.append(True), set_back(*given))[1])
    simulated = rows(tmp_path / "simulation", scenario)
    assert kept or method in ("pnn", "lightcl-sparse", "joint"), "each was a new one"  # joint: one round, two devices
    kept.clear()
    assert simulated == rows(tmp_path / "boards", scenario, client.app.make_app)
    assert not kept


@pytest.mark.parametrize("convolutions", ["winograd", pytest.param("native", marks=toys.needs_compiler)])
def test_so_does_one_with_winograds_convolutions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convolutions: str
) -> None:
    for kind in (WinogradConv2d, NativeConv3x3):
        monkeypatch.setattr(kind, "fewest_channels", dict.fromkeys(kind.fewest_channels, 1))
    scenario = small(
        fleet={"devices": 2}, training={"epochs": 1}, device={"convolutions": convolutions, "accelerator": "cpu"}
    )
    kept: list[bool] = []
    set_back = NetworkLender._set_back_
    monkeypatch.setattr(NetworkLender, "_set_back_", lambda *given: (kept.append(True), set_back(*given))[1])
    rows(tmp_path, scenario)
    assert kept, "each was a new one"

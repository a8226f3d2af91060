"""A device whose board gets too hot: where it stops, what it saves, and what it says of the cost afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightcl.device.device import EdgeDevice, Position
from lightcl.device.metering import Board, LimitReached, Limits
from lightcl.device.telemetry import Sensors
from tests.lightcl import toys
from tests.lightcl.device.boards import orin


class Ticks:
    """A clock that goes one second further each time that it is read."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def board_in(folder: Path, most: float | None = 80.0) -> Board:
    """Samples are taken at the start and at the end of a training only."""
    return Board(folder, Sensors(folder / "root"), Limits(most), interval=1000.0, clock=Ticks())


def hot_after(device: EdgeDevice, steps: int, root: Path) -> None:
    """The board gets hot after this many more steps, and the meter sees it at once."""
    step = device.method.after_step
    done = 0

    def after_step(batch: object, context: object) -> None:
        nonlocal done
        step(batch, context)  # type: ignore[arg-type]
        done += 1
        if done == steps:
            device._board.limits = Limits(50.0)  # type: ignore[union-attr]

    device.method.after_step = after_step  # type: ignore[method-assign]


def test_it_stops_after_the_step_at_hand_and_continues_there(tmp_path: Path) -> None:
    orin(tmp_path / "root")
    device = toys.device(tmp_path / "state", board=board_in(tmp_path))
    assert device.may_receive(0, 2)
    hot_after(device, 3, tmp_path)  # of 5 steps in an epoch
    with pytest.raises(LimitReached, match="gpu-thermal has 51"):
        device.train(0, 2)
    again = toys.device(tmp_path / "state", board=board_in(tmp_path))
    assert again.position == Position(0, 0)
    assert len(again._losses) == 3
    assert not again.may_receive(0, 2)  # newer shared tensors would undo the three steps
    again.train(0, 2)
    straight = toys.device(tmp_path / "other")
    straight.train(0, 2)
    assert again.last_report is not None
    assert straight.last_report is not None
    assert again.last_report.loss == straight.last_report.loss
    assert straight.telemetry is None


def test_the_cost_before_a_pause_counts(tmp_path: Path) -> None:
    root = orin(tmp_path / "root")
    device = toys.device(tmp_path / "state", board=board_in(tmp_path))
    hot_after(device, 3, tmp_path)
    with pytest.raises(LimitReached):
        device.train(0, 2)
    root.rail(1, 1, "VDD_IN", 5000, 2000)  # 10 W
    root.zone(1, "gpu-thermal", 40_000)
    again = toys.device(tmp_path / "state", board=board_in(tmp_path))
    again.train(0, 2)
    told = again.telemetry
    assert told is not None
    # Each part took one second of this clock: at 7.4 W and at 10 W. Two epochs of 36 images.
    assert (told.energy_joules, told.power_watts) == (pytest.approx(17.4), 10.0)
    assert told.joules_per_image == pytest.approx(17.4 / 72)
    assert (told.temperature_c, told.temperature_sensor) == (51.031, "gpu-thermal")
    assert toys.device(tmp_path / "state").telemetry == told  # and a message that arrives twice is told the same


def test_a_board_that_is_hot_before_it_begins_saves_nothing(tmp_path: Path) -> None:
    orin(tmp_path / "root")
    device = toys.device(tmp_path / "state", board=board_in(tmp_path, 50.0))
    with pytest.raises(LimitReached):
        device.train(0, 2)
    assert not list(tmp_path.rglob("state.json"))
    assert device.may_receive(0, 2)


def test_after_a_pause_the_board_has_to_be_well_inside_its_limit(tmp_path: Path) -> None:
    root = orin(tmp_path / "root")
    device = toys.device(tmp_path / "state", board=board_in(tmp_path))
    hot_after(device, 3, tmp_path)
    with pytest.raises(LimitReached):
        device.train(0, 2)
    root.zone(1, "gpu-thermal", 78_000)
    with pytest.raises(LimitReached, match="at most 77"):
        toys.device(tmp_path / "state", board=board_in(tmp_path)).train(0, 2)
    root.zone(1, "gpu-thermal", 77_000)
    toys.device(tmp_path / "state", board=board_in(tmp_path)).train(0, 2)

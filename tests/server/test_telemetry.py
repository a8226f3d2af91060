"""What boards measure on its way into the rows, and boards that back off: real server and devices, fake sensors."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from client.app import make_app
from lightcl.device import metering
from lightcl.exchange.messages import BackOff, ProtocolError, Telemetry
from lightcl.records import Run, load_run
from lightcl.records.folder import DEVICES, RunFolder
from lightcl.scenario import Scenario
from server import dispatch
from server.replies import BOUNDS, back_off_of, telemetry_of
from server.rounds import Coordinator
from tests.inprocess import InProcessGrid, Silent, small
from tests.lightcl.device.boards import orin

QUICK: dict[str, Any] = {"fleet": {"devices": 2, "test_data": "whole"}, "training": {"epochs": 2, "batch_size": 16}}


def run_on(folder: Path, grid: InProcessGrid, scenario: Scenario | None = None) -> tuple[Run, Silent]:
    scenario, listener = scenario or small(**QUICK), Silent()
    target = RunFolder(folder)
    target.begin(scenario, {"run": "r"}, [])
    Coordinator(scenario, target, "r", listener).run(grid)
    return load_run(folder), listener


def without_timing(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.to_json().items() if k != "timing"} for row in run.devices]


@pytest.mark.parametrize("aggregation", ["none", "suffix"])
def test_what_boards_measure_stands_in_the_rows(tmp_path: Path, aggregation: str) -> None:
    orin(tmp_path / "root")
    grid = InProcessGrid(tmp_path / "s", 2, root=tmp_path / "root")
    for context in grid.nodes.values():
        context.node_config["limit-temperature-c"] = 85
    run, listener = run_on(tmp_path / "run", grid, small(**QUICK, server={"aggregation": aggregation}))
    assert not listener.warnings
    rows = [row for row in run.devices if row.examples]
    assert len(rows) == 4
    for row in rows:
        assert row.power_watts == pytest.approx(7.4)
        assert row.power_source == "VDD_IN"
        assert (row.temperature_c, row.temperature_sensor) == (51.031, "gpu-thermal")
        assert (row.throttled, row.limit_temperature_c, row.battery_percent) == (0.0, 85.0, None)
        assert row.energy_joules is not None
        assert row.train_seconds
        assert row.images_per_second
        assert row.examples
        images = row.images_per_second * row.train_seconds
        assert images == pytest.approx(2 * row.examples, abs=4)  # two epochs; a last batch of one image is left out
        assert row.joules_per_image == pytest.approx(row.energy_joules / images)
        assert row.energy_joules <= 7.4 * row.train_seconds
    frame = run.devices_frame()
    assert list(frame["power_source"]) == ["VDD_IN"] * 4


def test_a_simulation_measures_nothing(tmp_path: Path) -> None:
    orin(tmp_path / "root")
    grid = InProcessGrid(tmp_path / "s", 2)
    grid.app = make_app(tmp_path / "s", durable=False, root=tmp_path / "root")
    run_on(tmp_path / "run", grid)
    for line in (tmp_path / "run" / DEVICES).read_text().splitlines():
        assert json.loads(line)["timing"].keys() == {"train_seconds", "peak_memory_mib", "evaluate_seconds"}
    assert all("telemetry" not in reply.content for reply in grid.received)
    manifest = json.loads(next((tmp_path / "s").rglob("state.json")).read_text())
    assert not {"telemetry", "unfinished"} & manifest.keys()


GARBAGE: list[dict[str, Any]] = [
    {"temperature_c": float("nan")},
    {"energy_joules": float("inf")},
    {"power_watts": -3.0},
    {"throttled": 7},
    {"temperature_c": "hot"},
    {"power_source": 5},
    {"battery_percent": True},
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
def test_garbage_is_refused(garbage: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match=next(iter(garbage))):
        telemetry_of(_reply(telemetry=garbage))


def test_texts_of_a_board_are_cut_to_a_line() -> None:
    found = telemetry_of(_reply(telemetry={"temperature_sensor": "a\nb\x1b[2J" + "c" * 500}))
    assert found is not None
    assert found.temperature_sensor is not None
    assert found.temperature_sensor.isprintable()
    assert len(found.temperature_sensor) == 80
    assert BOUNDS.keys() == {field.name for field in fields(Telemetry) if "float" in str(field.type)}


def test_garbage_costs_a_warning_and_nothing_else(tmp_path: Path) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.content["instruction"]["device"] == 1:
            reply.content["telemetry"] = ConfigRecord({"energy_joules": float("inf"), "power_source": "x" * 10**6})
        return reply

    run, listener = run_on(tmp_path / "run", InProcessGrid(tmp_path / "s", 2, tamper))
    assert not listener.refusals
    assert run.results is not None
    assert run.results.devices_finished == 2
    assert [row.energy_joules for row in run.devices if row.device == 1] == [None, None]
    assert len(listener.warnings) == 2
    assert "device 1: its telemetry is dropped (energy_joules is inf" in listener.warnings[0]


def test_a_hot_board_is_asked_again_and_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering, "HEAT_SECONDS", 0.01)
    monkeypatch.setattr(dispatch, "LEAST_BACK_OFF", 0.01)
    board = orin(tmp_path / "root")
    zone = board.zone(1, "gpu-thermal", 90_000)

    def tamper(_: Message, reply: Message) -> Message:
        if "retry_after" in reply.content["reply"]:
            zone.write_text("40000")
        return reply

    grid = InProcessGrid(tmp_path / "s", 2, tamper, tmp_path / "root")
    grid.nodes[101].node_config["limit-temperature-c"] = "85"
    hot, listener = run_on(tmp_path / "run", grid)
    cool, _ = run_on(tmp_path / "other", InProcessGrid(tmp_path / "t", 2))
    assert without_timing(hot) == without_timing(cool)
    assert listener.waits == [(1, "gpu-thermal has 90.0 °C, at most 85", 0.01)]
    (row,) = [row for row in hot.devices if row.backed_off_seconds]
    assert (row.round, row.device, row.backed_off_seconds) == (1, 1, 0.01)
    assert row.backed_off_reason == "gpu-thermal has 90.0 °C, at most 85"
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["device"] for e in events if e["event"] == "backed_off"] == [1]


def test_a_board_that_backs_off_for_ever_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LEAST_BACK_OFF", 0.01)
    asked: list[int] = []

    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train" and message.content["instruction"]["device"] == 1:
            asked.append(message.content["instruction"]["round"])
            reply.content["reply"] = ConfigRecord(BackOff(0, 0, 0, "too hot", 1e9 if asked[-1] > 1 else 0).to_record())
        return reply

    scenario = small(**QUICK, server={"longest_back_off": 0.03})
    run, listener = run_on(tmp_path / "run", InProcessGrid(tmp_path / "s", 2, tamper), scenario)
    assert run.results is not None
    said = "backed off for 0.03 s in this round (server.longest_back_off): too hot"
    assert run.results.dropped == {1: said}
    assert [row.error for row in run.devices if row.device == 1] == [said] * 3
    assert asked == [1, 1, 1, 1, 2, 2, 3, 3]  # at once is every 10 ms; for ever is until the cap
    assert len(listener.waits) == 5


def test_nonsense_in_place_of_seconds_is_a_failure(tmp_path: Path) -> None:
    for seconds in (float("nan"), -1.0, float("inf")):
        with pytest.raises(ProtocolError, match="backs off for"):
            back_off_of(_reply(reply=BackOff(0, 0, 0, "", seconds).to_record()))
    with pytest.raises(ProtocolError, match=r"BackOff\.retry_after"):
        back_off_of(_reply(reply={"task": 0, "epochs": 0, "version": 0, "reason": "", "retry_after": "soon"}))


def _reply(**records: dict[str, Any]) -> Message:
    content = RecordDict({name: ConfigRecord(record) for name, record in records.items()})
    return Message(content, dst_node_id=1, message_type="train")

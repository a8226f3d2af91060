"""Selection, listeners and codecs in a run with real devices in this process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from flwr.app import Message

from lightcl.exchange.tensors import size_in_bytes
from lightcl.records import RoundRow, load_run
from lightcl.records.folder import EVENTS, RunFolder
from lightcl.scenario import Scenario
from server.ledger import Ledger
from server.listeners import Listener, Listeners
from server.rounds import Coordinator
from server.selection import Selection
from tests.inprocess import InProcessGrid, Silent, small


def run(scenario: Scenario, path: Path, grid: InProcessGrid, listener: Listener | None = None) -> Coordinator:
    folder = RunFolder(path)
    folder.begin(scenario, {"run": "r"}, [])
    coordinator = Coordinator(scenario, folder, "r", listener or Silent())
    coordinator.run(grid)
    return coordinator


def test_the_least_advanced_are_chosen_and_ties_are_drawn_by_seed_and_round() -> None:
    scenario = small(fleet={"devices": 6}, server={"fraction": 0.5})
    ledger, selection = Ledger(scenario), Selection(scenario)
    for number in (0, 1):
        ledger[number].epochs = 1
    ledger[2].failures = 1
    assert [entry.number for entry in selection.choose(ledger.entries, 1)] == [3, 4, 5]
    ledger = Ledger(scenario)
    chosen = [tuple(entry.number for entry in selection.choose(ledger.entries, number)) for number in range(20)]
    assert chosen == [tuple(e.number for e in Selection(scenario).choose(ledger.entries, n)) for n in range(20)]
    assert len(set(chosen)) > 5
    assert all(len(numbers) == 3 for numbers in chosen)


def test_all_listeners_are_told_and_events_are_written(tmp_path: Path) -> None:
    class Rounds(Listener):
        def __init__(self) -> None:
            self.rows: list[RoundRow] = []

        def round_finished(self, row: RoundRow) -> None:
            self.rows.append(row)

    def spoil(message: Message, reply: Message) -> Message:
        instruction = message.content["instruction"]
        if message.metadata.message_type == "train" and (instruction["round"], instruction["device"]) == (1, 1):
            reply.content["reply"]["loss"] = float("nan")
        return reply

    first, second = Rounds(), Rounds()
    run(small(), tmp_path / "run", InProcessGrid(tmp_path / "s", 3, spoil), Listeners([first, second]))
    assert first.rows == second.rows == load_run(tmp_path / "run").rounds
    events = [json.loads(line) for line in (tmp_path / "run" / EVENTS).read_text().splitlines()]
    assert [event["round"] for event in events if event["event"] == "round_started"] == [1, 2, 3]
    finished = [event for event in events if event["event"] == "round_finished"]
    assert [event["til"]["mean"] for event in finished] == [row.til.mean for row in first.rows if row.til]
    (refused,) = [event for event in events if event["event"] == "refused"]
    assert refused["device"] == 1
    assert "nan" in refused["reason"]
    done = [event for event in events if event["event"] == "device_done"]
    assert len(done) == 6 + 1, "one message for each of three devices and two tasks, and one training again"
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


def test_fp16_goes_both_ways_and_is_counted(tmp_path: Path) -> None:
    section = {"aggregation": "suffix"}
    plain_grid, grid = InProcessGrid(tmp_path / "s1", 3), InProcessGrid(tmp_path / "s2", 3)
    plain = run(small(server=section), tmp_path / "plain", plain_grid)
    half = run(small(server=section | {"compression": "fp16"}), tmp_path / "half", grid)
    messages = [m for m in [*grid.sent, *grid.received] if m.content.array_records]
    assert {array.dtype for m in messages for array in m.content["arrays"].values()} == {"float16"}
    assert {m.metadata.message_type.partition(".")[0] for m in messages} == {"train", "evaluate"}
    before, after = load_run(tmp_path / "plain").results, load_run(tmp_path / "half").results
    assert before is not None
    assert after is not None
    assert before.devices_finished == after.devices_finished == 3
    assert 2 * after.bytes_up == before.bytes_up > 0
    assert 2 * after.bytes_down == before.bytes_down > 0
    up = [m for m in grid.received if m.content.array_records]
    sizes = [size_in_bytes({n: a.numpy() for n, a in m.content["arrays"].items()}) for m in up]
    assert sum(sizes) == after.bytes_up
    # The first average differs from the exact one by the codec's error only: the devices learn the same before it.
    name = "layer4.0.conv1.weight"
    exact, rounded = (
        next(m for m in g.sent if m.content.array_records).content["arrays"][name].numpy().astype(np.float64)
        for g in (plain_grid, grid)
    )
    assert 0 < np.abs(exact - rounded).max() <= 2.0**-10 * np.abs(exact).max()
    assert plain.aggregator is not None
    assert half.aggregator is not None
    assert half.aggregator.arrays[name].dtype == np.float32

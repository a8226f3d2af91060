"""The table of attacks (docs/results/reliability.md), by a real board with a valid key beside two honest ones."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from lightcl.preparation import prepare
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario, load_scenario
from server.checkpoint import Checkpoint
from server.ledger import KnownImages
from server.rounds import Coordinator
from tests.deployment.processes import (
    CHECKOUT,
    LightServer,
    Processes,
    ended_afterwards,
    neutral_environment,
    rows,
    wait_for,
    wait_until,
)
from tests.deployment.rogue import FLOOD, OF_SUMS, OF_WEIGHTS, REPLY_LIMIT, Attack
from tests.inprocess import InProcessGrid, Silent

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROGUE = 2
WEIGHTS = """
name: weights
data: {source: digits, image_size: 16, views: 3}
network: {weights: builtin}
stream: {tasks: 5}
fleet: {devices: 3, test_data: whole}
training: {epochs: 8, batch_size: 8, learning_rate: 0.01}
server:
  {aggregation: suffix, rounds_per_task: 4, max_failures: 20, max_failures_in_run: 50, longest_back_off: 5,
   reconnect_timeout: 5}
"""
SUMS = """
name: sums
method: {name: lightcl-plus, share_statistics: true}
network: {weights: builtin}
stream: {tasks: 5}
fleet: {devices: 3, test_data: whole}
training: {epochs: 1, batch_size: 16}
server: {max_failures: 5, reconnect_timeout: 5}
"""


@dataclass(frozen=True)
class Fleet:
    server: LightServer
    place: Path
    rogue: Path
    """What the rogue says that it did."""

    def run(self, text: str) -> Attacked:
        """Runs a scenario to its end."""
        scenario = self.place / f"{text.split()[1]}.yaml"
        scenario.write_text(text)
        out = self.place / scenario.stem
        self.server.call("start", str(scenario), "--out", str(out))
        wait_for(out / "results.json", self.server.processes, 2400)
        return Attacked(load_scenario(scenario), out, self.rogue)


@dataclass(frozen=True)
class Attacked:
    """A run that is over."""

    scenario: Scenario
    out: Path
    _log: Path

    def attacks(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """The round of each attack, and what the rogue says about it."""
        run = RunFolder(self.out).read()["run"]
        said = [json.loads(line) for line in self._log.read_text().splitlines()]
        return {one["attack"]: (one["round"], one) for one in said if one["run"] == run and one["attack"]}

    def events(self) -> dict[int, list[dict[str, Any]]]:
        """What happened, by round."""
        found: dict[int, list[dict[str, Any]]] = defaultdict(list)
        number = 0
        for line in (self.out / "events.jsonl").read_text().splitlines():
            event = json.loads(line)
            number = event["round"] if event["event"] == "round_started" else number
            found[number].append(event)
        return found

    def check(self, table: dict[str, Attack]) -> None:
        """Each attack was refused, or limited as the table says; and no honest board has failed."""
        done, events = self.attacks(), self.events()
        assert done.keys() == table.keys()
        of_device = {(row["round"], row["device"]): row for row in rows(self.out)}
        for name, (number, _) in done.items():
            error = of_device[number, ROGUE].get("error")
            warned = [one["text"] for one in events[number] if one["event"] == "warned"]
            said = [error] if table[name].answer == "refused" else warned
            assert any(re.search(table[name].words, text or "") for text in said), (name, error, warned)
            assert bool(error) == (table[name].answer == "refused"), (name, error)
            assert len(error or "") <= 500
        assert not [row for row in of_device.values() if row["device"] != ROGUE and row.get("error")]
        saved = Checkpoint(self.out / "server")
        with closing(saved):
            state = saved.load()
        assert state is not None
        assert state.tensors, "the shared model"
        assert all(np.isfinite(tensor.numpy()).all() for tensor in state.tensors.values())

    def accuracy(self) -> tuple[float, float]:
        return accuracy(rows(self.out))


def accuracy(found: list[dict[str, Any]]) -> tuple[float, float]:
    """TIL and CIL of the honest devices at their ends, in percent."""
    last = {row["device"]: row for row in found if row.get("til")}
    assert {0, 1} <= last.keys()
    return tuple(100 * fmean(fmean(last[d][setting]) for d in (0, 1)) for setting in ("til", "cil"))  # type: ignore[return-value]


def without_rogue(scenario: Scenario, place: Path) -> tuple[float, float]:
    """The same run, with its real server and real devices in this process, in which the rogue stays silent.

    Without the guard: of two devices alone it takes the first updates of a new task for too long, and clips them.
    """

    def silent(message: Message, reply: Message) -> Message:
        told = message.content.config_records["instruction"]
        if message.metadata.message_type != "query" and told["device"] == ROGUE:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "silent"), reply_to=message)
        return reply

    values = scenario.model_dump()
    values["server"]["guard"] = "off"
    prepared = prepare(Scenario.model_validate(values))
    folder = RunFolder(place / "run")
    folder.begin(prepared.scenario, {"run": "r"}, [])
    Coordinator(
        prepared.scenario, folder, "r", Silent(), prepared.tasks, images=KnownImages.of(prepared), durable=False
    ).run(InProcessGrid(place / "states", 3, silent))
    return accuracy(rows(place / "run"))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    place = tmp_path_factory.mktemp("fleet")
    with ended_afterwards(Processes(neutral_environment(place), place)) as processes:
        server = LightServer(processes, place, 3)
        server.change(most_reply_mib=REPLY_LIMIT >> 20)
        server.run()
        for number in (0, 1):
            server.kit_board(number)
        log = place / "rogue.jsonl"
        processes.start(
            "rogue", "env", f"PYTHONPATH={CHECKOUT}", sys.executable, "-m", "tests.deployment.rogue",
            str(server.set_up(ROGUE)), str(log),
        )  # fmt: skip
        online = lambda: set(server.states().values()) == {"online"}  # noqa: E731
        wait_until(online, "all boards are online", processes, 120)
        yield Fleet(server, place, log)


def test_attacks_on_weights(fleet: Fleet, tmp_path: Path) -> None:
    run = fleet.run(WEIGHTS)
    run.check(OF_WEIGHTS)
    done, found = run.attacks(), rows(run.out)
    together = {name for name, (number, _) in done.items() if sum(row["round"] == number for row in found) == 3}
    assert together >= {name for name, attack in OF_WEIGHTS.items() if attack.answer == "limited"}

    flooded = done["too many requests"][1]
    assert all(int(status) >= 400 for status in flooded["statuses"]), flooded
    assert flooded["seconds"] >= (FLOOD - 1000) / 50, "the gateway makes them wait"
    foreign = done["requests of no SuperNode"][1]["statuses"]
    assert all(400 <= status < 500 for status in foreign.values()), foreign
    assert "board-2: its reply was cut off" in (fleet.place / "server.log").read_text()
    dropped = json.loads((run.out / "results.json").read_text())["dropped"]
    assert list(dropped) == [str(ROGUE)]

    til, cil = run.accuracy()
    expected_til, expected_cil = without_rogue(run.scenario, tmp_path)
    assert abs(til - expected_til) <= 2, (til, expected_til)
    assert abs(cil - expected_cil) <= 2, (cil, expected_cil)


def test_attacks_on_class_sums(fleet: Fleet, tmp_path: Path) -> None:
    run = fleet.run(SUMS)
    run.check(OF_SUMS)
    assert run.accuracy() == pytest.approx(without_rogue(run.scenario, tmp_path), abs=2)

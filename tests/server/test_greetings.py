"""Greetings that are lost, late or never answered, on boards and in a simulation."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from lightcl.exchange.messages import Instruction
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from server.mailbox import Mailbox
from server.nodes import Expected, Nodes
from server.rounds import Coordinator, RunFailure
from tests.inprocess import InProcessGrid, Silent, small


def nodes_of(grid: InProcessGrid, timeout: float, **expected: Any) -> Nodes:
    greeting = Instruction(0, "r", small().model_dump_json(), 0, 0, 0, 0)
    return Nodes(
        Mailbox(grid, threading.Event()), Expected(len(grid.nodes), 2, (4, 100_000), **expected), greeting, timeout
    )


def losing(node: int, times: int) -> Any:
    """Loses the first replies of a node to its greeting."""
    left = [1] * times

    def lose(message: Message, reply: Message) -> Message | None:
        greeting = message.metadata.message_type == "query" and message.metadata.dst_node_id == node
        return None if greeting and left and left.pop() else reply

    return lose


def start(tmp_path: Path, scenario: Scenario, grid: InProcessGrid) -> Coordinator:
    folder = RunFolder(tmp_path / "run")
    if not folder.exists:
        folder.begin(scenario, {"run": "r"}, [])
    return Coordinator(scenario, folder, "r", Silent())


def test_a_node_that_was_killed_with_its_greeting_is_asked_again(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path, 3, losing(102, 1))
    nodes = nodes_of(grid, timeout=0.2)
    nodes.update()
    assert (nodes.node_of(2), nodes.unanswered, nodes.awaited) == (None, 1, 1)
    time.sleep(0.25)
    nodes.update()
    assert (nodes.node_of(2), nodes.unanswered) == (102, 0)


def test_a_node_that_never_answers_has_one_valid_greeting_and_is_no_longer_awaited(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path, 3)
    grid.busy = {102}
    nodes = nodes_of(grid, timeout=0.05)
    for _ in range(4):
        nodes.update()
        time.sleep(0.06)
    greetings = [m for m in grid.sent if m.metadata.dst_node_id == 102]
    assert len(greetings) == 4
    assert all(message.metadata.ttl < 100 for message in greetings), "an expired one is not delivered"
    assert (nodes.unanswered, nodes.awaited) == (1, 0)
    grid.busy.clear()
    nodes.update()
    nodes.update()
    assert [nodes.node_of(device) for device in range(3)] == [100, 101, 102]


def test_a_run_is_finished_although_a_node_never_answers(tmp_path: Path) -> None:
    """Its device is dropped after connect_timeout, not after round_timeout: two others have finished."""
    grid = InProcessGrid(tmp_path / "s", 3)
    grid.busy = {102}
    scenario = small(stream={"tasks": 1}, server={"connect_timeout": 0.5, "greeting_timeout": 0.1})
    results = start(tmp_path, scenario, grid).run(grid)
    assert results.devices_finished == 2
    assert results.dropped == {2: "not connected for 0.5 s"}


def test_a_node_too_many_that_never_answers_holds_nobody_up(tmp_path: Path) -> None:
    """All devices are there: the fourth node's first greeting is waited for, since it could turn the majority."""
    grid = InProcessGrid(tmp_path / "s", 4)
    for number, context in enumerate(grid.nodes.values()):
        context.node_config.update({"partition-id": number % 3, "num-partitions": 3})
    grid.busy = {103}
    scenario = small(stream={"tasks": 1}, server={"greeting_timeout": 0.1})  # connect_timeout: 600 s
    assert start(tmp_path, scenario, grid).run(grid).devices_finished == 3


class Slow(InProcessGrid):
    """A simulation's grid under load: a greeting takes `delay` seconds, and a node is registered late."""

    def __init__(self, state: Path, nodes: int, delay: float) -> None:
        super().__init__(state, nodes)
        self.simulated, self.busy, self.away = True, set(self.nodes), {102}
        self._until = time.monotonic() + delay

    def get_node_ids(self) -> list[int]:
        left = self._until - time.monotonic()
        if left < 0.5:
            self.busy = set()
        if left < 0:
            self.away = set()
        return super().get_node_ids()


def test_a_simulation_waits_for_its_devices_whatever_the_load(tmp_path: Path) -> None:
    scenario = small(server={"connect_timeout": 0.1, "greeting_timeout": 0.1})
    grid = Slow(tmp_path / "s", 3, delay=1.0)
    results = start(tmp_path, scenario, grid).run(grid)
    assert (results.devices_finished, results.rounds) == (3, 2)
    assert sum(m.metadata.message_type == "query" for m in grid.sent) == 3, "no greeting expires"


def test_a_simulation_in_which_a_device_cannot_take_part_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.nodes.RETRY_SECONDS", 0.0)
    grid = InProcessGrid(tmp_path / "s", 3)
    grid.simulated = True
    grid.nodes[101].node_config["own-data"] = "yes"
    scenario = small(server={"connect_timeout": 0.3})
    with pytest.raises(RunFailure, match=r"1 of 3 simulated devices are not connected .*own-data is 'yes'"):
        start(tmp_path, scenario, grid).run(grid)


@pytest.mark.parametrize("attacker", [100, 101])
@pytest.mark.parametrize(
    ("lie", "images"),
    [
        ({"classes": 99_999}, None),
        ({"channels": 1024, "labels": ""}, None),
        ({"classes": 3}, None),
        ({"labels": ""}, "own"),
        ({"classes": 4}, "own"),
    ],
)
def test_of_two_nodes_that_disagree_the_honest_one_takes_part(
    tmp_path: Path, attacker: int, lie: dict[str, Any], images: str | None
) -> None:
    honest: list[tuple[int, int, str]] = []

    def spoil(message: Message, reply: Message) -> Message:
        greeting = reply.content["reply"]
        honest.append((greeting["channels"], greeting["classes"], greeting["labels"]))
        if message.metadata.dst_node_id == attacker:
            greeting.update(lie)
        return reply

    probe = InProcessGrid(tmp_path, 2, spoil)
    nodes_of(probe, 60.0).update()
    nodes = nodes_of(InProcessGrid(tmp_path, 2, spoil), 60.0, images=honest[0] if images else None)
    nodes.update()
    assert [nodes.node_of(device) is None for device in range(2)] == [attacker == 100, attacker == 101]
    assert len(nodes.problems) == 1


@pytest.mark.parametrize("node", [{"partitions": 10**9}, {"partition": -1}, {"labels": 3}, {"name": 10**6}])
def test_greetings_beyond_their_bounds(tmp_path: Path, node: dict[str, Any]) -> None:
    def spoil(message: Message, reply: Message) -> Message:
        if message.metadata.dst_node_id == 102:
            reply.content["reply"].update(node)
        return reply

    nodes = nodes_of(InProcessGrid(tmp_path, 3, spoil), 60.0)
    nodes.update()
    assert nodes.node_of(2) is None
    assert len(nodes.problems) == 1


def test_a_run_that_is_over_is_written_without_any_node(tmp_path: Path) -> None:
    """Killed between its last row and its results."""
    scenario, grid = small(stream={"tasks": 1}), InProcessGrid(tmp_path / "s", 3)
    results = start(tmp_path, scenario, grid).run(grid)
    (tmp_path / "run" / "results.json").unlink()
    nobody = InProcessGrid(tmp_path / "s", 3)
    nobody.away = set(nobody.nodes)
    assert start(tmp_path, scenario, nobody).run(nobody) == results
    assert not nobody.sent


def test_a_run_that_is_over_but_for_its_last_rows_is_written_without_any_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its last test, before the rows of that round."""

    class Killed(BaseException):
        pass

    def killed(*given: object) -> None:
        raise Killed

    scenario, grid = small(stream={"tasks": 1}), InProcessGrid(tmp_path / "s", 3)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", killed)
        with pytest.raises(Killed):
            start(tmp_path, scenario, grid).run(grid)
    nobody = InProcessGrid(tmp_path / "s", 3)
    nobody.away = set(nobody.nodes)
    assert start(tmp_path, scenario, nobody).run(nobody).devices_finished == 3
    assert len(RunFolder(tmp_path / "run").devices()) == 3

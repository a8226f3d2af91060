"""How nodes are met: who takes part, who does not and why, and who is still at work on something else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from flwr.app import Error, Message
from ray import exceptions

from lightcl.exchange.messages import Instruction
from server import nodes as module
from server.mailbox import Mailbox, WorkerDied
from server.nodes import Expected, Nodes
from tests.inprocess import InProcessGrid, small


def nodes_of(
    grid: InProcessGrid, devices: int = 3, timeout: float = 60.0, images: tuple[int, int, str] | None = None
) -> Nodes:
    greeting = Instruction(0, "r", small().model_dump_json(), 0, 0, 0, 0)
    return Nodes(
        Mailbox(grid, threading.Event()),
        Expected(devices, small().stream.tasks, (4, 100_000), images),
        greeting,
        timeout,
    )


def hosts(nodes: Nodes, devices: int = 3) -> list[int | None]:
    return [nodes.node_of(device) for device in range(devices)]


def named(grid: InProcessGrid) -> InProcessGrid:
    for i, context in enumerate(grid.nodes.values()):
        context.node_config["name"] = f"board-{i}"
    return grid


def greetings(grid: InProcessGrid, node: int) -> int:
    return sum(m.metadata.dst_node_id == node and m.metadata.message_type == "query" for m in grid.sent)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_board_of_another_fleet_neither_takes_over_nor_shuts_out(tmp_path: Path, wrong: int) -> None:
    grid = named(InProcessGrid(tmp_path, 3))
    grid.nodes[100 + wrong].node_config.update({"partition-id": 0, "num-partitions": 1})
    grid.busy = {100, 101, 102} - {100 + wrong}
    nodes = nodes_of(grid)
    nodes.update()
    assert nodes.unanswered == 2, "the wrong board is the first to answer"
    grid.busy.clear()
    nodes.update()
    assert hosts(nodes) == [None if device == wrong else 100 + device for device in range(3)]
    assert nodes.problems == [f"node 'board-{wrong}' has num-partitions 1, the fleet 3: it does not take part"]


def test_a_board_that_leaves_out_num_partitions_means_the_number_of_devices(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path, 3)
    del grid.nodes[100].node_config["num-partitions"]
    nodes = nodes_of(grid)
    nodes.update()
    assert hosts(nodes) == [100, 101, 102]
    assert not nodes.problems


@pytest.mark.parametrize(("key", "name", "other"), [("classes", "classes", 7), ("labels", "class names", "zz")])
def test_boards_with_other_classes_than_most_do_not_take_part(
    tmp_path: Path, key: str, name: str, other: int | str
) -> None:
    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.dst_node_id == 100:
            reply.content["reply"][key] = other
        return reply

    nodes = nodes_of(named(InProcessGrid(tmp_path, 3, tamper)))
    nodes.update()
    assert hosts(nodes) == [None, 101, 102]
    (problem,) = nodes.problems
    assert problem.startswith(f"node 'board-0' has {name} {other}, the fleet ")


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_tie_is_not_decided_by_who_is_first(tmp_path: Path, wrong: int) -> None:
    grid = InProcessGrid(tmp_path, 2)
    grid.nodes[100 + wrong].node_config.update({"partition-id": 0, "num-partitions": 1})
    nodes = nodes_of(grid, 2)
    nodes.update()
    assert hosts(nodes, 2) == [None if device == wrong else 100 + device for device in range(2)]


def test_what_is_settled_stays_whoever_comes(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path, 3)
    for node in (101, 102):
        grid.nodes[node].node_config["num-partitions"] = 4
    grid.away = {101, 102}
    nodes = nodes_of(grid)
    nodes.update()
    nodes.settle()
    grid.away.clear()
    nodes.update()
    assert hosts(nodes) == [100, None, None]
    assert len(nodes.problems) == 2


@pytest.mark.parametrize("twin", [100, 102])
def test_of_two_boards_with_one_partition_id_one_takes_part_and_both_are_named(tmp_path: Path, twin: int) -> None:
    grid = named(InProcessGrid(tmp_path, 3))
    for number, node in enumerate(sorted(grid.nodes, key=lambda node: node == twin)):
        grid.nodes[node].node_config.update(
            {"partition-id": number % 2, "num-partitions": 2, "name": f"board-{number}"}
        )
    nodes = nodes_of(grid)
    nodes.update()
    assert twin not in hosts(nodes, 2)
    assert nodes.problems == ["nodes 'board-0' and 'board-2' both have partition-id 0: one takes part"]
    grid.away = {n for n in grid.nodes if grid.nodes[n].node_config["name"] == "board-0"}
    nodes.update()
    assert nodes.node_of(0) == twin, "it stands in for one that has left"


def test_a_busy_board_has_one_greeting_and_nobody_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    grid = InProcessGrid(tmp_path, 3)
    grid.busy = {102}
    nodes = nodes_of(grid)
    for _ in range(4):
        nodes.update()
        assert hosts(nodes) == [100, 101, None]
    assert (greetings(grid, 102), nodes.unanswered) == (1, 1)
    grid.busy.clear()
    nodes.update()
    assert hosts(nodes) == [100, 101, 102]
    assert nodes.unanswered == 0


def test_a_board_that_comes_and_goes_while_it_trains_has_one_greeting_waiting(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path, 3)
    nodes = nodes_of(grid)
    nodes.update()
    grid.busy = {102}
    for _ in range(3):
        grid.away = {102}
        nodes.update()
        assert hosts(nodes) == [100, 101, None]
        assert not nodes.problems, "to have left is none"
        grid.away.clear()
        nodes.update()
        nodes.update()
        assert len(grid.waiting) == 1
    grid.busy.clear()
    nodes.update()
    assert hosts(nodes) == [100, 101, 102]


def test_a_board_that_was_mended_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    grid = InProcessGrid(tmp_path, 3)
    grid.nodes[101].node_config["own-data"] = "yes"
    nodes = nodes_of(grid)
    nodes.update()
    assert hosts(nodes) == [100, None, 102]
    assert "own-data is 'yes', expected true or false" in nodes.problems[0]
    del grid.nodes[101].node_config["own-data"]
    nodes.update()
    assert hosts(nodes) == [100, 101, 102]
    assert not nodes.problems


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("channels", 10**12, "images with 1000000000000 channels, expected 1 to 1024"),
        ("channels", -1, "images with -1 channels"),
        ("classes", 10**12, "images with 1000000000000 classes"),
        ("tasks", [False], r"Greeting.tasks is [False], expected list[int]"),
    ],
)
def test_terms_for_which_no_network_can_be_built(tmp_path: Path, field: str, value: object, said: str) -> None:
    def spoil(message: Message, reply: Message) -> Message:
        if message.metadata.dst_node_id == 102:
            reply.content["reply"][field] = value
        return reply

    nodes = nodes_of(named(InProcessGrid(tmp_path, 3, spoil)))
    nodes.update()
    assert hosts(nodes) == [100, 101, None]
    assert said in nodes.problems[0]


def test_a_head_of_another_size_than_the_scenarios_is_refused(tmp_path: Path) -> None:
    """Two tasks of two classes, the same on all devices: a head of four rows, whatever a node says."""

    def spoil(message: Message, reply: Message) -> Message:
        if message.metadata.dst_node_id == 102:
            reply.content["reply"]["classes"] = 10
        return reply

    greeting = Instruction(0, "r", small().model_dump_json(), 0, 0, 0, 0)
    mailbox = Mailbox(named(InProcessGrid(tmp_path, 3, spoil)), threading.Event())
    nodes = Nodes(mailbox, Expected.of(small(), None), greeting, 60.0)
    nodes.update()
    assert hosts(nodes) == [100, 101, None]
    assert nodes.problems == ["node 'board-2' has images with 10 classes, expected 4"]


@pytest.mark.parametrize(("partition", "partitions"), [(3, 4), (1, 2)])
def test_a_board_with_its_own_images_is_one_of_the_devices(tmp_path: Path, partition: int, partitions: int) -> None:
    """Three devices; a board that says it is the fourth of four, or the second of two nodes."""

    def spoil(message: Message, reply: Message) -> Message:
        changes = {"partition": partition, "partitions": partitions, "own_data": True, "tasks": [0]}
        reply.content["reply"].update(changes)
        return reply

    nodes = nodes_of(named(InProcessGrid(tmp_path, 1, spoil)))
    nodes.update()
    assert hosts(nodes) == [None, None, None]
    assert nodes.problems == [
        f"node 'board-0' has own-data, so it is one device, but partition-id {partition} of {partitions} is not one of "
        "3 devices"
    ]


def _raised(kind: str) -> str:
    """What an exception in a worker becomes in Flower's simulation runtime (flwr 1.41, vce_api.worker)."""
    text = "<class 'ray.exceptions.OutOfMemoryError'>, said the device"
    error = {
        "died": exceptions.ActorDiedError(),
        "unavailable": exceptions.ActorUnavailableError("gone", None),
        "memory": exceptions.OutOfMemoryError("the node was running low on memory"),
        "client": exceptions.RayTaskError("run", text, ValueError(text)).as_instanceof_cause(),
    }[kind]
    return str(type(error)) + ":<'" + str(error) + "'>"


@pytest.mark.parametrize(
    ("kind", "stops"), [("died", True), ("unavailable", True), ("memory", True), ("client", False)]
)
def test_a_dead_worker_is_told_from_a_device_that_fails(tmp_path: Path, kind: str, stops: bool) -> None:
    grid = InProcessGrid(tmp_path, 3, lambda message, reply: Message(Error(0, _raised(kind)), reply_to=message))
    grid.simulated = True
    nodes = nodes_of(grid)
    if stops:
        with pytest.raises(WorkerDied, match=r"a Ray worker died .*fewer simulation\.workers"):
            nodes.update()
    else:
        nodes.update()
        assert "said the device" in nodes.problems[0]


def test_only_the_grids_of_simulations_are_simulated() -> None:
    """Flower's are told by their class: a board that connects over the network cannot change it."""
    from flwr.superlink.grid import HttpGrid, InMemoryGrid

    from simulations.runtime.ray_grid import RayGrid

    grids = [kind.__new__(kind) for kind in (InMemoryGrid, RayGrid, HttpGrid)]
    assert [Mailbox(grid, threading.Event()).simulated for grid in grids] == [True, True, False]

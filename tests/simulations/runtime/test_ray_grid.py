"""The grid on real Ray workers, with a ClientApp that echoes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from lightcl.scenario import Scenario
from server.mailbox import RunStopped, WorkerDied
from simulations.runtime import ray_engine
from simulations.runtime.identity import assume_identity
from simulations.runtime.ray_grid import RayGrid
from tests.simulations.runtime.echo import answer, ask, make_client, make_client_that_dies

SCENARIO = Scenario.model_validate({"fleet": {"devices": 10_000}, "simulation": {"workers": 2}})


@pytest.fixture(scope="module")
def connection() -> Iterator[ray_engine.Connection]:
    assume_identity()
    with ray_engine.connected(SCENARIO) as found:
        yield found


@pytest.fixture
def opened(connection: ray_engine.Connection, tmp_path: Path) -> Iterator[Callable[..., RayGrid]]:
    grids = []

    def open_grid(make: Callable[[Path], ClientApp] = make_client) -> RayGrid:
        grids.append(ray_engine.open_grid(SCENARIO, tmp_path, connection, marker, make))
        return grids[-1]

    with ray_engine.marked(tmp_path) as marker:
        yield open_grid
    for grid in grids:
        grid.close()


def by_number(replies: list[Message]) -> dict[int, Message]:
    return {int(answer(reply)["number"]): reply for reply in replies if reply.has_content()}


def test_a_large_fleet_has_few_nodes_and_each_message_gets_its_own_reply(opened: Callable[..., RayGrid]) -> None:
    grid = opened()
    nodes = grid.get_node_ids()
    assert len(nodes) == 64
    sent = [ask(nodes[i % 64], number=i) for i in range(200)]
    replies = grid.send_and_receive(sent, timeout=120)
    found = by_number(replies)
    assert sorted(found) == list(range(200))
    for number, reply in found.items():
        assert reply.metadata.reply_to_message_id == sent[number].metadata.message_id
        assert reply.metadata.src_node_id == nodes[number % 64]
        assert (answer(reply)["partition-id"], answer(reply)["num-partitions"]) == (number % 64, 64)
    workers, end = {answer(reply)["pid"] for reply in replies}, time.monotonic() + 60
    while len(workers) < 2 and time.monotonic() < end:  # on a busy machine one of them starts later
        workers |= {answer(reply)["pid"] for reply in grid.send_and_receive([ask(nodes[i]) for i in range(50)])}
    assert len(workers) == 2, "both workers had a part"
    assert grid.push_messages([ask(5)]) == [""], "an unknown node"


def test_messages_to_one_node_run_at_the_same_time(opened: Callable[..., RayGrid]) -> None:
    grid = opened()
    node = grid.get_node_ids()[0]
    replies = grid.send_and_receive([ask(node, number=0, meets=1), ask(node, number=1, meets=0)], timeout=120)
    assert len({answer(reply)["pid"] for reply in replies}) == 2


def test_tensors_are_stored_once_per_content_and_the_sent_message_keeps_them(opened: Callable[..., RayGrid]) -> None:
    grid = opened()
    nodes = grid.get_node_ids()
    record = ArrayRecord({"w": Array(np.arange(5, dtype=np.float32))})
    messages = [ask(nodes[i], number=i) for i in range(20)]
    for message in messages:
        message.content["arrays"] = record
    replies = grid.send_and_receive(messages, timeout=120)
    assert [answer(reply)["w"] for reply in replies] == [10.0] * 20
    assert grid.stored == 1
    assert messages[0].content["arrays"] is record
    record["w"] = Array(np.full(5, 2, dtype=np.float32))  # the same record with another tensor
    again = ask(nodes[0])
    again.content["arrays"] = record
    assert answer(grid.send_and_receive([again], timeout=60)[0])["w"] == 10.0  # 5 x 2
    assert grid.stored == 2
    record["w"] = Array(np.full(5, 3, dtype=np.float32))
    third = ask(nodes[0])
    third.content["arrays"] = record
    assert answer(grid.send_and_receive([third], timeout=60)[0])["w"] == 15.0


def test_an_exception_in_the_app_is_that_devices_error_alone(opened: Callable[..., RayGrid]) -> None:
    grid = opened()
    node = grid.get_node_ids()[3]
    bad, good = ask(node, error="no such image"), ask(node, number=1)
    replies = {r.metadata.reply_to_message_id: r for r in grid.send_and_receive([bad, good], timeout=60)}
    error = replies[bad.metadata.message_id].error
    assert error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "ValueError" in error.reason
    assert "no such image" in error.reason
    assert answer(replies[good.metadata.message_id])["number"] == 1


def test_a_killed_worker_is_replaced_and_its_message_done_by_another(
    opened: Callable[..., RayGrid], tmp_path: Path
) -> None:
    grid = opened()
    nodes = grid.get_node_ids()
    ids = grid.push_messages([ask(nodes[i], number=i, sleep=1) for i in range(6)])
    while not (tmp_path / "started-0").exists():
        time.sleep(0.01)
    os.kill(int((tmp_path / "started-0").read_text()), signal.SIGKILL)
    replies: list[Message] = []
    deadline = time.monotonic() + 120
    while len(replies) < 6 and time.monotonic() < deadline:
        grid.wait_for_replies(1.0)
        replies += grid.pull_messages(ids)
    assert sorted(by_number(replies)) == list(range(6))
    assert grid.workers_replaced == 1
    assert len((tmp_path / "started-0").read_text().split()) == 2


def test_a_message_that_kills_every_worker_fails_alone(opened: Callable[..., RayGrid], tmp_path: Path) -> None:
    grid = opened()
    node = grid.get_node_ids()[0]
    deadly = ask(node, number=100, die="always")
    replies = grid.send_and_receive([deadly, *(ask(node, number=i) for i in range(8))], timeout=120)
    assert sorted(by_number(replies)) == list(range(8))
    (error,) = (reply.error for reply in replies if reply.has_error())
    assert error.code == ErrorCode.CLIENT_APP_CRASHED
    assert "two Ray workers died" in error.reason
    assert len((tmp_path / "started-100").read_text().split()) == 2
    once = grid.send_and_receive([ask(node, number=101, die="once")], timeout=120)
    assert sorted(by_number(once)) == [101]


def test_workers_that_die_one_after_the_other_end_the_run(opened: Callable[..., RayGrid]) -> None:
    grid = opened(make_client_that_dies)
    with pytest.raises(
        WorkerDied, match=r"8 Ray workers died .*fewer simulation\.workers; the last one: The actor .*--resume"
    ):
        grid.send_and_receive([ask(grid.get_node_ids()[0])], timeout=120)


def test_waiting_ends_at_the_timeout_with_a_reply_and_when_the_grid_closes(opened: Callable[..., RayGrid]) -> None:
    grid = opened()
    node = grid.get_node_ids()[0]
    start = time.monotonic()
    assert grid.wait_for_replies(0.2) is False
    assert time.monotonic() - start >= 0.2
    ids = grid.push_messages([ask(node)])
    assert grid.wait_for_replies(60) is True
    assert grid.wait_for_replies(60) is True, "until the reply is pulled"
    assert len(grid.pull_messages(ids)) == 1
    assert grid.wait_for_replies(0) is False
    threading.Timer(0.3, grid.close).start()
    start = time.monotonic()
    with pytest.raises(RunStopped):
        grid.wait_for_replies(60)
    assert time.monotonic() - start < 10
    with pytest.raises(RunStopped):
        grid.push_messages([ask(node)])


def test_a_message_that_expired_in_the_queue_is_not_run(opened: Callable[..., RayGrid], tmp_path: Path) -> None:
    grid = opened()
    node = grid.get_node_ids()[0]
    grid.send_and_receive([ask(node, number=i, sleep=0.5) for i in range(2)], timeout=60)
    slow = [ask(node, number=i, sleep=1) for i in range(4)]  # each worker runs one and has one at hand
    late = ask(node, number=7, ttl=0.5)
    replies = grid.send_and_receive([*slow, late], timeout=30)
    assert sorted(by_number(replies)) == [0, 1, 2, 3]
    (error,) = (reply.error for reply in replies if reply.has_error())
    assert "expired" in error.reason
    assert not (tmp_path / "started-7").exists()

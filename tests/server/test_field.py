"""A run whose images come while it goes on: real server and real ClientApps, each with a folder of its own."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

import client.app
from lightcl.data import field
from lightcl.data.field import FieldPlan, FieldTasks
from lightcl.data.streams.field import FieldStream
from lightcl.device.device import EdgeDevice
from lightcl.errors import Stopped
from lightcl.exchange.messages import Instruction
from lightcl.export.folders import find_model
from lightcl.export.model import read_model
from lightcl.preparation import open_remote_run
from lightcl.records import Run, load_run
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario
from server import dispatch
from server.checkpoint import Checkpoint, PendingRound
from server.mailbox import Mailbox
from server.rounds import Coordinator
from tests.inprocess import InProcessGrid, Silent
from tests.lightcl.data.field import drop, later

CLASSES = ["bottle", "cup"]


def scenario(devices: int = 2, **sections: dict[str, Any]) -> Scenario:
    values: dict[str, Any] = {
        "data": {"source": "field", "classes": CLASSES, "image_size": 16},
        "stream": {"tasks": 2, "ready_images": 10},
        "network": {"weights": "none", "width": 4},
        "fleet": {"devices": devices},
        "training": {"epochs": 2, "batch_size": 4, "learning_rate": 0.05},
    }
    return Scenario.model_validate({k: {**values.get(k, {}), **sections.get(k, {})} for k in values.keys() | sections})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices ask again at once, and files count as complete."""
    monkeypatch.setattr(field, "ASK_SECONDS", 0.01)
    monkeypatch.setattr(dispatch, "LEAST_BACK_OFF", 0.01)
    monkeypatch.setattr(client.app, "FieldTasks", partial(FieldTasks, clock=later))


class Boards(InProcessGrid):
    """Boards with folders; `waits(device, task)` is called when one says that it waits for images."""

    def __init__(self, place: Path, nodes: int = 2, waits: Any = lambda device, task: None) -> None:
        super().__init__(place / "states", nodes, self._look)
        self.place, self.waits = place, waits
        self.reasons: list[str] = []
        for number, context in enumerate(self.nodes.values()):
            self.folder(number).mkdir(parents=True)
            context.node_config.update({"data-path": str(self.folder(number)), "delete-learned": True})

    def folder(self, number: int) -> Path:
        return self.place / f"images-{number}"

    def bring(self, number: int, task: int, images: int = 10) -> None:
        for label in CLASSES:
            start = 10_000 * number + 1000 * task + 500 * CLASSES.index(label)
            drop(self.folder(number), label, range(start, start + images // 2))

    def _look(self, message: Message, reply: Message) -> Message:
        record = reply.content.config_records.get("reply", {})
        if "retry_after" in record:
            asked = message.content.config_records["instruction"]
            self.reasons.append(str(record["reason"]))
            self.waits(asked["device"], asked["task"])
        return reply

    def learned(self, number: int) -> Counter[str]:
        """How often a board's tasks have each image, by digest."""
        (state,) = (self.place / "states").glob(f"*/device-{number:05d}/field")
        tasks = FieldTasks(state, FieldPlan.read(state))
        return Counter(image.digest for task in tasks.cut for image in task.images)


def run_on(folder: Path, boards: Boards, chosen: Scenario) -> tuple[Run, Silent]:
    listener, target = Silent(), RunFolder(folder)
    open_remote_run(target, chosen, "lightcl server run", resume=False)
    Coordinator(chosen, target, "r", listener).run(boards)
    return load_run(folder), listener


@pytest.mark.parametrize("aggregation", ["none", "suffix"])
def test_devices_learn_as_their_images_come(tmp_path: Path, aggregation: str) -> None:
    boards = Boards(tmp_path)
    asked: Counter[tuple[int, int]] = Counter()

    def waits(device: int, task: int) -> None:
        asked[device, task] += 1
        if asked[device, task] == 1:
            boards.bring(device, task, 6)  # too few
        elif asked[device, task] == 3:
            boards.bring(device, task, 12)

    boards.waits = waits
    run, listener = run_on(tmp_path / "run", boards, scenario(server={"aggregation": aggregation}))
    assert run.results is not None
    assert run.results.devices_finished == 2
    assert not listener.refusals
    assert [(row.device, row.task) for row in run.devices] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert all(row.error is None and row.examples and row.til for row in run.devices)
    assert boards.reasons.count("task 1: 6 of 10 labeled images") == 4  # asked twice, on each device
    for number in range(2):
        counts = boards.learned(number)
        assert set(counts.values()) == {1}
        assert len(counts) == len(list(boards.folder(number).rglob("*.png")))


@pytest.mark.parametrize("aggregation", ["none", "suffix"])
def test_a_device_that_waits_holds_back_no_other_and_has_not_failed(tmp_path: Path, aggregation: str) -> None:
    boards = Boards(tmp_path)
    boards.bring(0, 0)

    def waits(device: int, task: int) -> None:
        if device == 0:
            boards.bring(0, 1)
        elif "task 1" not in boards.reasons[-1] and (tmp_path / "run" / "rounds.jsonl").exists():
            rounds = (tmp_path / "run" / "rounds.jsonl").read_text().count("\n")
            if rounds >= 2:  # the other one has finished
                boards.bring(1, 0)
        if device == 1 and task == 1:
            boards.bring(1, 1)

    boards.waits = waits
    chosen = scenario(server={"max_failures": 1, "aggregation": aggregation})
    run, listener = run_on(tmp_path / "run", boards, chosen)
    assert run.results is not None
    assert run.results.devices_finished == 2
    assert not listener.refusals
    assert [(row.round, row.device, row.task) for row in run.devices] == [(1, 0, 0), (2, 0, 1), (3, 1, 0), (4, 1, 1)]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    waited = [event["reason"] for event in events if event["event"] == "backed_off" and event["device"] == 1]
    assert waited == ["task 0: 0 of 10 labeled images", "task 1: 0 of 10 labeled images"], "each reason once"
    asked = [m.content for m in boards.sent if m.metadata.message_type == "train" and m.metadata.dst_node_id == 101]
    shared = [content["instruction"]["round"] for content in asked if "arrays" in content]
    assert shared == ([2, 3] if aggregation == "suffix" else []), "once per version, however often it is asked"
    assert len(asked) >= 5


def test_a_fleet_may_wait_longer_than_a_round(tmp_path: Path) -> None:
    """`longest_back_off` ends the round, not the run; rounds in which nothing happened are not written."""
    boards = Boards(tmp_path)

    def waits(device: int, task: int) -> None:
        if len(boards.reasons) > 20:
            boards.bring(device, task)
            boards.reasons.clear()

    boards.waits = waits
    chosen = scenario(server={"longest_back_off": 0.03, "max_failures": 1, "max_failures_in_run": 1})
    run, listener = run_on(tmp_path / "run", boards, chosen)
    assert run.results is not None
    assert run.results.devices_finished == 2
    assert not listener.refusals
    assert [row.round for row in run.rounds] == list(range(1, len(run.rounds) + 1))
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events.count("round_started") > len(run.rounds)


def test_a_device_that_is_away_while_it_waits_has_not_failed(tmp_path: Path) -> None:
    boards = Boards(tmp_path)
    asked: Counter[tuple[int, int]] = Counter()

    def waits(device: int, task: int) -> None:
        asked[device, task] += 1
        if device == 1 and sum(asked[1, t] for t in range(2)) == 1:
            boards.away.add(101)  # and both wait, so it is asked again
        if device == 0 and asked[0, 0] == 3:
            boards.bring(0, 0)
        if device == 0 and task == 1:
            boards.away.discard(101)
            boards.bring(0, 1)
        if device == 1 and asked[device, task] == 2:
            boards.bring(1, task)

    boards.waits = waits
    run, listener = run_on(tmp_path / "run", boards, scenario(server={"max_failures": 1, "reconnect_timeout": 1}))
    assert run.results is not None
    assert run.results.devices_finished == 2
    assert not listener.refusals


def test_boards_may_all_be_away_longer_than_a_connection_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boards = Boards(tmp_path)
    monkeypatch.setattr(Mailbox, "pause", lambda self, seconds: time.sleep(min(seconds, 0.05)))

    def waits(device: int, task: int) -> None:
        if len(boards.reasons) == 2:  # both have said that they wait
            boards.away.update(boards.nodes)
            threading.Timer(1.0, boards.away.clear).start()
        boards.bring(device, task)

    boards.waits = waits
    run, listener = run_on(tmp_path / "run", boards, scenario(server={"max_failures": 1, "connect_timeout": 0.2}))
    assert run.results is not None
    assert run.results.devices_finished == 2
    assert "no device is connected; the server waits for one without end (data.source: field)" in listener.warnings


def test_a_device_that_comes_back_need_not_wait_for_those_that_wait(tmp_path: Path) -> None:
    boards = Boards(tmp_path)
    boards.away.add(101)
    boards.bring(1, 0)

    def waits(device: int, task: int) -> None:
        if device == 1:
            boards.bring(1, task)
        elif len(boards.reasons) == 3:
            boards.away.discard(101)
        elif any(row.device == 1 and row.task == 1 for row in load_run(tmp_path / "run").devices):
            boards.bring(0, task)

    boards.waits = waits
    chosen = scenario(server={"max_failures": 1, "connect_timeout": 0.1})
    run, listener = run_on(tmp_path / "run", boards, chosen)
    assert run.results is not None
    assert run.results.devices_finished == 2
    assert [(row.device, row.task) for row in run.devices] == [(1, 0), (1, 1), (0, 0), (0, 1)]
    assert [reason for _, reason in listener.refusals] == ["not connected after 0.1 s (server.connect_timeout)"]


@pytest.mark.parametrize("keep", ["buffer", "none"])
def test_learned_images_go_and_old_tasks_are_tested_while_theirs_stay(tmp_path: Path, keep: str) -> None:
    boards = Boards(tmp_path, 1)
    boards.waits = boards.bring
    run, listener = run_on(tmp_path / "run", boards, scenario(1, data={"keep": keep}, stream={"tasks": 3}))
    assert run.results is not None
    assert not listener.refusals
    left = len(list(boards.folder(0).rglob("*.png")))
    tested = [row.tested for row in run.devices]
    (history,) = run.histories
    assert history.tasks_done == 3
    if keep == "buffer":
        assert left == 10 + 2 * 2  # those of the last task, and two test images of each other
        assert tested == [[0], [0, 1], [0, 1, 2]]
    else:
        assert left == 10
        assert tested == [[0], [1], [2]]
        assert np.array_equal(np.isnan(history.til.values), ~np.eye(3, dtype=bool))
        assert run.results.til.devices == {"average_accuracy": 1, "forgetting": 0, "backward_transfer": 0}


def test_the_model_of_a_board_answers_without_images(tmp_path: Path) -> None:
    boards = Boards(tmp_path, 1)
    boards.waits = boards.bring
    run_on(tmp_path / "run", boards, scenario(1, data={"keep": "none"}))
    model = read_model(*find_model(tmp_path / "states"))
    assert (model.about.classes, model.position.task, model.finished) == (tuple(CLASSES), 1, True)
    (picture,) = drop(tmp_path, "cup", range(77, 78))
    assert model.scores(model.read_image(str(picture), "")[None]).shape == (1, 2)


@pytest.mark.parametrize("keep", ["all", "none"])
def test_a_server_that_is_stopped_while_its_boards_wait_continues(tmp_path: Path, keep: str) -> None:
    boards, chosen = Boards(tmp_path), scenario(data={"keep": keep}, stream={"tasks": 3})
    target = RunFolder(tmp_path / "run")
    open_remote_run(target, chosen, "lightcl server run", resume=False)
    stopped = Coordinator(chosen, target, "r", Silent())

    def waits(device: int, task: int) -> None:
        if task < 2:
            boards.bring(device, task)
        elif boards.reasons.count("task 2: 0 of 10 labeled images") > 4:
            stopped.stop.set()

    boards.waits = waits
    with pytest.raises(Stopped):
        stopped.run(boards)
    before = {number: boards.learned(number) for number in range(2)}
    boards.waits = boards.bring
    open_remote_run(target, chosen, "lightcl server run", resume=True)
    Coordinator(chosen, target, "r", Silent()).run(boards)
    run = load_run(tmp_path / "run")
    rows = [(row.round, row.device, row.task) for row in run.devices]
    assert rows == [(task + 1, device, task) for task in range(3) for device in range(2)]
    assert run.devices[-1].tested == ([2] if keep == "none" else [0, 1, 2])
    assert run.results is not None
    assert all(before[number] <= boards.learned(number) for number in range(2))


def no_images(message: Message) -> Message:
    """What a board says that waits for images, whatever it was asked."""
    values = {"task": 0, "epochs": 2, "version": 1, "reason": "no images", "retry_after": 1.0, "for_images": True}
    return Message(RecordDict({"reply": ConfigRecord(values)}), reply_to=message)


def test_a_board_that_waits_for_images_when_it_is_tested_has_failed(tmp_path: Path) -> None:
    """It has learned the task, so it cannot wait for its images; and the run goes on without it."""
    boards = Boards(tmp_path)
    boards.waits = boards.bring
    look = boards.tamper

    def tamper(message: Message, reply: Message) -> Message:
        device = message.content.config_records["instruction"]["device"]
        if device == 0 and message.metadata.message_type == "evaluate":
            return no_images(message)
        return look(message, reply)

    boards.tamper = tamper
    chosen = scenario(server={"aggregation": "suffix", "longest_back_off": 600, "max_failures": 2})  # not waited for
    run, listener = run_on(tmp_path / "run", boards, chosen)
    assert run.results is not None
    assert run.results.devices_finished == 1
    refused = "waits for images, but is to be tested on what it has learned: no images"
    assert listener.refusals == [(0, refused)] * 2
    assert run.results.dropped == {0: refused}


def test_a_run_that_has_only_such_a_board_continues(tmp_path: Path) -> None:
    """The state saved between training and test is taken up, and the failed test is done again."""
    boards, chosen = Boards(tmp_path, 1), scenario(1, server={"aggregation": "suffix"})
    boards.waits = boards.bring
    look, target = boards.tamper, RunFolder(tmp_path / "run")
    open_remote_run(target, chosen, "lightcl server run", resume=False)
    stopped, listener = Coordinator(chosen, target, "r", Silent()), Silent()

    def tamper(message: Message, reply: Message) -> Message:
        if message.metadata.message_type != "evaluate" or listener.refusals:
            return look(message, reply)
        stopped.stop.set()
        return no_images(message)

    boards.tamper = tamper
    with pytest.raises(Stopped):
        stopped.run(boards)
    open_remote_run(target, chosen, "lightcl server run", resume=True)
    Coordinator(chosen, target, "r", listener).run(boards)
    run = load_run(tmp_path / "run")
    assert run.results is not None
    assert [(row.round, row.task, bool(row.til)) for row in run.devices] == [(1, 0, False), (2, 0, True), (3, 1, True)]
    assert len(listener.refusals) == 1


def test_a_saved_round_without_devices_begins_again(tmp_path: Path) -> None:
    boards, chosen, target = Boards(tmp_path, 1), scenario(1), RunFolder(tmp_path / "run")
    boards.waits = boards.bring
    open_remote_run(target, chosen, "lightcl server run", resume=False)
    checkpoint = Checkpoint(target.path / "server")
    checkpoint.save(1, PendingRound({}, 0.0), 0, {}, [])
    checkpoint.close()
    Coordinator(chosen, target, "r", Silent()).run(boards)
    run = load_run(tmp_path / "run")
    assert run.results is not None
    assert [row.round for row in run.rounds] == [1, 2]


@pytest.mark.parametrize("aggregation", ["none", "suffix"])
def test_a_board_that_lost_the_images_of_a_learned_task_says_so(tmp_path: Path, aggregation: str) -> None:
    boards = Boards(tmp_path)
    boards.waits = boards.bring
    look, train = boards.tamper, EdgeDevice.train

    def lose(device: EdgeDevice, task: int, until: int) -> Any:
        report = train(device, task, until)
        if device.number == 0 and isinstance(device.stream, FieldStream):
            shutil.rmtree(device.stream.tasks.folder / "task-00000")
            del device.stream.tasks.cut
            device.stream._opened.clear()
        return report

    boards.tamper = look
    chosen = scenario(server={"aggregation": aggregation, "max_failures": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EdgeDevice, "train", lose)
        run, listener = run_on(tmp_path / "run", boards, chosen)
    assert run.results is not None
    assert run.results.devices_finished == 1
    ((device, reason),) = listener.refusals
    assert device == 0
    assert reason.startswith("FieldDamaged: task 0 has no images so far, but the device has learned it: the folder")


def ask(boards: Boards, kind: str, chosen: Scenario, **changes: Any) -> dict[str, Any]:
    told = {"device": 0, "run": "r", "scenario": chosen.model_dump_json(), "round": 1, "task": 0, "until_epoch": 2,
            "version": 0, "evaluate": False} | changes  # fmt: skip
    message = Message(
        RecordDict({"instruction": ConfigRecord(Instruction(**told).to_record())}), dst_node_id=100, message_type=kind
    )
    (message_id,) = boards.push_messages([message])
    (reply,) = boards.pull_messages([message_id])
    return dict(reply.content.config_records["reply"])


def test_what_a_device_answers_while_it_waits(tmp_path: Path) -> None:
    boards, chosen = Boards(tmp_path, 1), scenario(1)
    greeting = ask(boards, "query", chosen)
    assert (greeting["channels"], greeting["classes"], greeting["own_data"], greeting["tasks"]) == (3, 2, True, [0, 1])
    assert sorted(place.name for place in boards.folder(0).iterdir()) == ["bottle", "cup", "unlabeled"]
    waits = ask(boards, "train", chosen)
    assert (waits["task"], waits["epochs"], waits["for_images"]) == (0, 0, True)
    assert waits["reason"] == "task 0: 0 of 10 labeled images"
    assert "cannot go to task 1" in ask(boards, "train", chosen, task=1)["reason"]
    boards.bring(0, 0)
    assert ask(boards, "train", chosen)["examples"] > 0
    for file in boards.folder(0).rglob("*.png"):
        file.unlink()
    assert ask(boards, "train", chosen)["examples"] > 0, "the same request again"
    assert ask(boards, "evaluate", chosen)["tasks"] == [0]
    boards.folder(0).rename(tmp_path / "unplugged")
    assert "cannot be read (No such file or directory)" in ask(boards, "train", chosen, task=1)["reason"]
    assert "is not a folder (data of this board)" in ask(boards, "query", chosen)["reason"]


def test_a_board_needs_a_folder(tmp_path: Path) -> None:
    boards = Boards(tmp_path, 1)
    del boards.nodes[100].node_config["data-path"]
    assert "set data in device.toml" in ask(boards, "query", scenario(1))["reason"]
    boards.nodes[100].node_config.update({"data-path": str(boards.folder(0)), "num-partitions": 1})
    assert "has data.source: field, so it is one device" in ask(boards, "query", scenario(2))["reason"]


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_a_server_cannot_choose_the_folder(tmp_path: Path, kind: str) -> None:
    """`data.path` of its scenario is no folder of the board, whatever lies there."""
    photos, boards = tmp_path / "photos", Boards(tmp_path, 1)
    for label in CLASSES:
        drop(photos, label, range(500 * CLASSES.index(label), 500 * CLASSES.index(label) + 5))
    chosen = scenario(1, data={"path": str(photos)})
    del boards.nodes[100].node_config["data-path"]
    assert "set data in device.toml" in ask(boards, kind, chosen)["reason"]
    assert not (photos / "unlabeled").exists()
    assert not list((tmp_path / "states").rglob("about.json"))


@pytest.mark.parametrize("keep", ["buffer", "none"])
def test_images_are_deleted_only_where_the_board_allows_it(tmp_path: Path, keep: str) -> None:
    boards, chosen = Boards(tmp_path, 1), scenario(1, data={"keep": keep})
    boards.bring(0, 0)
    config = boards.nodes[100].node_config
    config["delete-learned"] = False
    for kind in ("query", "train", "evaluate"):
        reason = ask(boards, kind, chosen)["reason"]
        assert f"data.keep is {keep!r}, which deletes learned images in {boards.folder(0)}" in reason
        assert "set delete_learned = true in device.toml" in reason
    config["delete-learned"] = True
    assert ask(boards, "train", chosen)["examples"] > 0
    boards.bring(0, 1)
    config["delete-learned"] = False  # it may be withdrawn
    assert "does not allow it" in ask(boards, "train", chosen, task=1)["reason"]
    assert len(list(boards.folder(0).rglob("*.png"))) == 20
    config["delete-learned"] = True
    ask(boards, "train", chosen, task=1)
    assert len(list(boards.folder(0).rglob("*.png"))) == 10 + 2 * (keep == "buffer")
    config["delete-learned"] = "yes"
    assert "delete-learned is 'yes', expected true or false" in ask(boards, "train", chosen)["reason"]


def test_images_that_cannot_be_deleted_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boards, chosen = Boards(tmp_path, 1), scenario(1, data={"keep": "none"})
    boards.bring(0, 0)
    ask(boards, "train", chosen)
    boards.bring(0, 1)

    def refuse(file: Path, image: Any) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(field, "_unlink_same", refuse)
    with pytest.warns(RuntimeWarning, match="learned images cannot be deleted"):
        assert ask(boards, "train", chosen, task=1)["examples"] > 0
    monkeypatch.undo()
    monkeypatch.setattr(client.app, "FieldTasks", partial(FieldTasks, clock=later))
    ask(boards, "train", chosen, task=1)
    assert len(list(boards.folder(0).rglob("*.png"))) == 10

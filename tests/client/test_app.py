"""The ClientApp: what a message does to a device, and what comes back. Messages are real, the wire is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from safetensors.torch import load_file

import client.app
import lightcl.device.prefix
from client.app import local_settings, make_app
from client.board.config import BoardConfig, Limits
from lightcl.exchange.messages import Instruction
from lightcl.networks.staged import Backbone, Stage
from tests.inprocess import InProcessGrid, small


def ask(grid: InProcessGrid, kind: str, *, node: int = 100, **changes: Any) -> dict[str, Any]:
    """Sends one instruction and gives the reply's record."""
    told = Instruction(0, "run", small().model_dump_json(), 1, 0, 2, 0)
    record = replace(told, **changes).to_record()
    message = Message(RecordDict({"instruction": ConfigRecord(record)}), dst_node_id=node, message_type=kind)
    (message_id,) = grid.push_messages([message])
    (reply,) = grid.pull_messages([message_id])
    return dict(reply.content.config_records["reply"])


def test_a_node_says_what_it_hosts(tmp_path: Path) -> None:
    said = ask(InProcessGrid(tmp_path, 2), "query", node=101)
    assert (said["partition"], said["partitions"], said["channels"]) == (1, 2, 1)
    assert said["classes"] == 4  # of ten digits, which the stream has


@pytest.mark.parametrize(("partitions", "refused"), [(2, True), (3, False), (0, False)])
def test_a_board_with_data_of_its_own_is_one_device(tmp_path: Path, partitions: int, refused: bool) -> None:
    grid = InProcessGrid(tmp_path, 2)
    grid.nodes[100].node_config.update({"own-data": True, "num-partitions": partitions})
    said = ask(grid, "query")
    assert ("reason" in said) == refused
    if refused:
        for key in ("own-data", "num-partitions=2", "fleet.devices"):
            assert key in said["reason"]


def test_a_message_that_arrives_twice_trains_once(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path, 1)
    first = ask(grid, "train")
    files = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    assert files
    second = ask(grid, "train")
    assert second == first
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == files


def test_state_is_on_disk_and_not_in_flowers_context(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path, 1)
    ask(grid, "train")
    assert len(grid.nodes[100].state) == 0
    manifest = json.loads((tmp_path / "run" / "device-00000" / "state.json").read_text())
    assert manifest["position"] == {"task": 0, "epochs": 2}
    fresh = InProcessGrid(tmp_path, 1)  # a new process would see the same
    assert ask(fresh, "evaluate")["til"] == ask(grid, "evaluate")["til"]


def test_a_device_refuses_what_does_not_follow_and_says_where_it_is(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path, 1)
    ask(grid, "train")
    refusal = ask(grid, "train", task=0, until_epoch=1)
    assert (refusal["task"], refusal["epochs"]) == (0, 2)
    assert "has done 2 of 2 epochs of task 0" in refusal["reason"]


def test_a_scenario_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path, 1)
    assert "unknown key" in ask(grid, "train", scenario='{"nonsense": 1}')["reason"]
    crowded = small(stream={"tasks": 6})
    assert "6 tasks x 2 classes need 12" in ask(grid, "train", scenario=crowded.model_dump_json())["reason"]


def test_the_nodes_own_configuration_wins(tmp_path: Path) -> None:
    app = make_app()
    context = Context(1, 7, {"partition-id": 0, "state-dir": str(tmp_path / "own"), "name": "drone"}, RecordDict(), {})
    InProcessGrid(tmp_path, 1)
    record = Instruction(0, "run", small().model_dump_json(), 1, 0, 1, 0).to_record()
    message = Message(RecordDict({"instruction": ConfigRecord(record)}), dst_node_id=7, message_type="train")
    assert "reason" not in app(message, context).content.config_records["reply"]
    assert (tmp_path / "own" / "run" / "device-00000" / "state.json").exists()


def test_a_misspelled_limit_is_refused_and_not_lost(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path, 1)
    grid.nodes[100].node_config["limit-temperature"] = 70
    said = "--node-config: unknown key 'limit-temperature', did you mean 'limit-temperature-c'? (allowed: partition-id,"
    for kind in ("query", "train", "evaluate"):
        assert ask(grid, kind)["reason"].startswith(f"RequestError: {said}")
    config = BoardConfig(
        "board", 0, 1, "host:9092", data="data", own_data=True, delete_learned=True, weights="weights",
        accelerator="cpu", threads=1, limits=Limits(70, 100, 20),
    )  # fmt: skip
    assert local_settings(config.node_config(), tmp_path).limit_temperature_c == 70


@pytest.mark.parametrize(("key", "section"), [("weights-path", {}), ("data-path", {"data": {"source": "parquet"}})])
def test_a_nodes_paths_may_begin_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, section: dict[str, Any]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    grid = InProcessGrid(tmp_path / "s", 1)
    grid.nodes[100].node_config[key] = "~/nowhere"
    assert f"{tmp_path}/nowhere" in ask(grid, "train", scenario=small(**section).model_dump_json())["reason"]


def test_devices_of_one_process_get_networks_that_do_not_share_what_they_train(tmp_path: Path) -> None:
    """The network is built once per scenario; what one device learns must not reach the next one."""
    together, alone = InProcessGrid(tmp_path / "a", 3), InProcessGrid(tmp_path / "b", 3)
    ask(together, "train", device=1, node=101)
    second = ask(together, "train", device=2, node=102)
    client.app._lender.cache_clear()  # as in a new process
    first = ask(alone, "train", device=2, node=102)
    assert {**first, "seconds": 0, "peak_memory_mib": 0} == {**second, "seconds": 0, "peak_memory_mib": 0}
    states = [load_file(next((tmp_path / name / "run" / "device-00002").glob("*.safetensors"))) for name in ("a", "b")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_devices_of_one_simulation_fold_and_hash_their_prefix_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = small(data={"views": 2, "augmentation": "crop"}).model_dump_json()
    folds: list[str] = []
    original = lightcl.device.prefix.folded

    def counted(network: Backbone) -> Stage:
        folds.append(place)
        return original(network)

    monkeypatch.setattr(lightcl.device.prefix, "folded", counted)
    replies = {}
    for place, durable in (("simulation", False), ("board", True)):
        monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path / f"cache-{place}"))
        client.app._lender.cache_clear()  # as in a new process
        grid = InProcessGrid(tmp_path / place, 3)
        grid.app = client.app.make_app(tmp_path / place, durable=durable)
        replies[place] = [ask(grid, "train", device=d, node=100 + d, scenario=scenario) for d in range(3)]
    assert folds.count("simulation") == 1
    assert folds.count("board") >= 3
    timeless = [[{**r, "seconds": 0, "peak_memory_mib": 0} for r in replies[place]] for place in replies]
    assert timeless[0] == timeless[1]


def test_a_training_with_its_test_asked_twice_trains_once_and_answers_the_same(tmp_path: Path) -> None:
    grid = InProcessGrid(tmp_path, 1)
    first = [dict(r) for r in ask_both(grid)]
    files = {f: f.read_bytes() for f in tmp_path.rglob("*.safetensors")}
    second = [dict(r) for r in ask_both(grid)]
    assert first[0] == second[0]
    assert {**first[1], "seconds": 0} == {**second[1], "seconds": 0}
    assert len(first[1]["til"]) == 1
    assert {f: f.read_bytes() for f in tmp_path.rglob("*.safetensors")} == files


def ask_both(grid: InProcessGrid) -> list[Any]:
    record = Instruction(0, "run", small().model_dump_json(), 1, 0, 2, 0, evaluate=True).to_record()
    message = Message(RecordDict({"instruction": ConfigRecord(record)}), dst_node_id=100, message_type="train")
    (reply,) = grid.pull_messages(grid.push_messages([message]))
    return [reply.content.config_records["reply"], reply.content.config_records["tested"]]

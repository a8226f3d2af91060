"""Strategies by name with typed options, and what happens to values that are not finite."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from pydantic import ValidationError

from lightcl.errors import RequestError
from lightcl.exchange.section import STRATEGY_OPTIONS, StrategyName
from lightcl.records.folder import RunFolder
from lightcl.scenario import Server
from server.aggregation import Aggregator
from server.aggregation.weights import (
    STRATEGIES,
    SharedWeights,
    advice,
    build_strategy,
    contribution,
    least_replies,
)
from server.rounds import Coordinator
from tests.inprocess import InProcessGrid, Silent, small

NAME = "layer4.0.conv1.weight"


def moved(
    tmp_path: Path, section: Server, *devices: list[float], start: float = 0.0, warnings: list[str] | None = None
) -> tuple[bool, list[float]]:
    """Whether the weights moved, and where to, when devices report these values with one example each."""
    grid = InProcessGrid(tmp_path, 1)
    warned = (warnings if warnings is not None else []).append
    weights = SharedWeights(section, {NAME: np.full(len(devices[0]), start, np.float32)}, warned)
    sent = Message(content=RecordDict(), dst_node_id=100, message_type="train")
    sent.metadata.__dict__["_message_id"] = "sent"
    reported = [contribution(sent, {NAME: np.array(values, np.float32)}, 1.0) for values in devices]
    has_moved = weights.update_(reported, 1, grid)  # type: ignore[arg-type]
    return has_moved, weights.arrays[NAME].tolist()


def test_every_name_has_a_strategy_and_options() -> None:
    names = set(get_args(StrategyName))
    assert names == set(STRATEGIES) == set(STRATEGY_OPTIONS)
    for name in names:
        strategy = build_strategy(Server(strategy=name))
        for option, value in Server(strategy=name).options():
            assert getattr(strategy, option) == value, f"{name}.{option}: our default is not Flower's"


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        # One of four devices sends 99: the mean follows it, the others do not.
        ({"strategy": "FedAvg"}, 25.75),
        ({"strategy": "FedMedian"}, 1.5),
        ({"strategy": "FedTrimmedAvg", "strategy_options": {"beta": 0.25}}, 1.5),
        # Krum, n - f - 2 = 1 neighbor: 1, 1 and 2 have distances 0, 0 and 1; the first of the smallest wins.
        ({"strategy": "Krum", "strategy_options": {"num_malicious_nodes": 1}}, 1.0),
        # The two devices at 1.
        ({"strategy": "MultiKrum", "strategy_options": {"num_malicious_nodes": 1, "num_nodes_to_select": 2}}, 1.0),
    ],
)
def test_an_outlier_on_numbers_by_hand(tmp_path: Path, section: dict[str, Any], expected: float) -> None:
    values = [[1.0], [1.0], [2.0], [99.0]]
    assert moved(tmp_path, Server(**section), *values) == (True, [pytest.approx(expected)])


def test_bulyan_needs_enough_replies_and_keeps_the_old_model_otherwise(tmp_path: Path) -> None:
    section = Server(strategy="Bulyan", strategy_options={"num_malicious_nodes": 1})
    # 4 f + 3 = 7 replies; theta = 5 are selected, the beta = 3 values closest to their median are averaged.
    seven, warnings = [[1.0], [1.0], [1.0], [1.0], [1.0], [1.0], [100.0]], list[str]()
    assert moved(tmp_path, section, *seven, warnings=warnings) == (True, [1.0])
    assert warnings == []
    assert moved(tmp_path, section, *seven[:6], start=0.5, warnings=warnings) == (False, [0.5])
    assert warnings == [
        "round 1: server.strategy Bulyan needs 7 replies (4 x num_malicious_nodes + 3), but 6 can be used: the shared "
        "weights stay as they are"
    ]


@pytest.mark.parametrize(
    ("section", "replies", "said"),
    [
        ({"strategy": "FedTrimmedAvg"}, 4, "FedTrimmedAvg needs 5 replies .*: nothing is trimmed"),
        ({"strategy": "Krum", "strategy_options": {"num_malicious_nodes": 1}}, 4, "Krum needs 5 replies .2 x num_mali"),
        ({"strategy": "MultiKrum", "strategy_options": {"num_nodes_to_select": 6}}, 5, "needs 6 replies .num_nodes_to"),
    ],
)
def test_too_few_replies_of_a_round_are_said(tmp_path: Path, section: dict[str, Any], replies: int, said: str) -> None:
    warnings: list[str] = []
    moved(tmp_path, Server(**section), *[[1.0]] * replies, warnings=warnings)
    assert len(warnings) == 1
    assert re.search(said, warnings[0]), warnings
    moved(tmp_path, Server(**section), *[[1.0]] * (replies + 1), warnings=warnings)
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("devices", "section", "said"),
    [
        (5, {"strategy": "Bulyan", "strategy_options": {"num_malicious_nodes": 1}},
         r"Bulyan with num_malicious_nodes 1 needs 7 devices in a round \(4 x num_malicious_nodes \+ 3\), but at "
         r"most 5 train in one \(fleet.devices 5, server.fraction 1\). allowed: .* or num_malicious_nodes 0 to 0"),
        (2, {"strategy": "Bulyan"}, "needs 3 devices .* allowed: more devices in a round or strategy FedMedian$"),
        (8, {"strategy": "Krum", "strategy_options": {"num_malicious_nodes": 1}, "fraction": 0.5}, "at most 4 train"),
        (5, {"strategy": "MultiKrum", "strategy_options": {"num_nodes_to_select": 6}},
         "needs 6 devices .*num_malicious_nodes 0 to 1 with num_nodes_to_select 1 to 5"),
        (3, {"strategy": "FedTrimmedAvg"}, "with beta 0.2 needs 5 devices .*or beta from 0.333334"),
    ],
)  # fmt: skip
def test_a_strategy_that_no_round_can_meet_is_refused(devices: int, section: dict[str, Any], said: str) -> None:
    scenario = small(fleet={"devices": devices}, server={"aggregation": "suffix", **section})
    with pytest.raises(RequestError, match=said):
        Aggregator.check(scenario)
    Aggregator.check(small(fleet={"devices": devices}, server=section))  # nothing is shared
    Aggregator.check(small(fleet={"devices": 14}, server={"aggregation": "suffix", **section}))


def test_what_a_strategy_is_advised_to_use_is_allowed() -> None:
    for devices in range(3, 200):
        beta = float(advice(Server(strategy="FedTrimmedAvg"), devices).rpartition(" ")[2])
        section = Server(strategy="FedTrimmedAvg", strategy_options={"beta": beta})
        assert least_replies(section)[0] <= devices
        assert int(beta * devices) >= 1
    assert least_replies(Server(strategy="FedTrimmedAvg", strategy_options={"beta": 0.0}))[0] == 1, "as one asked for"
    assert least_replies(Server(strategy="FedTrimmedAvg", strategy_options={"beta": 5e-324}))[0] >= 1e9


@pytest.mark.parametrize("strategy", ["Krum", "MultiKrum", "Bulyan"])
def test_devices_are_chosen_by_their_updates_whatever_the_norm_of_the_model(tmp_path: Path, strategy: str) -> None:
    """Squares of 1e5 are 1024 apart in fp32."""
    options = {"num_malicious_nodes": 0 if strategy == "Bulyan" else 1}
    values = [1e5 + update for update in (40.0, -20.0, 1.0, 1.125, 0.875)]
    section = Server.model_validate({"strategy": strategy, "strategy_options": options})
    has_moved, found = moved(tmp_path, section, *[[value] for value in values], start=1e5)
    # Krum, n - f - 2 = 2 neighbors: 1.0 is nearest to 1.125 and 0.875. Bulyan, f = 0: the mean of all five.
    assert (has_moved, found) == (True, [pytest.approx(1e5 + (23 / 5 if strategy == "Bulyan" else 1.0), abs=0.005)])


@pytest.mark.parametrize(
    ("section", "mean", "variance"),
    [
        ({"strategy": "FedAvg"}, 21.2, 20.8),
        ({"strategy": "FedMedian"}, 2.0, 1.0),
        ({"strategy": "FedTrimmedAvg"}, 2.0, 1.0),
        # Squared distances to two neighbors: 13, 5, 2, 5 and 85.
        ({"strategy": "Krum", "strategy_options": {"num_malicious_nodes": 1}}, 2.0, 1.0),
        ({"strategy": "MultiKrum", "strategy_options": {"num_malicious_nodes": 1, "num_nodes_to_select": 3}}, 2.0, 1.0),
        ({"strategy": "Bulyan"}, 2.0, 1.0),
    ],
)
def test_batch_norm_statistics_follow_the_strategy(
    tmp_path: Path, section: dict[str, Any], mean: float, variance: float
) -> None:
    """Five devices, one of which sends means of 99 and variances of 100."""
    names = [NAME, "layer4.0.bn1.running_mean", "layer4.0.bn1.running_var"]
    reported = [[-1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [2.0, 2.0, 1.0], [3.0, 3.0, 1.0], [9.0, 99.0, 100.0]]
    grid = InProcessGrid(tmp_path, 1)
    weights = SharedWeights(Server(**section), {name: np.zeros(1, np.float32) for name in names}, pytest.fail)
    sent = Message(content=RecordDict(), dst_node_id=100, message_type="train")
    sent.metadata.__dict__["_message_id"] = "sent"
    arrays = [{name: np.array([v], np.float32) for name, v in zip(names, row, strict=True)} for row in reported]
    given = [contribution(sent, own, 1.0, device) for device, own in enumerate(arrays)]
    assert weights.update_(given, 1, grid)  # type: ignore[arg-type]
    assert [weights.arrays[name].item() for name in names[1:]] == pytest.approx([mean, variance])


@pytest.mark.parametrize("strategy", get_args(StrategyName))
def test_a_model_that_is_not_finite_is_never_adopted(tmp_path: Path, strategy: StrategyName) -> None:
    """Replies with NaN are refused one by one before; this is the second line: sums may overflow all the same."""
    nan, warnings = [[float("nan")]] * 5, list[str]()
    assert moved(tmp_path, Server(strategy=strategy), *nan, start=0.5, warnings=warnings) == (False, [0.5])
    assert warnings == [f"round 1: the new tensor {NAME!r} is not finite; the old model is kept"]


@pytest.mark.parametrize("strategy", get_args(StrategyName))
def test_an_overflow_does_not_stay_in_the_servers_optimizer(tmp_path: Path, strategy: StrategyName) -> None:
    """After a round that was not adopted, the next one moves the weights as if it had not been."""
    options = {"server_momentum": 0.5} if strategy == "FedAvgM" else {}
    section, moves = Server(strategy=strategy, strategy_options=options), []
    for rounds in ([1.0, 2.0, 3.0], [1.0, np.inf, 2.0, 3.0]):
        grid, weights = InProcessGrid(tmp_path, 1), SharedWeights(section, {NAME: np.zeros(1, np.float32)}, print)
        sent = Message(content=RecordDict(), dst_node_id=100, message_type="train")
        sent.metadata.__dict__["_message_id"] = "sent"
        for value in rounds:
            number = max(1, int(min(value, 2.0)))  # Adam's bias correction depends on the round's number
            reported = [contribution(sent, {NAME: np.array([value], np.float32)}, 1.0) for _ in range(3)]
            assert weights.update_(reported, number, grid) == np.isfinite(value)  # type: ignore[arg-type]
        moves.append(weights.arrays[NAME].tolist())
    assert moves[1] == pytest.approx(moves[0])


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"strategy": "Krum", "strategy_options": {"num_malicious_nodes": 1.5}}, "num_malicious_nodes is 1.5; input"),
        ({"strategy": "Krum", "strategy_options": {"num_malicious": 1}},
         "Krum has no such option, did you mean 'num_malicious_nodes'"),
        ({"strategy": "MultiKrum", "strategy_options": {"num_nodes_to_select": 0}}, "num_nodes_to_select is 0; input"),
        ({"strategy_options": {"eta": 0.1}}, "FedAvg has no such option .allowed: none"),
        ({"strategy": "FedAdam", "strategy_options": {"beta_1": 1}}, "beta_1 is 1; input should be less than 1"),
    ],
)  # fmt: skip
def test_options_are_checked(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Server(**section)


def test_krum_runs_with_an_integer_option_in_a_fleet(tmp_path: Path) -> None:
    scenario = small(
        server={"aggregation": "suffix", "strategy": "Krum", "strategy_options": {"num_malicious_nodes": 0}},
        stream={"tasks": 1},
    )
    folder = RunFolder(tmp_path / "run")
    folder.begin(scenario, {"run": "r"}, [])
    grid = InProcessGrid(tmp_path / "s", 3)
    coordinator = Coordinator(scenario, folder, "r", Silent())
    assert coordinator.run(grid).devices_finished == 3
    assert coordinator.aggregator is not None
    sent = [m.content["arrays"][NAME].numpy() for m in grid.received if m.content.array_records]
    chosen = [np.array_equal(coordinator.aggregator.arrays[NAME], array) for array in sent]
    assert sum(chosen) == 1, "Krum takes over the weights of one device"

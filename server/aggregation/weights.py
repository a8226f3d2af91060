"""Shared weights, moved by one of Flower's strategies, and batch-norm statistics.

Statistics are averaged, weighted by examples. Strategies against outliers protect them, too: Krum and MultiKrum take
those of the devices whose weights they have chosen, FedMedian and FedTrimmedAvg the median of each value, Bulyan the
median over the devices that it has chosen.

Krum, MultiKrum and Bulyan choose by distances, which they compute as |x|² + |y|² - 2xy. On weights in fp32 the norm of
the model would be so much larger than that of an update that rounding decided. They get the updates x - w, in fp64.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as strategies
from torch import Tensor

from lightcl.errors import RequestError
from lightcl.exchange.messages import ARRAYS, EXAMPLES, METRICS
from lightcl.exchange.section import StrategyName
from lightcl.exchange.tensors import STATISTICS, Arrays, is_statistic, split, weighted_average
from lightcl.scenario import Server
from lightcl.storage.state import under
from server.aggregation.robust import coordinate_median, not_finite
from server.arrays import plain_record

STRATEGIES: dict[StrategyName, type[strategies.FedAvg]] = {
    "FedAvg": strategies.FedAvg,
    "FedAvgM": strategies.FedAvgM,
    "FedAdam": strategies.FedAdam,
    "FedAdagrad": strategies.FedAdagrad,
    "FedYogi": strategies.FedYogi,
    "FedMedian": strategies.FedMedian,
    "FedTrimmedAvg": strategies.FedTrimmedAvg,
    "Krum": strategies.Krum,
    "MultiKrum": strategies.MultiKrum,
    "Bulyan": strategies.Bulyan,
}
"""The options of each are in lightcl/exchange/section.py."""

OPTIMIZER_STATE = ("m_t", "v_t")
"""Dictionaries that FedAdam, FedAdagrad and FedYogi carry from round to round."""

CHOOSING: tuple[StrategyName, ...] = ("Krum", "MultiKrum", "Bulyan")
"""They choose devices by the distances of their updates."""

MEDIANS: tuple[StrategyName, ...] = ("FedMedian", "FedTrimmedAvg", "Bulyan")
"""Under these the median of each value becomes the batch-norm statistic."""

MOMENTUM_STATE = ("momentum_vector", "current_arrays")
"""FedAvgM's; its arrays are those that it moved last."""


@dataclass(frozen=True)
class Contribution:
    """A checked reply until its round is over."""

    reply: Message | None
    """The weights; None where the device shares statistics only."""
    batch_norm: Arrays
    sums: Arrays
    examples: float
    device: int = 0
    images: int | None = None
    """How many training images the device has for this task, where the server knows it."""


def contribution(
    instruction: Message,
    arrays: Arrays,
    examples: float,
    device: int = 0,
    images: int | None = None,
) -> Contribution:
    """The contribution of a reply. All of a round are kept until Flower averages them, each tensor only once.

    Weights are fp32 from here on, the type in which they are used, with the last index running fastest.
    """
    sums, weights = split(arrays, STATISTICS)
    weights = {name: array.astype(np.float32, order="C", copy=False) for name, array in weights.items()}
    batch_norm = {name: array for name, array in weights.items() if is_statistic(name)}
    reply = _reply(instruction, weights) if weights else None
    return Contribution(reply, batch_norm, sums, examples, device, images)


def build_strategy(section: Server) -> strategies.FedAvg:
    """The strategy that the section names, with its options. Raises RequestError where Flower refuses them.

    It is built with `fraction_train=0`: it then records the current arrays and sends nothing itself. Selection, checks
    and records are the server's.
    """
    kind = STRATEGIES[section.strategy]
    given = {name: getattr(section.options(), name) for name in section.strategy_options}
    with _quiet():
        try:
            return kind(fraction_train=0.0, fraction_evaluate=0.0, **given)
        except Exception as error:  # each strategy has exceptions of its own
            raise RequestError(f"server.strategy_options: {kind.__name__} refuses them: {error}") from error


def least_replies(section: Server) -> tuple[int, str]:
    """The fewest replies of a round with which the strategy does what it is for, and the rule that says so.

    Blanchard et al., 2017 (Krum), El Mhamdi et al., 2018 (Bulyan).
    """
    options = dict(section.options())
    malicious = int(options.get("num_malicious_nodes", 0))
    if section.strategy == "FedTrimmedAvg" and options["beta"] > 0:
        fewest = math.ceil(min(1 / options["beta"], 1e9))
        fewest += int(options["beta"] * fewest) < 1  # as Flower rounds
        return fewest, "int(beta x devices) are cut off at each end, which must be 1 at least"
    if section.strategy == "MultiKrum" and options["num_nodes_to_select"] > 2 * malicious + 3:
        return int(options["num_nodes_to_select"]), "num_nodes_to_select"
    if section.strategy in ("Krum", "MultiKrum"):
        return 2 * malicious + 3, "2 x num_malicious_nodes + 3"
    if section.strategy == "Bulyan":
        return 4 * malicious + 3, "4 x num_malicious_nodes + 3"
    return 1, ""


def advice(section: Server, most: int) -> str:
    """What is allowed where so many devices, at most, are too few for the strategy."""
    allowed = ["more devices in a round", "strategy FedMedian"]
    if section.strategy == "FedTrimmedAvg":
        allowed += [f"beta from {math.ceil(1e6 / most) / 1e6:g}"] if most > 2 else []
    elif (malicious := (most - 3) // (4 if section.strategy == "Bulyan" else 2)) >= 0:
        selected = f" with num_nodes_to_select 1 to {most}" if section.strategy == "MultiKrum" else ""
        allowed += [f"num_malicious_nodes 0 to {malicious}{selected}"]
    return f"allowed: {', '.join(allowed[:-1])} or {allowed[-1]}"


class SharedWeights:
    """The shared tensors of a fleet, by name, and the strategy that moves them."""

    def __init__(self, section: Server, arrays: Arrays, warned: Callable[[str], None]) -> None:
        self.arrays, self._section, self._warned = arrays, section, warned
        self._strategy = build_strategy(section)
        self._strategy.train_metrics_aggr_fn = self._note_averaged
        self._averaged: list[RecordDict] = []
        """The contents of those replies that the strategy has averaged last."""

    def update_(self, contributions: Sequence[Contribution], round_number: int, grid: Grid) -> bool:
        """Moves the tensors; returns whether they moved. The tensors in the contributions are gone afterwards."""
        replies = [item.reply for item in contributions if item.reply]
        if not replies:
            return False
        for item in contributions:
            if item.reply:
                item.reply.content[METRICS] = MetricRecord({EXAMPLES: item.examples})
        self._warn_of_too_few(len(replies), round_number)
        chooses = self._section.strategy in CHOOSING
        if chooses:
            for reply in replies:
                self._make_update_(reply)
        # Flower replaces the tensors in these collections and changes none in place.
        optimizer = {name: copy(getattr(self._strategy, name, None)) for name in (*OPTIMIZER_STATE, *MOMENTUM_STATE)}
        has_moved = False
        try:
            with _quiet():
                # Names in sorted order throughout: FedAvgM pairs tensors by position.
                names = sorted(name for name in self.arrays if not is_statistic(name))
                current = plain_record({name: self.arrays[name] for name in names})
                self._strategy.configure_train(round_number, current, ConfigRecord(), grid)
                moved, _ = self._strategy.aggregate_train(round_number, replies)
            found = self._statistics(contributions)
            for name, array in (moved or {}).items():
                values = array.numpy() + self.arrays[name] if chooses else array.numpy()
                found[name] = values.astype(np.float32)
            wrong = not_finite(found)
            if wrong is not None:
                self._warned(f"round {round_number}: the new tensor {wrong!r} is not finite; the old model is kept")
            has_moved = moved is not None and wrong is None
        finally:
            self._averaged = []
            for reply in replies:  # Flower's views of it are reference cycles: all tensors would stay for many rounds
                reply.content[ARRAYS].clear()
            for name, value in optimizer.items():  # otherwise one overflow would stay in its moments for good
                if not has_moved and hasattr(self._strategy, name):
                    setattr(self._strategy, name, value)
        if has_moved:
            self.arrays = found
        return has_moved

    def _note_averaged(self, contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        """Flower asks for the mean metrics of the replies that it has averaged: that says which ones these are."""
        self._averaged = list(contents)
        return MetricRecord()

    def _statistics(self, contributions: Sequence[Contribution]) -> Arrays:
        """The new batch-norm statistics; the present ones where no averaged reply has any."""
        averaged = {id(content) for content in self._averaged}
        given = [c for c in contributions if c.batch_norm and c.reply and id(c.reply.content) in averaged]
        if not given:
            return {name: array for name, array in self.arrays.items() if is_statistic(name)}
        if self._section.strategy in MEDIANS:
            return coordinate_median([item.batch_norm for item in given])
        return weighted_average([item.batch_norm for item in given], [item.examples for item in given])

    def _make_update_(self, reply: Message) -> None:
        """The device's weights x become x - w, in fp64: w + (x - w) is x again."""
        weights = reply.content.array_records[ARRAYS]
        reply.content[ARRAYS] = plain_record(
            {name: array.numpy().astype(np.float64) - self.arrays[name] for name, array in weights.items()}
        )

    def _warn_of_too_few(self, replies: int, round_number: int) -> None:
        needed, rule = least_replies(self._section)
        if replies < needed:
            effects = {"Bulyan": "the shared weights stay as they are", "FedTrimmedAvg": "nothing is trimmed"}
            effect = effects.get(self._section.strategy, "its choice is no protection")
            self._warned(
                f"round {round_number}: server.strategy {self._section.strategy} needs {needed} replies ({rule}), but "
                f"{replies} can be used: {effect}"
            )

    def state(self) -> dict[str, Tensor]:
        """The tensors and those of the server's optimizer."""
        state = {f"shared/{name}": torch.from_numpy(array) for name, array in self.arrays.items()}
        for attribute in OPTIMIZER_STATE:
            for name, array in (getattr(self._strategy, attribute, None) or {}).items():
                state[f"{attribute}/{name}"] = torch.from_numpy(np.asarray(array))
        for index, array in enumerate(getattr(self._strategy, "momentum_vector", None) or []):
            state[f"momentum/{index:05d}"] = torch.from_numpy(np.asarray(array))
        return state

    def restore_(self, state: Mapping[str, Tensor]) -> None:
        def part(prefix: str) -> dict[str, np.ndarray]:
            return {name: tensor.numpy() for name, tensor in under(state, prefix).items()}

        self.arrays = part("shared/")
        for attribute in OPTIMIZER_STATE:
            if part(f"{attribute}/"):
                setattr(self._strategy, attribute, part(f"{attribute}/"))
        if momentum := part("momentum/"):
            cast(strategies.FedAvgM, self._strategy).momentum_vector = [momentum[k] for k in sorted(momentum)]


def _reply(instruction: Message, arrays: Arrays) -> Message:
    parameters = {name: arrays[name] for name in sorted(arrays) if not is_statistic(name)}
    return Message(RecordDict({ARRAYS: plain_record(parameters)}), reply_to=instruction)


@contextmanager
def _quiet() -> Iterator[None]:
    """Flower's strategies log what the run's own records say better."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)

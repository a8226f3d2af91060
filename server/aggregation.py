"""What a fleet shares: weights averaged by Flower's strategies (batch-norm statistics by a weighted mean), and sums."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as strategies
from torch import Tensor

from lightcl.errors import RequestError, nearest
from lightcl.exchange.messages import ARRAYS, EXAMPLES, METRICS
from lightcl.exchange.tensors import (
    FLEET_HEAD,
    STATISTICS,
    Arrays,
    is_statistic,
    outgoing,
    outgoing_head,
    outgoing_statistics,
    split,
    weighted_average,
)
from lightcl.methods import Method
from lightcl.scenario import Server
from lightcl.storage.state import under

OPTIMIZER_STATE = ("m_t", "v_t")
"""Dictionaries that FedAdam, FedAdagrad and FedYogi carry from round to round."""


@dataclass(frozen=True)
class Contribution:
    """A checked answer until its round is over: what Flower averages is in Flower's form already, and only there."""

    reply: Message | None
    """The weights; None where the device shares statistics only."""
    batch_norm: Arrays
    sums: Arrays
    examples: float


def contribution(instruction: Message, arrays: Arrays, examples: float) -> Contribution:
    """What an answer adds. A round's are all held until Flower averages them, so each holds a tensor only once."""
    sums, weights = split(arrays, STATISTICS)
    batch_norm = {name: array for name, array in weights.items() if is_statistic(name)}
    return Contribution(_reply(instruction, weights, examples) if weights else None, batch_norm, sums, examples)


class Aggregator:
    """The shared tensors of a fleet and how they move from round to round.

    Sampling, checking and book-keeping are the coordinator's; Flower's strategy is asked for its average alone, which
    is why it is built with `fraction_train=0`: it then records the current arrays and sends nothing itself.
    """

    def __init__(self, section: Server, method: Method) -> None:
        self.weights: Arrays = outgoing(method.network, section.aggregation)
        self.sums: Arrays = {name: np.zeros_like(a) for name, a in outgoing_statistics(method).items()}
        self.head: Arrays = {}
        self.version = 0
        self._method = method
        self._strategy = self.check(section)
        self._record: tuple[int, ArrayRecord] | None = None

    @property
    def shares(self) -> bool:
        """Whether there is anything to share under this scenario."""
        return bool(self.weights or self.sums)

    @property
    def arrays(self) -> Arrays:
        """What the devices get."""
        return self.weights | self.head

    @property
    def record(self) -> ArrayRecord:
        """`arrays` as messages carry them: one object a version, the same in all messages, so not to be changed."""
        if self._record is None or self._record[0] != self.version:
            self._record = self.version, ArrayRecord({name: Array(array) for name, array in self.arrays.items()})
        return self._record[1]

    def shapes(self, finished: bool) -> dict[str, tuple[int, ...]]:
        """What a device's answer must hold; the one that finishes a task also holds its statistics."""
        return {name: array.shape for name, array in (self.weights | (self.sums if finished else {})).items()}

    @staticmethod
    def check(section: Server) -> strategies.FedAvg:
        """The strategy that the section names. Raises RequestError for an option that it does not take."""
        kind: type[strategies.FedAvg] = getattr(strategies, section.strategy)
        _check_options(kind, section.strategy_options)
        with _quiet():
            try:
                return kind(fraction_train=0.0, fraction_evaluate=0.0, **cast(Any, section.strategy_options))
            except Exception as error:  # each strategy has exceptions of its own
                raise RequestError(f"server.strategy_options: {kind.__name__} refuses them: {error}") from error

    def update(self, answers: Sequence[Contribution], round_number: int, grid: Grid) -> None:
        """Moves the shared tensors by the checked answers of one round; their tensors are gone afterwards."""
        sums = [answer.sums for answer in answers if answer.sums]
        moved = self._average([answer for answer in answers if answer.reply], round_number, grid)
        if sums:
            for name, total in self.sums.items():
                total += np.sum([mine[name] for mine in sums], axis=0)
            self.head = outgoing_head(self._method, self.sums)
        self.version += moved or bool(sums)

    def _average(self, answers: Sequence[Contribution], round_number: int, grid: Grid) -> bool:
        """Moves the weights; says whether they moved."""
        if not answers:
            return False
        averaged = weighted_average([answer.batch_norm for answer in answers], [answer.examples for answer in answers])
        with _quiet():
            # Names in sorted order throughout: FedAvgM pairs tensors by position.
            current = ArrayRecord({n: Array(self.weights[n]) for n in sorted(self.weights) if not is_statistic(n)})
            self._strategy.configure_train(round_number, current, ConfigRecord(), grid)
            replies = [answer.reply for answer in answers if answer.reply]
            moved, _ = self._strategy.aggregate_train(round_number, replies)
        if moved is not None:
            averaged |= {name: array.numpy().astype(np.float32) for name, array in moved.items()}
            self.weights = averaged
        for reply in replies:  # Flower's views of it are reference cycles: all tensors would stay for many rounds
            reply.content[ARRAYS].clear()
        return moved is not None

    def state(self) -> dict[str, Tensor]:
        """The shared tensors and the server optimizer's, for a run that is to be resumed."""
        state = {f"shared/{name}": torch.from_numpy(array) for name, array in self.weights.items()}
        state |= {name: torch.from_numpy(array) for name, array in (self.sums | self.head).items()}
        for attribute in OPTIMIZER_STATE:
            for name, array in (getattr(self._strategy, attribute, None) or {}).items():
                state[f"{attribute}/{name}"] = torch.from_numpy(np.asarray(array))
        for index, array in enumerate(getattr(self._strategy, "momentum_vector", None) or []):
            state[f"momentum/{index:05d}"] = torch.from_numpy(np.asarray(array))
        return state

    def restore(self, state: Mapping[str, Tensor], version: int) -> None:
        def part(prefix: str) -> dict[str, np.ndarray]:
            return {name: tensor.numpy() for name, tensor in under(state, prefix).items()}

        self.weights, self.version = part("shared/"), version
        if self.sums:
            self.sums = {f"{STATISTICS}{name}": np.array(array) for name, array in part(STATISTICS).items()}
            self.head = {f"{FLEET_HEAD}{name}": array for name, array in part(FLEET_HEAD).items()}
        for attribute in OPTIMIZER_STATE:
            if part(f"{attribute}/"):
                setattr(self._strategy, attribute, part(f"{attribute}/"))
        if momentum := part("momentum/"):
            cast(strategies.FedAvgM, self._strategy).momentum_vector = [momentum[k] for k in sorted(momentum)]


def _reply(instruction: Message, arrays: Arrays, weight: float) -> Message:
    parameters = {name: Array(arrays[name]) for name in sorted(arrays) if not is_statistic(name)}
    content = RecordDict({ARRAYS: ArrayRecord(parameters), METRICS: MetricRecord({EXAMPLES: weight})})
    return Message(content, reply_to=instruction)


def _check_options(kind: type, options: Mapping[str, float]) -> None:
    allowed = [
        name
        for name, parameter in inspect.signature(kind).parameters.items()
        if isinstance(parameter.default, float) and not name.startswith("fraction_")
    ]
    for name in options:
        if name not in allowed:
            raise RequestError(
                f"server.strategy_options.{name}: {kind.__name__} has no such option{nearest(name, allowed)} "
                f"(allowed: {', '.join(allowed) or 'none'})"
            )


@contextmanager
def _quiet() -> Any:
    """Flower's strategies log what the coordinator's own records say better."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)

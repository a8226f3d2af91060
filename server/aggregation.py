"""Averaging the shared tensors: Flower's strategies for parameters, a weighted mean for batch-norm statistics."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as strategies
from torch import Tensor

from lightcl.errors import RequestError, nearest
from lightcl.exchange import Arrays, is_statistic, weighted_average
from lightcl.protocol import ARRAYS, EXAMPLES, METRICS
from lightcl.scenario import Server

OPTIMISER_STATE = ("m_t", "v_t")
"""Dictionaries that FedAdam, FedAdagrad and FedYogi carry from round to round."""


class Aggregator:
    """The shared tensors of a fleet and how they move from round to round.

    Sampling, checking and book-keeping are the coordinator's; Flower's strategy is asked for its average alone, which
    is why it is built with `fraction_train=0`: it then records the current arrays and sends nothing itself.
    """

    def __init__(self, section: Server, initial: Arrays) -> None:
        self.arrays: Arrays = initial
        self.version = 0
        self._strategy = self.check(section)

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

    def update(self, replies: Sequence[tuple[Message, Arrays, float]], round_number: int, grid: Grid) -> None:
        """Moves the shared tensors by checked `(instruction, arrays, weight)` replies of one round."""
        if not replies:
            return
        averaged = weighted_average(
            [{n: a for n, a in arrays.items() if is_statistic(n)} for _, arrays, _ in replies], [w for *_, w in replies]
        )
        with _quiet():
            # Names in sorted order throughout: FedAvgM pairs tensors by position.
            current = ArrayRecord({n: Array(self.arrays[n]) for n in sorted(self.arrays) if not is_statistic(n)})
            self._strategy.configure_train(round_number, current, ConfigRecord(), grid)
            moved, _ = self._strategy.aggregate_train(
                round_number, [_reply(instruction, arrays, weight) for instruction, arrays, weight in replies]
            )
        if moved is not None:
            averaged |= {name: array.numpy().astype(np.float32) for name, array in moved.items()}
            self.arrays = averaged
            self.version += 1

    def state(self) -> dict[str, Tensor]:
        """The shared tensors and the server optimiser's, for a run that is to be resumed."""
        state = {f"shared/{name}": torch.from_numpy(array) for name, array in self.arrays.items()}
        for attribute in OPTIMISER_STATE:
            for name, array in (getattr(self._strategy, attribute, None) or {}).items():
                state[f"{attribute}/{name}"] = torch.from_numpy(np.asarray(array))
        for index, array in enumerate(getattr(self._strategy, "momentum_vector", None) or []):
            state[f"momentum/{index:05d}"] = torch.from_numpy(np.asarray(array))
        return state

    def restore(self, state: Mapping[str, Tensor], version: int) -> None:
        def part(prefix: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(prefix): v.numpy() for k, v in state.items() if k.startswith(prefix)}

        self.arrays, self.version = part("shared/"), version
        for attribute in OPTIMISER_STATE:
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

"""The tensors that a fleet shares and how they move from round to round: weights, and class sums with their head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord
from flwr.serverapp import Grid
from torch import Tensor

from lightcl.errors import RequestError, one_line
from lightcl.exchange.compression import codec_named
from lightcl.exchange.messages import ARRAYS
from lightcl.exchange.tensors import Arrays, outgoing, size_in_bytes
from lightcl.exchange.wire import packed
from lightcl.methods import Method
from lightcl.scenario import Scenario
from server.aggregation.guard import UpdateGuard
from server.aggregation.statistics import ClassSums
from server.aggregation.weights import (
    Contribution,
    SharedWeights,
    advice,
    build_strategy,
    contribution,
    least_replies,
)
from server.mailbox import ENDS_THE_RUN
from server.selection import devices_per_round

__all__ = ["Aggregator", "Contribution", "Outcome", "build_strategy", "contribution"]


@dataclass(frozen=True)
class Outcome:
    """What became of the replies of a round, by device: why some are refused, and whose class sums are in."""

    refused: dict[int, str] = field(default_factory=dict)
    summed: set[int] = field(default_factory=set)


class Aggregator:
    """The shared tensors under one scenario; `version` counts how often they have moved.

    `warned` is told what was wrong with replies that were accepted all the same. `packs`: whether its messages carry
    all tensors in one (`lightcl/exchange/wire.py`).
    """

    def __init__(
        self, scenario: Scenario, method: Method, warned: Callable[[str], None], *, packs: bool = False
    ) -> None:
        section = scenario.server
        self._warned = warned
        self._weights = SharedWeights(section, outgoing(method.network, section.aggregation), warned)
        self._sums = ClassSums(method, section.guard, warned)
        self._guard = UpdateGuard(section.guard, scenario.training.batch_size, warned)
        self.codec, self._packs = codec_named(section.compression), packs
        self.version = 0
        self._record: tuple[int, ArrayRecord, int] | None = None

    @staticmethod
    def check(scenario: Scenario) -> None:
        """Raises RequestError for options that the strategy refuses, or that no round of this fleet can meet."""
        section = scenario.server
        build_strategy(section)
        most, (needed, rule) = devices_per_round(scenario), least_replies(section)
        if section.aggregation != "none" and most < needed:
            options = ", ".join(f"{name} {value:g}" for name, value in section.options())
            raise RequestError(
                f"server.strategy {section.strategy} with {options} needs {needed} devices in a round ({rule}), but at "
                f"most {most} train in one (fleet.devices {scenario.fleet.devices}, server.fraction "
                f"{section.fraction:g}). {advice(section, most)}"
            )

    @property
    def shares(self) -> bool:
        """Whether there is anything to share under this scenario."""
        return bool(self._weights.arrays or self._sums.sums)

    @property
    def sums(self) -> Arrays:
        """The fleet's class sums; empty where the method shares none."""
        return self._sums.sums

    @property
    def arrays(self) -> Arrays:
        """The tensors that devices get."""
        return self._weights.arrays | self._sums.head

    @property
    def record(self) -> ArrayRecord:
        """`arrays` compressed, as messages carry them: one object per version, shared by all messages; read-only."""
        return self._sent[0]

    @property
    def record_bytes(self) -> int:
        return self._sent[1]

    @property
    def _sent(self) -> tuple[ArrayRecord, int]:
        if self._record is None or self._record[0] != self.version:
            sent = self.codec.compress(self.arrays)
            carried = packed(sent) if self._packs else sent
            record = ArrayRecord({name: Array(array) for name, array in carried.items()})
            self._record = self.version, record, size_in_bytes(sent)
        return self._record[1], self._record[2]

    def shapes(self, finished: bool) -> dict[str, tuple[int, ...]]:
        """The tensors that a reply must hold; the one that finishes a task also holds its statistics."""
        expected = self._weights.arrays | (self._sums.sums if finished else {})
        return {name: array.shape for name, array in expected.items()}

    def update(self, contributions: Sequence[Contribution], round_number: int, grid: Grid) -> Outcome:
        """Moves the shared tensors by the checked replies of one round; their tensors are gone afterwards.

        A reply is refused as a whole: where its sums are, its weights are not averaged, either. Where the weights
        cannot be averaged, they stay as they are, with a warning; sums that are in by then stay in.
        """
        refused = self._sums.unlike_the_fleet(_sums_of(contributions))
        left = self._guard.bound_examples(_without(contributions, refused), round_number)
        left, too_far = self._guard.check(left, self._weights.arrays, round_number)
        summed, unsolved = self._sums.update_(_sums_of(left), round_number)
        try:
            moved = self._weights.update_(_without(left, unsolved), round_number, grid)
        except ENDS_THE_RUN:
            raise
        except Exception as error:  # Flower's strategies have their own kinds, and replies may be made to raise them
            moved, why = False, one_line(f"{type(error).__name__}: {error}")
            self._warned(f"round {round_number}: the weights cannot be averaged ({why}); they stay as they are")
        self.version += bool(summed) or moved
        for item in contributions:  # those of refused replies, too
            if item.reply:
                item.reply.content.array_records[ARRAYS].clear()
        return Outcome(refused | too_far | unsolved, summed)

    def state(self) -> dict[str, Tensor]:
        """The shared tensors and the server optimizer's, for a run that is to be resumed."""
        return self._weights.state() | self._sums.state() | self._guard.state()

    def restore(self, state: Mapping[str, Tensor], version: int) -> None:
        self._weights.restore_(state)
        self._sums.restore_(state)
        self._guard.restore_(state)
        self.version = version


def _sums_of(contributions: Sequence[Contribution]) -> dict[int, Arrays]:
    return {item.device: item.sums for item in contributions if item.sums}


def _without(contributions: Sequence[Contribution], refused: Mapping[int, str]) -> list[Contribution]:
    return [item for item in contributions if item.device not in refused]

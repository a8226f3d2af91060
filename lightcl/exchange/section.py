"""The scenario's section `server`: what devices share, how it is combined, and how long the server waits."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lightcl.section import Section

StrategyName = Literal["FedAvg", "FedAvgM", "FedAdam", "FedAdagrad", "FedYogi", "FedMedian", "FedTrimmedAvg"]


class Server(Section):
    aggregation: Literal["none", "suffix", "suffix+head"] = "none"
    """none: isolated devices; suffix: its weighted average is shared, heads stay local; suffix+head: both shared."""
    strategy: StrategyName = "FedAvg"
    """The Flower strategy (flwr.serverapp.strategy) that makes the new shared weights. FedAvg: their mean, weighted by
    examples; FedAvgM: with momentum on the server; FedAdam, FedAdagrad, FedYogi: the mean change is the gradient of
    such an optimizer; FedMedian, FedTrimmedAvg: against outliers."""
    strategy_options: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = Field(default_factory=dict)
    """Its keyword arguments, e.g. {server_momentum: 0.9} or {eta: 0.01, tau: 0.001}."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the devices that train in a round; the least advanced ones go first, ties are drawn by seed."""
    rounds_per_task: int = Field(default=1, ge=1, le=1_000_000)
    """A task's epochs are spread over this many rounds."""
    round_timeout: float = Field(default=86_400.0, gt=0, le=1e8)
    """Seconds a round may take, queueing included."""
    connect_timeout: float = Field(default=600.0, gt=0, le=1e8)
    """Seconds to wait for all devices to connect; while none has, boards that are busy get up to `round_timeout`."""
    max_failures: int = Field(default=3, ge=1, le=1_000_000)
    """Consecutive failures after which a device is left out for the rest of the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for option in ("server_momentum", "beta_1", "beta_2"):
            share = self.strategy_options.get(option, 0.0)
            if share >= 1:
                raise ValueError(f"server.strategy_options.{option} is {share:g}; allowed: from 0 to below 1")
        return self

"""The scenario's section `server`: what devices share, how it is combined, and how long the server waits."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from lightcl.errors import nearest
from lightcl.section import Section

StrategyName = Literal[
    "FedAvg", "FedAvgM", "FedAdam", "FedAdagrad", "FedYogi", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan"
]

Guard = Literal["clip", "refuse", "off"]


class NoOptions(Section):
    """FedAvg, FedMedian."""


class MomentumOptions(Section):
    """FedAvgM."""

    server_learning_rate: float = Field(default=1.0, ge=0, le=1e6)
    server_momentum: float = Field(default=0.0, ge=0, lt=1)


class AdagradOptions(Section):
    eta: float = Field(default=0.1, ge=0, le=1e6)
    """Server learning rate."""
    eta_l: float = Field(default=0.1, ge=0, le=1e6)
    """Client learning rate, as the paper names it; Flower keeps it without using it."""
    tau: float = Field(default=1e-3, ge=0, le=1e6)
    """Added to the denominator: the larger, the less adaptive."""


class AdamOptions(AdagradOptions):
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    beta_2: float = Field(default=0.99, ge=0, lt=1)


class YogiOptions(AdamOptions):
    eta: float = Field(default=0.01, ge=0, le=1e6)
    eta_l: float = Field(default=0.0316, ge=0, le=1e6)


class TrimmedOptions(Section):
    """FedTrimmedAvg."""

    beta: float = Field(default=0.2, ge=0, lt=0.5)
    """Share of the values that is cut off at each end."""


class KrumOptions(Section):
    """Krum and Bulyan."""

    num_malicious_nodes: int = Field(default=0, ge=0, le=100_000)


class MultiKrumOptions(KrumOptions):
    num_nodes_to_select: int = Field(default=1, ge=1, le=100_000)
    """Updates that are averaged."""


STRATEGY_OPTIONS: dict[StrategyName, type[Section]] = {
    "FedAvg": NoOptions,
    "FedAvgM": MomentumOptions,
    "FedAdam": AdamOptions,
    "FedAdagrad": AdagradOptions,
    "FedYogi": YogiOptions,
    "FedMedian": NoOptions,
    "FedTrimmedAvg": TrimmedOptions,
    "Krum": KrumOptions,
    "MultiKrum": MultiKrumOptions,
    "Bulyan": KrumOptions,
}
"""The options of each strategy; `server/aggregation/weights.py` has the strategy behind each name."""


class Server(Section):
    aggregation: Literal["none", "suffix", "suffix+head"] = "none"
    """none: isolated devices; suffix: the weighted average of the suffixes is shared, heads stay local;
    suffix+head: both are shared."""
    strategy: StrategyName = "FedAvg"
    """The Flower strategy (flwr.serverapp.strategy) that computes the new shared weights. FedAvg: mean weighted by
    examples; FedAvgM: with momentum on the server; FedAdam, FedAdagrad, FedYogi: the mean change is the gradient of
    such an optimizer; FedMedian, FedTrimmedAvg, Krum, MultiKrum, Bulyan: against outliers."""
    strategy_options: dict[str, Annotated[float, Field(ge=0, le=1e6)]] = Field(default_factory=dict)
    """Its keyword arguments, e.g. {server_momentum: 0.9} or {num_malicious_nodes: 1}; each strategy has its own."""
    guard: Guard = "clip"
    """Against replies that would spoil the shared model. Weights: an update much longer than the others of its round is
    scaled down (clip) or its reply refused (refuse); so are strange batch-norm statistics and too many examples. Class
    sums that do not fit the fleet's are refused under both. off: replies are only checked for their form."""
    compression: Literal["none", "fp16"] = "none"
    """How shared tensors are sent. none: fp32; fp16: half the bytes, with a relative error of at most 2^-11."""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the devices that train in a round; the least advanced devices come first, ties are drawn by seed."""
    rounds_per_task: int = Field(default=1, ge=1, le=1_000_000)
    """The epochs of a task are divided among this many rounds."""
    round_timeout: float = Field(default=86_400.0, gt=0, le=1e8)
    """Time limit of a round in seconds, queueing included."""
    connect_timeout: float = Field(default=600.0, gt=0, le=1e8)
    """Seconds to wait for all devices to connect; up to `round_timeout` while none has, because boards may be busy.
    A simulation waits for all of its devices, without this limit."""
    greeting_timeout: float = Field(default=120.0, gt=0, le=1e8)
    """Seconds that a board may take to introduce itself before it is asked again; starting PyTorch is included."""
    longest_back_off: float = Field(default=3600.0, ge=0, le=1e8)
    """Seconds that a board outside its own limits (heat, disk, battery) may let the server wait in a round, in all; it
    is asked again when it says, within `round_timeout`. After that it has failed in the round. A board that waits for
    images (`data.source: field`) has not: it leaves the round and is asked again in the next one, without end."""
    reconnect_timeout: float = Field(default=120.0, ge=0, le=1e8)
    """Seconds that a round waits for a board that is lost in it (killed, without power or network) and asks it again as
    soon as it is back. After that the round goes on without it. 0: at once."""
    max_failures: int = Field(default=3, ge=1, le=1_000_000)
    """Consecutive failures after which a device is dropped from the run."""
    max_failures_in_run: int = Field(default=20, ge=1, le=1_000_000)
    """Failures in all after which a device is dropped from the run; `--resume` counts anew."""

    @field_validator("guard", mode="before")
    @classmethod
    def _read_switch(cls, given: object) -> object:
        """YAML reads the plain word off as false."""
        return "off" if given is False else given

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.options()
        return self

    def options(self) -> Section:
        """`strategy_options` as the strategy's own type. Raises ValueError naming the option."""
        kind = STRATEGY_OPTIONS[self.strategy]
        integral = {name: int(value) for name, value in self.strategy_options.items() if value == int(value)}
        integers = {name for name, field in kind.model_fields.items() if field.annotation is int}
        given = {name: integral.get(name, v) if name in integers else v for name, v in self.strategy_options.items()}
        try:
            return kind.model_validate(given)
        except ValidationError as error:
            problem = error.errors()[0]
            name, allowed = str(problem["loc"][0]), list(kind.model_fields)
            if problem["type"] == "extra_forbidden":
                raise ValueError(
                    f"server.strategy_options.{name}: {self.strategy} has no such option{nearest(name, allowed)} "
                    f"(allowed: {', '.join(allowed) or 'none'})"
                ) from error
            said = problem["msg"][0].lower() + problem["msg"][1:]
            raise ValueError(f"server.strategy_options.{name} is {problem['input']:g}; {said}") from error

"""The typed rows of a run: one per device and round, one per round, and how the run ended.

Each type is written by `to_json` and read by `from_json`, which checks every field. `where` is the place that an error
names: a file or, for a .jsonl file, a line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import isnan
from statistics import fmean
from typing import Any, Self, TypeVar

from lightcl.errors import RequestError, shown
from lightcl.exchange.messages import Telemetry, Tested, Trained
from lightcl.metrics import NAN, AccuracyMatrix, Spread, fleet_summary

T = TypeVar("T")


@dataclass
class DeviceRow:
    """One device in one round; a field is None if the device did not get that far."""

    round: int
    device: int
    name: str
    """The name of the node that hosts the device."""
    task: int
    """The task the device has reached, from 0."""
    epochs: int
    """Epochs of this task that are done."""
    bytes_down: int = 0
    bytes_up: int = 0
    examples: int | None = None
    """Training images of the task."""
    loss: float | None = None
    tasks: list[int] | None = None
    """The tested tasks, ascending, if the device skips one; None if they are 0, 1, ... (see `tested`)."""
    til: list[float] | None = None
    """Accuracy per tested task, in 0..1, with the task known."""
    images: list[int] | None = None
    """Test images per tested task."""
    cil: list[float] | None = None
    """Accuracy per tested task, in 0..1, with the task not known."""
    error: str | None = None
    train_seconds: float | None = None
    peak_memory_mib: float | None = None
    evaluate_seconds: float | None = None
    images_per_second: float | None = None
    """This and what follows: from the sensors of a board (see Telemetry), None in a simulation."""
    temperature_c: float | None = None
    temperature_sensor: str | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    joules_per_image: float | None = None
    power_source: str | None = None
    throttled: float | None = None
    free_disk_mb: float | None = None
    battery_percent: float | None = None
    uptime_seconds: float | None = None
    limit_temperature_c: float | None = None
    limit_free_disk_mb: float | None = None
    limit_battery_percent: float | None = None
    backed_off_seconds: float | None = None
    """How long the server waited for the device to come back inside its limits, or to have images enough."""
    backed_off_reason: str | None = None
    """The last limit that it was outside, or the images that it had."""

    @property
    def tested(self) -> list[int]:
        """The scenario's numbers of the tested tasks, ascending: those that the device learns, up to `task`."""
        return list(range(len(self.til or ()))) if self.tasks is None else self.tasks

    def add_training_(self, report: Trained) -> None:
        self.task, self.epochs = report.task, report.epochs
        self.examples, self.loss = report.examples, report.loss
        self.train_seconds, self.peak_memory_mib = report.seconds, report.peak_memory_mib

    def add_telemetry_(self, telemetry: Telemetry) -> None:
        for name, value in asdict(telemetry).items():
            setattr(self, name, value)

    def add_back_off_(self, seconds: float, reason: str) -> None:
        self.backed_off_seconds = (self.backed_off_seconds or 0.0) + seconds
        self.backed_off_reason = reason

    def add_test_(self, report: Tested) -> None:
        self.til, self.images = report.til, report.images
        self.tasks = None if report.tasks == list(range(len(report.til))) else report.tasks
        self.cil = report.cil or None
        self.evaluate_seconds = report.seconds

    def to_json(self) -> dict[str, Any]:
        timing = {name: getattr(self, name) for name in (*DEVICE_TIMING, *DEVICE_TIMING_TEXTS)}
        row = {
            "round": self.round,
            "device": self.device,
            "name": self.name,
            "task": self.task,
            "epochs": self.epochs,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "timing": {name: value for name, value in timing.items() if value is not None},
        }
        names = ("examples", "loss", "tasks", "til", "images", "cil", "error")
        later = {name: getattr(self, name) for name in names}
        return row | {name: value for name, value in later.items() if value is not None}

    @classmethod
    def from_json(cls, values: object, where: str = "row") -> Self:
        """Raises RequestError naming `where` and the field."""
        row, timing = _row_and_timing(values, where)
        measured: dict[str, Any] = {name: timing.optional(name, _number) for name in DEVICE_TIMING}
        measured |= {name: timing.optional(name, _text) for name in DEVICE_TIMING_TEXTS}
        return cls(
            round=row.get("round", _integer),
            device=row.get("device", _integer),
            name=row.get("name", _text),
            task=row.get("task", _integer),
            epochs=row.get("epochs", _integer),
            bytes_down=row.get("bytes_down", _integer),
            bytes_up=row.get("bytes_up", _integer),
            examples=row.optional("examples", _integer),
            loss=row.optional("loss", _number),
            tasks=row.optional("tasks", _integers),
            til=row.optional("til", _numbers),
            images=row.optional("images", _integers),
            cil=row.optional("cil", _numbers),
            error=row.optional("error", _text),
            **measured,
        )


DEVICE_TIMING = (
    "train_seconds", "peak_memory_mib", "evaluate_seconds", "images_per_second", "temperature_c", "power_watts",
    "energy_joules", "joules_per_image", "throttled", "free_disk_mb", "battery_percent", "uptime_seconds",
    "limit_temperature_c", "limit_free_disk_mb", "limit_battery_percent", "backed_off_seconds",
)  # fmt: skip
DEVICE_TIMING_TEXTS = ("temperature_sensor", "power_source", "backed_off_reason")
"""The fields that depend on the machine; on disk they are under "timing"."""


@dataclass
class RoundRow:
    """One round. `til` and `cil` are the spread of the devices' average accuracies so far; None if none was tested.

    `train_seconds` are wall-clock seconds until all devices had trained, `seconds` those of the entire round.
    """

    round: int
    task: int
    """The most advanced device's task."""
    devices: int
    failed: int
    devices_finished: int
    """Devices at the end of their streams; those that learn no task do not count."""
    loss: float | None
    til: Spread | None
    cil: Spread | None
    bytes_down: int
    bytes_up: int
    train_seconds: float
    seconds: float

    @classmethod
    def of(cls, rows: Sequence[DeviceRow], finished: int, train_seconds: float, seconds: float) -> Self:
        """The round from its device rows; `finished` devices are at the end of their streams."""
        losses = [row.loss for row in rows if row.loss is not None]
        return cls(
            round=rows[0].round,
            task=max(row.task for row in rows),
            devices=len(rows),
            failed=sum(row.error is not None for row in rows),
            devices_finished=finished,
            loss=fmean(losses) if losses else None,
            til=_spread([row.til for row in rows if row.til]),
            cil=_spread([row.cil for row in rows if row.cil]),
            bytes_down=sum(row.bytes_down for row in rows),
            bytes_up=sum(row.bytes_up for row in rows),
            train_seconds=train_seconds,
            seconds=seconds,
        )

    def accuracy(self, setting: str) -> Spread | None:
        """`til` or `cil` by name."""
        return self.til if setting == "til" else self.cil

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values |= {name: _spread_to_json(self.accuracy(name)) for name in ("til", "cil")}
        timing = {"train_seconds": values.pop("train_seconds"), "seconds": values.pop("seconds")}
        return values | {"timing": timing}

    @classmethod
    def from_json(cls, values: object, where: str = "row") -> Self:
        """Raises RequestError naming `where` and the field."""
        row, timing = _row_and_timing(values, where)
        return cls(
            round=row.get("round", _integer),
            task=row.get("task", _integer),
            devices=row.get("devices", _integer),
            failed=row.get("failed", _integer),
            devices_finished=row.get("devices_finished", _integer),
            loss=row.optional("loss", _number),
            til=row.optional("til", _spread_of_json),
            cil=row.optional("cil", _spread_of_json),
            bytes_down=row.get("bytes_down", _integer),
            bytes_up=row.get("bytes_up", _integer),
            train_seconds=timing.get("train_seconds", _number),
            seconds=timing.get("seconds", _number),
        )


@dataclass(frozen=True)
class Figures:
    """The final figures of one setting, as their spread over the devices that finished and have the figure.

    A device that learned a single task has an average accuracy, but nothing to forget or to transfer. A spread is NaN
    where no device has the figure (on disk null).
    """

    average_accuracy: Spread
    forgetting: Spread
    backward_transfer: Spread
    devices: dict[str, int] = field(default_factory=dict)
    """How many devices have each figure, by its name; empty in runs of earlier versions."""

    @classmethod
    def of(cls, matrices: Sequence[AccuracyMatrix]) -> Self:
        """Over the devices' accuracy matrices; devices without a test are ignored."""
        values = [matrix.summary() for matrix in matrices]
        spreads = fleet_summary(matrices)
        return cls(**spreads, devices={name: sum(not isnan(v[name]) for v in values) for name in spreads})

    def to_json(self) -> dict[str, Any]:
        return {name: _spread_to_json(getattr(self, name)) for name in FIGURES} | {"devices": self.devices}


FIGURES = ("average_accuracy", "forgetting", "backward_transfer")


@dataclass(frozen=True)
class Results:
    """The final figures of a completed run. `dropped` is the reason for dropping, by device."""

    devices: int
    """Devices of the fleet, those that learn no task included."""
    devices_finished: int
    """Devices that learned all of their tasks; those without tasks do not count."""
    dropped: dict[int, str]
    rounds: int
    til: Figures
    cil: Figures | None
    """None if the devices are not tested with the task unknown."""
    bytes_down: int
    bytes_up: int
    seconds: float
    without_tasks: int = 0
    """Devices that learn no task because they have too few images for each."""

    @classmethod
    def of(
        cls,
        finished: Sequence[Mapping[str, Mapping[int, Sequence[float]]]],
        tasks: int,
        *,
        ids: Sequence[Sequence[int]] | None = None,
        devices: int,
        dropped: Mapping[int, str],
        rounds: Sequence[RoundRow],
        without_tasks: int = 0,
    ) -> Self:
        """Over the devices that finished their streams: `finished[i][setting][t]` is a row of an accuracy matrix.

        `tasks` is the number of tasks of the scenario; `ids[i]` are those that the same device learns (default: all).
        """
        figures: dict[str, Figures | None] = {}
        learned = ids if ids is not None else [range(tasks)] * len(finished)
        for setting in ("til", "cil"):
            matrices = [
                AccuracyMatrix.from_rows(rows[setting], tasks, columns)
                for rows, columns in zip(finished, learned, strict=True)
                if rows[setting]
            ]
            figures[setting] = Figures.of(matrices) if matrices or setting == "til" else None
        til = figures["til"]
        assert til is not None
        return cls(
            devices=devices,
            devices_finished=len(finished),
            dropped=dict(dropped),
            rounds=len(rounds),
            til=til,
            cil=figures["cil"],
            bytes_down=sum(row.bytes_down for row in rounds),
            bytes_up=sum(row.bytes_up for row in rounds),
            seconds=sum(row.seconds for row in rounds),
            without_tasks=without_tasks,
        )

    def figures(self, setting: str) -> Figures | None:
        """`til` or `cil` by name."""
        return self.til if setting == "til" else self.cil

    def to_json(self) -> dict[str, Any]:
        return {
            "status": "completed",
            "devices": self.devices,
            "devices_finished": self.devices_finished,
            "dropped": {str(number): reason for number, reason in self.dropped.items()},
            "without_tasks": self.without_tasks,
            "rounds": self.rounds,
            "til": self.til.to_json(),
            "cil": self.cil.to_json() if self.cil else None,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "timing": {"seconds": self.seconds},
        }

    @classmethod
    def from_json(cls, values: object, where: str = "results.json") -> Self:
        """Raises RequestError naming `where` and the field."""
        row, timing = _row_and_timing(values, where, kind="the results of a run")
        return cls(
            devices=row.get("devices", _integer),
            devices_finished=row.get("devices_finished", _integer),
            dropped=row.get("dropped", _reasons),
            rounds=row.get("rounds", _integer),
            til=row.get("til", _figures),
            cil=row.optional("cil", _figures),
            bytes_down=row.get("bytes_down", _integer),
            bytes_up=row.get("bytes_up", _integer),
            seconds=timing.get("seconds", _number),
            without_tasks=row.optional("without_tasks", _integer) or 0,
        )


@dataclass(frozen=True)
class Failure:
    """Why a run stopped before its end; `dropped` as in Results."""

    reason: str
    dropped: dict[int, str]

    def to_json(self) -> dict[str, Any]:
        dropped = {str(number): reason for number, reason in self.dropped.items()}
        return {"status": "failed", "reason": self.reason, "dropped": dropped}

    @classmethod
    def from_json(cls, values: object, where: str = "failure.json") -> Self:
        """Raises RequestError naming `where` and the field."""
        row = _Checked(values, where, "the failure of a run")
        return cls(row.get("reason", _text), row.get("dropped", _reasons))


# -- checks --------------------------------------------------------------------------------------------------------


class _Wrong(Exception):
    """A value of the wrong type; the text says what is expected."""


class _Checked:
    """A JSON object whose fields are read with their types checked."""

    def __init__(self, values: object, where: str, kind: str, prefix: str = "") -> None:
        self._where, self._kind, self._prefix = where, kind, prefix
        if not isinstance(values, dict):
            field = f": {prefix.rstrip('.')} is {shown(values)}, expected an object" if prefix else ""
            raise RequestError(f"{where}: not {kind}{field}")
        self._values = values

    def get(self, name: str, check: Callable[[object], T]) -> T:
        if name not in self._values:
            raise RequestError(f"{self._where}: not {self._kind}: {self._prefix}{name} is missing")
        try:
            return check(self._values[name])
        except _Wrong as error:
            given = shown(self._values[name])
            raise RequestError(
                f"{self._where}: not {self._kind}: {self._prefix}{name} is {given}, expected {error}"
            ) from error

    def optional(self, name: str, check: Callable[[object], T]) -> T | None:
        return None if self._values.get(name) is None else self.get(name, check)


def _row_and_timing(values: object, where: str, kind: str = "a row of a run") -> tuple[_Checked, _Checked]:
    row = _Checked(values, where, kind)
    return row, _Checked(row.get("timing", lambda value: value), where, kind, "timing.")


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _Wrong("an integer")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _Wrong("a number")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _Wrong("a text")
    return value


def _integers(value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise _Wrong("a list of integers")
    return value


def _numbers(value: object) -> list[float]:
    if not isinstance(value, list) or not all(type(item) in (int, float) for item in value):
        raise _Wrong("a list of numbers")
    return value


def _reasons(value: object) -> dict[int, str]:
    if not isinstance(value, dict) or not all(str(key).isdecimal() for key in value):
        raise _Wrong("an object of reasons by device number")
    return {int(key): _text(reason) for key, reason in value.items()}


def _spread_of_json(value: object) -> Spread:
    """A spread; null stands for NaN values (a figure that no device has)."""
    names = [part.name for part in fields(Spread)]
    if value is None:
        return Spread(**dict.fromkeys(names, NAN))
    if not isinstance(value, dict) or value.keys() != set(names):
        raise _Wrong(f"an object of {', '.join(names)}")
    return Spread(**{name: _number(value[name]) for name in names})


def _spread_to_json(spread: Spread | None) -> dict[str, float] | None:
    """None for a spread of NaN, which JSON does not have."""
    return None if spread is None or isnan(spread.mean) else asdict(spread)


def _figures(value: object) -> Figures:
    if not isinstance(value, dict) or not value.keys() >= set(FIGURES):
        raise _Wrong(f"an object of {', '.join(FIGURES)}")
    return Figures(
        **{name: _spread_of_json(value[name]) for name in FIGURES}, devices=_counts(value.get("devices", {}))
    )


def _counts(value: object) -> dict[str, int]:
    if not isinstance(value, dict) or not value.keys() <= set(FIGURES):
        raise _Wrong("devices as an object of device counts by figure")
    return {name: _integer(count) for name, count in value.items()}


def _spread(accuracies: Sequence[Sequence[float]]) -> Spread | None:
    """The spread of the devices' average accuracies; None if none was tested."""
    return Spread.of([fmean(row) for row in accuracies]) if accuracies else None

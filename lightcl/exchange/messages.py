"""The messages between server and devices as typed values; only the edges turn them into Flower's records.

Both rooms import this one and never each other.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from lightcl.errors import one_line

INSTRUCTION, REPLY, TESTED, ARRAYS, METRICS = "instruction", "reply", "tested", "arrays", "metrics"
TELEMETRY, NOTICE = "telemetry", "notice"
"""Names of the records in a message."""

EXAMPLES = "num-examples"
"""The weight of a device in an average; the key Flower's strategies expect."""


class ProtocolError(Exception):
    """A message with a missing or wrong field."""


class _Record:
    """Conversion to and from Flower's flat ConfigRecords, with the types checked on the way in.

    A field that may be None is left out where it is.
    """

    def to_record(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}  # type: ignore[call-overload]

    @classmethod
    def from_record(cls, record: Any) -> Self:
        """Raises ProtocolError naming the field."""
        types = {
            "bool": bool, "str": str, "int": int, "float": (int, float), "list[float]": list, "list[int]": list,
        }  # fmt: skip
        values: dict[str, Any] = {}
        for field in fields(cls):  # type: ignore[arg-type]
            value = record.get(field.name) if hasattr(record, "get") else None
            name = str(field.type).removesuffix(" | None")
            if value is None and name != field.type:
                values[field.name] = None
                continue
            kind = types[name]
            fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)  # type: ignore[arg-type]
            if fits and isinstance(value, list):
                items = types[name[5:-1]]
                fits = all(isinstance(item, items) and not isinstance(item, bool) for item in value)  # type: ignore[arg-type]
            if not fits:
                given = one_line(repr(value), 80)
                raise ProtocolError(f"{cls.__name__}.{field.name} is {given}, expected {field.type}")
            values[field.name] = value
        return cls(**values)


@dataclass(frozen=True)
class Instruction(_Record):
    """From the server: train `task` until `until_epoch`, or test; with the shared tensors of `version`, if newer.

    Tasks have the scenario's numbers. With `evaluate`, a message to train also asks for the test that follows: the
    reply then carries `Trained` and `Tested`.
    """

    device: int
    run: str
    scenario: str
    round: int
    task: int
    until_epoch: int
    version: int
    evaluate: bool = False


@dataclass(frozen=True)
class Greeting(_Record):
    """From a node, before anything else: who it is and what its images look like.

    Node `partition` of `partitions` hosts the devices d with d % partitions == partition: one each where there are as
    many nodes as devices (`partitions` 0 stands for that), several where a simulation has fewer nodes.
    """

    partition: int
    partitions: int
    name: str
    channels: int
    classes: int
    labels: str
    """Digest of the class names in their order: averaging heads makes sense only where class 3 is class 3."""
    own_data: bool
    """All of its images are its one device's: no partition says which."""
    tasks: list[int]
    """With `own_data`: the tasks, by the scenario's numbers, for which its device has enough images; else empty."""


@dataclass(frozen=True)
class Trained(_Record):
    """From a device, after training: the device returns it, the wire carries it, the row takes it."""

    device: int
    task: int
    epochs: int
    version: int
    prefix: str
    channel_sets: str
    """Digest of the channels its network has kept: tensors are averaged only where they mean the same."""
    examples: int
    loss: float
    seconds: float
    peak_memory_mib: float
    """The highest resident memory of the process since this device was opened (a simulated one is, for each message);
    PyTorch, the images that the devices of the process share, and everything else in the process are included."""


@dataclass(frozen=True)
class Tested(_Record):
    """From a device, after a test of the tasks that it learns up to `task`.

    `tasks` are their numbers, ascending; `til`, `cil` (accuracies in 0..1) and `images` (test images) have a value per
    tested task. `cil` is empty where the scenario does not test it.
    """

    device: int
    task: int
    epochs: int
    version: int
    tasks: list[int]
    til: list[float]
    cil: list[float]
    images: list[int]
    seconds: float


@dataclass(frozen=True)
class Refusal(_Record):
    """A device could not answer a request; includes its position in its stream (-1: not known)."""

    task: int
    epochs: int
    version: int
    reason: str


@dataclass(frozen=True)
class BackOff(_Record):
    """A board is outside limits of its own (heat, disk, battery) and has saved its work; or it waits for images.

    It wants to be asked for the same again after `retry_after` seconds. `task`, `epochs` and `version` are its position
    in its stream.
    """

    task: int
    epochs: int
    version: int
    reason: str
    retry_after: float
    for_images: bool | None = None
    """True: its next task has too few images so far, which is no failure of the device."""


@dataclass(frozen=True)
class Notice(_Record):
    """From a device, beside `Trained` or `Tested`: what its user should know although the work is done."""

    text: str


@dataclass(frozen=True)
class Telemetry(_Record):
    """From a board, beside `Trained`: what its sensors said during the training. None: it has no such sensor."""

    images_per_second: float | None = None
    """Training images, each counted in each epoch."""
    temperature_c: float | None = None
    """The highest of the training, in degrees Celsius."""
    temperature_sensor: str | None = None
    power_watts: float | None = None
    """The mean of the training."""
    energy_joules: float | None = None
    joules_per_image: float | None = None
    power_source: str | None = None
    """What the energy was measured by: it may be that of the entire board, or of its processor."""
    throttled: float | None = None
    """The share of the training, 0 to 1, in which heat slowed the processors down."""
    free_disk_mb: float | None = None
    """Of the disk with the device's state, after the training, in 10^6 bytes."""
    battery_percent: float | None = None
    uptime_seconds: float | None = None
    limit_temperature_c: float | None = None
    """The board's own limits."""
    limit_free_disk_mb: float | None = None
    limit_battery_percent: float | None = None

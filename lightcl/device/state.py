"""What a device saves and restores: its position, the network's changing tensors and the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal, Self

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from lightcl.data.tasks import TaskStream
from lightcl.device.metering import Spent
from lightcl.exchange.messages import Telemetry, Trained
from lightcl.networks.staged import Backbone
from lightcl.storage.state import Damaged


@dataclass(frozen=True)
class Position:
    """Progress of a device: its current task, by the scenario's number, and the finished epochs of that task."""

    task: int
    epochs: int


@dataclass(frozen=True)
class DeviceValues:
    """The plain values of a device's state; `prefix` and `channels` are digests.

    `telemetry` belongs to the report; `unfinished` is the cost so far of a training that it has backed off from.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # a key that is not known may be one that matters

    device: int
    scenario: str
    prefix: str
    channels: str
    accelerator: str
    position: Position
    version: int
    report: Trained | None
    rows: dict[Literal["til", "cil"], dict[int, list[float]]]
    optimizer: dict[str, Any]
    telemetry: Telemetry | None = None
    unfinished: Spent | None = None

    def to_json(self) -> dict[str, Any]:
        """Without the last two keys where there is nothing to say: only boards have them."""
        values = asdict(self)
        for name in ("telemetry", "unfinished"):
            if values[name] is None:
                del values[name]
        return values

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Raises Damaged where a key is missing, is not known, or has a value of another type."""
        try:
            found: Self = _adapter().validate_python(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the manifest"
            raise Damaged(f"{where}: {first['msg']}") from error
        return found

    def check(self, stream: TaskStream, epochs: int) -> None:
        """Raises Damaged for a position, a report or rows that no device with this stream can have."""
        ids = stream.ids or (0,)
        reached = [("position", self.position.task, self.position.epochs)]
        if self.report is not None:
            reached.append(("report", self.report.task, self.report.epochs))
        for name, task, done in reached:
            if task not in ids or not 0 <= done <= epochs:
                raise Damaged(
                    f"{name} is task {task}, epoch {done}, but the device learns the tasks "
                    f"{', '.join(map(str, ids))}, of {epochs} epochs each"
                )
        if self.version < 0:
            raise Damaged(f"version is {self.version}")
        if self.rows.keys() != {"til", "cil"}:
            raise Damaged("rows do not have the keys til and cil")
        for setting, rows in self.rows.items():
            for task, row in rows.items():
                if task not in stream.ids or len(row) != stream.position_of(task) + 1:
                    raise Damaged(f"rows.{setting}: {len(row)} accuracies after task {task}")


@cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(DeviceValues)  # takes milliseconds; a worker opens many devices


def changing_tensors(network: Backbone) -> dict[str, Tensor]:
    """All tensors of the network that training can change, by name; the frozen prefix is not among them."""
    tensors = network.suffix.state_dict()
    tensors |= {f"{network.head_name}.{name}": tensor for name, tensor in network.head.state_dict().items()}
    if network.frozen_batch_norm == "train":
        buffers = {name for name, _ in network.named_buffers()}
        tensors |= {name: tensor for name, tensor in network.prefix.state_dict().items() if name in buffers}
    return tensors


def pack_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`optimizer.state_dict()` as tensors by `parameter/key`, and everything else as JSON values.

    `names` are the names of the optimizer's parameters, in its order.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, entry in entries.items():
            if isinstance(entry, Tensor):
                tensors[f"{names[index]}/{key}"] = entry
            else:
                values.setdefault(names[index], {})[key] = entry
    return tensors, {"state": values, "groups": state["param_groups"]}


def unpack_optimizer_(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """The inverse of `pack_optimizer`, into a new optimizer over the same parameters."""
    indices = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(indices[parameter], {})[key] = tensor
    for parameter, entries in values["state"].items():
        state.setdefault(indices[parameter], {}).update(entries)
    groups = []
    for stored, fresh in zip(values["groups"], optimizer.state_dict()["param_groups"], strict=True):
        # JSON has no tuples: Adam's betas come back as a list.
        groups.append({key: tuple(v) if isinstance(fresh.get(key), tuple) else v for key, v in stored.items()})
    optimizer.load_state_dict({"state": state, "param_groups": groups})

"""What a reply of a device must say to be accepted. Anything wrong with it is a failure of that device alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import Message

from lightcl.errors import one_line, shown
from lightcl.exchange.messages import (
    NOTICE,
    TELEMETRY,
    TESTED,
    BackOff,
    Notice,
    ProtocolError,
    Telemetry,
    Tested,
    Trained,
)
from lightcl.exchange.tensors import LARGEST, STATISTICS, Arrays, ExchangeError, check, size_in_bytes, split
from lightcl.scenario import Scenario
from server.aggregation import Aggregator
from server.aggregation.statistics import COUNT
from server.ledger import Entry
from server.mailbox import arrays_of, record_of

LONGEST_SENSOR = 80
LONGEST_NOTICE = 300
BOUNDS = {
    "images_per_second": (0.0, 1e9),
    "temperature_c": (-100.0, 200.0),
    "power_watts": (0.0, 1e6),
    "energy_joules": (0.0, 1e13),
    "joules_per_image": (0.0, 1e9),
    "throttled": (0.0, 1.0),
    "free_disk_mb": (0.0, 1e12),
    "battery_percent": (0.0, 100.0),
    "uptime_seconds": (0.0, 1e10),
    "limit_temperature_c": (0.0, 1e6),
    "limit_free_disk_mb": (0.0, 1e12),
    "limit_battery_percent": (0.0, 1e6),
}
"""Least and most of the numbers of a board's telemetry."""


@dataclass(frozen=True)
class AcceptedTraining:
    """A checked report with its tensors, restored from what was sent; `bytes_up` counts the latter."""

    report: Trained
    arrays: Arrays
    bytes_up: int

    @property
    def without_sums(self) -> Arrays:
        return split(self.arrays, STATISTICS)[1]


@dataclass(frozen=True)
class ReplyCheck:
    """`prefix` and `channel_sets` are digests of the fleet's network; `aggregator` is None where nothing is shared."""

    scenario: Scenario
    prefix: str
    channel_sets: str
    aggregator: Aggregator | None

    def training(
        self, reply: Message, entry: Entry, goal: tuple[int, int], classes: np.ndarray | None = None
    ) -> AcceptedTraining:
        """`classes` are the device's training images per class, where the server knows them.

        Raises ProtocolError and ExchangeError.
        """
        report = Trained.from_record(record_of(reply))
        _expect(report, entry.number, *goal)
        if report.prefix != self.prefix:
            raise ProtocolError(f"its frozen prefix {report.prefix} is not the fleet's {self.prefix}")
        if self.aggregator and report.channel_sets != self.channel_sets:
            raise ProtocolError(
                f"device {entry.number} has kept other channels ({report.channel_sets}) than the fleet "
                f"({self.channel_sets}), so its tensors are not averaged: it pruned other weights than the server"
            )
        if report.examples <= 0 or not abs(report.loss) <= LARGEST:
            raise ProtocolError(f"{report.examples} examples with a loss of {report.loss}")
        _expect_measured(seconds=report.seconds, peak_memory_mib=report.peak_memory_mib)
        sent = arrays_of(reply)
        arrays = self.aggregator.codec.restore(sent) if self.aggregator else sent
        check(arrays, self.aggregator.shapes(self.finishes_task(report)) if self.aggregator else {})
        if COUNT in arrays:
            _expect_samples(arrays[COUNT], report.examples, classes)
        return AcceptedTraining(report, arrays, size_in_bytes(sent))

    def finishes_task(self, report: Trained) -> bool:
        return report.epochs == self.scenario.training.epochs

    def test(self, reply: Message, entry: Entry) -> Tested:
        """The report of a test. Raises ProtocolError."""
        return self._tested(record_of(reply), entry)

    def attached_test(self, reply: Message, entry: Entry) -> Tested:
        """The report of the test that a reply carries beside its training. Raises ProtocolError."""
        return self._tested(record_of(reply, TESTED), entry)

    def _tested(self, record: Any, entry: Entry) -> Tested:
        report = Tested.from_record(record)
        _expect(report, entry.number, entry.task, entry.epochs)
        expected = list(entry.tasks[: entry.position + 1])
        if self.scenario.data.keep == "none":  # test images of earlier tasks are gone
            expected = [task for task in expected if task in report.tasks or task == entry.task]
        if report.tasks != expected:
            raise ProtocolError(f"a test of tasks {shown(report.tasks)}, expected {shown(expected)}")
        tested = len(expected)
        cil = tested if "cil" in self.scenario.settings else 0
        if (len(report.til), len(report.cil), len(report.images)) != (tested, cil, tested):
            raise ProtocolError(
                f"a test of {len(report.til)} tasks (TIL) and {len(report.cil)} (CIL), expected {tested} and {cil}"
            )
        if not all(0 <= accuracy <= 1 for accuracy in [*report.til, *report.cil]):
            raise ProtocolError("an accuracy outside 0..1")
        if min(report.images) < 0:
            raise ProtocolError(f"a test of {min(report.images)} images")
        _expect_measured(seconds=report.seconds)
        return report


def telemetry_of(reply: Message) -> Telemetry | None:
    """What a board's sensors said, if the reply carries it. Raises ProtocolError."""
    record = record_of(reply, TELEMETRY)
    if not record:
        return None
    found = Telemetry.from_record(record)
    for name, (least, most) in BOUNDS.items():
        value = getattr(found, name)
        if value is not None and not least <= value <= most:
            raise ProtocolError(f"{name} is {value}, expected a number from {least:g} to {most:g}")
    sensor, source = found.temperature_sensor, found.power_source
    return replace(
        found,
        temperature_sensor=sensor and one_line(sensor, LONGEST_SENSOR),
        power_source=source and one_line(source, LONGEST_SENSOR),
    )


def notice_of(reply: Message) -> str | None:
    """What a device wants its user to know, if the reply carries it. Raises ProtocolError."""
    record = record_of(reply, NOTICE)
    return one_line(Notice.from_record(record).text, LONGEST_NOTICE) if record else None


def back_off_of(reply: Message) -> BackOff | None:
    """The wish to be asked later, if that is what a reply says. Raises ProtocolError."""
    record = record_of(reply)
    if "retry_after" not in record:
        return None
    found = BackOff.from_record(record)
    if not 0 <= found.retry_after <= LARGEST:
        raise ProtocolError(f"it backs off for {found.retry_after} seconds, expected a finite number from 0")
    return replace(found, reason=one_line(found.reason))


def _expect(report: Trained | Tested, device: int, task: int, epochs: int) -> None:
    given, expected = (report.device, report.task, report.epochs), (device, task, epochs)
    if given != expected:
        raise ProtocolError(f"reply is for (device, task, epoch) {given}, expected {expected}")


def _expect_samples(count: np.ndarray, examples: int, classes: np.ndarray | None) -> None:
    """Class sums are over the images that the device has trained on, each of them once. Raises ExchangeError."""
    if count.sum() != examples:
        raise ExchangeError(f"its class sums are over {count.sum():g} samples, but it has trained on {examples} images")
    if classes is not None and len(classes) == len(count) and (count > classes).any():
        label = int(np.argmax(count - classes))
        raise ExchangeError(
            f"its class sums are over {count[label]:g} samples of class {label}, but it has {classes[label]} of them"
        )


def _expect_measured(**values: float) -> None:
    """A row takes these numbers, and JSON has no NaN and no infinity."""
    for name, value in values.items():
        if not 0 <= value <= LARGEST:
            raise ProtocolError(f"{name} is {value}, expected a finite number from 0")

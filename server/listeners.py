"""Watchers of a run: a base class without effect, a list that passes everything on, Flower's log, and an event log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightcl.records.rows import RoundRow
from lightcl.storage.files import saving

logger = logging.getLogger("flwr")


class Listener:
    """Is told what happens in a run. Every method does nothing here; a subclass overrides what it shows or keeps."""

    def connected(self, devices: int, wanted: int) -> None: ...
    def round_started(self, number: int, rounds_left: int, devices: int) -> None: ...
    def phase_started(self, phase: str, devices: int) -> None:
        """`phase` is "train" or "evaluate"."""

    def device_done(self, device: int, phase: str) -> None: ...
    def refused(self, device: int, reason: str) -> None:
        """The device failed in this round, or is not connected."""

    def backed_off(self, device: int, reason: str, seconds: float) -> None:
        """The device is outside limits of its own and is asked again after this time."""

    def warned(self, text: str) -> None:
        """Something is wrong with a node, or with what a device has sent in a round."""

    def round_finished(self, row: RoundRow) -> None: ...


class Listeners(Listener):
    """Passes everything on to several listeners, in their order."""

    def __init__(self, listeners: Iterable[Listener]) -> None:
        self._listeners = tuple(listeners)

    def connected(self, devices: int, wanted: int) -> None:
        for listener in self._listeners:
            listener.connected(devices, wanted)

    def round_started(self, number: int, rounds_left: int, devices: int) -> None:
        for listener in self._listeners:
            listener.round_started(number, rounds_left, devices)

    def phase_started(self, phase: str, devices: int) -> None:
        for listener in self._listeners:
            listener.phase_started(phase, devices)

    def device_done(self, device: int, phase: str) -> None:
        for listener in self._listeners:
            listener.device_done(device, phase)

    def refused(self, device: int, reason: str) -> None:
        for listener in self._listeners:
            listener.refused(device, reason)

    def backed_off(self, device: int, reason: str, seconds: float) -> None:
        for listener in self._listeners:
            listener.backed_off(device, reason, seconds)

    def warned(self, text: str) -> None:
        for listener in self._listeners:
            listener.warned(text)

    def round_finished(self, row: RoundRow) -> None:
        for listener in self._listeners:
            listener.round_finished(row)


class LogListener(Listener):
    """Progress as lines of Flower's log, for `flwr run`."""

    def connected(self, devices: int, wanted: int) -> None:
        logger.info("%d of %d devices connected", devices, wanted)

    def round_started(self, number: int, rounds_left: int, devices: int) -> None:
        logger.info("round %d: %d devices, about %d rounds left", number, devices, rounds_left)

    def refused(self, device: int, reason: str) -> None:
        logger.warning("device %d: %s", device, reason)

    def backed_off(self, device: int, reason: str, seconds: float) -> None:
        logger.info("device %d backs off for %.0f s: %s", device, seconds, reason)

    def round_finished(self, row: RoundRow) -> None:
        tested = [(setting, spread) for setting in ("til", "cil") if (spread := row.accuracy(setting))]
        if tested:
            accuracy = ", ".join(f"{setting.upper()} {100 * spread.mean:.1f} %" for setting, spread in tested)
            logger.info("round %d: %s", row.round, accuracy)


class WarningLog(Listener):
    """Warnings about nodes, in Flower's log; part of every run."""

    def warned(self, text: str) -> None:
        logger.warning("%s", text)


class EventLog(Listener):
    """Every event as one JSON line with its time (UTC) and name; a resumed run appends to the file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def connected(self, devices: int, wanted: int) -> None:
        self._write("connected", devices=devices, wanted=wanted)

    def round_started(self, number: int, rounds_left: int, devices: int) -> None:
        self._write("round_started", round=number, rounds_left=rounds_left, devices=devices)

    def phase_started(self, phase: str, devices: int) -> None:
        self._write("phase_started", phase=phase, devices=devices)

    def device_done(self, device: int, phase: str) -> None:
        self._write("device_done", device=device, phase=phase)

    def refused(self, device: int, reason: str) -> None:
        self._write("refused", device=device, reason=reason)

    def backed_off(self, device: int, reason: str, seconds: float) -> None:
        self._write("backed_off", device=device, reason=reason, seconds=seconds)

    def warned(self, text: str) -> None:
        self._write("warned", text=text)

    def round_finished(self, row: RoundRow) -> None:
        self._write("round_finished", **row.to_json())

    def _write(self, event: str, **values: Any) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **values}
        with saving(self._file), self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

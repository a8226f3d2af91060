"""Measuring a training on a board: energy, power, the highest temperature, throttling; and the board's own limits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from lightcl.device.telemetry import Battery, Gauge, PowerGauge, Sensors, Temperature, free_disk_mb
from lightcl.exchange.messages import Telemetry

COVERED = 0.9
"""A sensor that was silent for more than a tenth of the time says nothing about the energy of all of it."""
COOLER, FULLER = 3.0, 3.0
"""A board that has backed off begins again only this many degrees, or percent of its battery, inside its limit."""
HEAT_SECONDS, DISK_SECONDS, BATTERY_SECONDS = 60.0, 300.0, 600.0
"""How long a board backs off: it cools in a minute; a disk is cleaned and a battery charged more slowly."""


class LimitReached(Exception):
    """The board is outside its limits; its work is saved. It wants to be asked again after `seconds`."""

    def __init__(self, reason: str, seconds: float) -> None:
        super().__init__(reason)
        self.reason, self.seconds = reason, seconds


@dataclass(frozen=True)
class Condition:
    """How a board is at one moment; None: not known."""

    hottest: Temperature | None = None
    free_disk_mb: float | None = None
    battery: Battery | None = None
    throttled: bool | None = None


@dataclass(frozen=True)
class Limits:
    """Beyond these a board does not train; None: no limit. Temperature in degrees Celsius, disk in 10^6 bytes."""

    temperature_c: float | None = None
    free_disk_mb: float | None = None
    battery_percent: float | None = None

    def crossed(self, condition: Condition, *, again: bool = False) -> LimitReached | None:
        """The limit that is crossed, if any. `again`: the board has backed off before and has to be well inside.

        A battery that is not draining has no lower limit: the board is on mains.
        """
        hottest, disk, battery = condition.hottest, condition.free_disk_mb, condition.battery
        if hottest and self.temperature_c is not None:
            most = self.temperature_c - COOLER * again
            if hottest.celsius > most:
                return LimitReached(f"{hottest.sensor} has {hottest.celsius:.1f} °C, at most {most:g}", HEAT_SECONDS)
        if disk is not None and self.free_disk_mb is not None and disk < self.free_disk_mb:
            return LimitReached(f"{disk:.0f} MB of disk are free, at least {self.free_disk_mb:g}", DISK_SECONDS)
        if battery and battery.draining and self.battery_percent is not None:
            least = self.battery_percent + FULLER * again
            if battery.percent < least:
                return LimitReached(f"the battery is at {battery.percent:g} %, at least {least:g}", BATTERY_SECONDS)
        return None


@dataclass
class _Energy:
    """The energy by one gauge, and the seconds over which it is known."""

    gauge: Gauge
    joules: float = 0.0
    seconds: float = 0.0
    _last: tuple[float, float] | None = None  # time and value

    def add_(self, at: float) -> None:
        value = self.gauge.read()
        if value is None:
            return
        if self._last is not None:
            before, last = self._last
            self.seconds += at - before
            self.joules += self._between(last, value, at - before)
        self._last = at, value

    def _between(self, last: float, value: float, seconds: float) -> float:
        if isinstance(self.gauge, PowerGauge):
            return seconds * (last + value) / 2
        if value < last:  # it began at zero again; without a span nobody knows at what count
            return value - last + self.gauge.span if self.gauge.span else value
        return value - last


class Tally:
    """Sums up samples; `at` are seconds of a clock that never goes back."""

    def __init__(self, power: tuple[Gauge, ...]) -> None:
        self._energies = [_Energy(gauge) for gauge in power]
        self._first: float | None = None
        self._last = 0.0
        self._throttled: list[bool] = []
        self.hottest: Temperature | None = None

    def add_(self, at: float, condition: Condition) -> None:
        self._first, self._last = at if self._first is None else self._first, at
        for energy in self._energies:
            energy.add_(at)
        found = condition.hottest
        if found and (self.hottest is None or found.celsius > self.hottest.celsius):
            self.hottest = found
        if condition.throttled is not None:
            self._throttled.append(condition.throttled)

    @property
    def seconds(self) -> float:
        return self._last - (self._last if self._first is None else self._first)

    @property
    def joules(self) -> float | None:
        """The energy of all gauges together; None where one of them was silent for too long."""
        known = self._energies and all(0 < e.seconds >= COVERED * self.seconds for e in self._energies)
        return sum(energy.joules for energy in self._energies) if known else None

    @property
    def watts(self) -> float | None:
        """The mean power."""
        if self.joules is None:
            return None
        return sum(energy.joules / energy.seconds for energy in self._energies)

    @property
    def throttled(self) -> float | None:
        """The share of the samples in which the processors were slowed down, 0 to 1."""
        return sum(self._throttled) / len(self._throttled) if self._throttled else None


@dataclass(frozen=True)
class Spent:
    """What a training has cost, over all the times that the device has backed off from it and gone on.

    `images` are counted in each epoch; `joules` is None where they are not known for all of it.
    """

    images: int = 0
    seconds: float = 0.0
    joules: float | None = 0.0
    hottest: Temperature | None = None

    def plus(self, images: int, seconds: float, tally: Tally | None) -> Spent:
        joules = tally.joules if tally else None
        known = [found for found in (self.hottest, tally and tally.hottest) if found]
        return Spent(
            self.images + images,
            self.seconds + seconds,
            None if joules is None or self.joules is None else self.joules + joules,
            max(known, key=lambda found: found.celsius, default=None),
        )


@dataclass
class Board:
    """The machine under a device: its sensors, its limits, and the folder whose disk fills."""

    folder: Path
    sensors: Sensors = field(default_factory=Sensors)
    limits: Limits = Limits()
    interval: float = 1.0
    """Seconds between two samples."""
    clock: Callable[[], float] = time.monotonic

    def condition(self) -> Condition:
        sensors = self.sensors
        return Condition(sensors.hottest(), free_disk_mb(self.folder), sensors.battery(), sensors.throttled())

    def telemetry(self, meter: Meter, spent: Spent) -> Telemetry:
        """What the server is told of a finished training; `meter` has measured the last part of it."""
        tally, now, limits = meter.tally, meter.now, self.limits
        return Telemetry(
            images_per_second=spent.images / spent.seconds if spent.seconds > 0 else None,
            temperature_c=spent.hottest.celsius if spent.hottest else None,
            temperature_sensor=spent.hottest.sensor if spent.hottest else None,
            power_watts=tally.watts,
            energy_joules=spent.joules,
            joules_per_image=spent.joules / spent.images if spent.joules is not None and spent.images else None,
            power_source=None if spent.joules is None else self.sensors.power_source,
            throttled=tally.throttled,
            free_disk_mb=now.free_disk_mb,
            battery_percent=now.battery.percent if now.battery else None,
            uptime_seconds=self.sensors.uptime(),
            limit_temperature_c=limits.temperature_c,
            limit_free_disk_mb=limits.free_disk_mb,
            limit_battery_percent=limits.battery_percent,
        )


class Meter:
    """Measures what happens inside its `with`: takes a sample at the start and at the end, and others in a thread.

    An energy counter is exact, whatever the samples: they only see it begin at zero again.
    """

    def __init__(self, board: Board) -> None:
        self.board = board
        self.tally = Tally(board.sensors.power)
        self.now = Condition()
        """The latest sample."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)

    def __enter__(self) -> Self:
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()

    def sample(self) -> None:
        self.now = self.board.condition()
        self.tally.add_(self.board.clock(), self.now)

    def check(self, *, again: bool = False) -> None:
        """Raises LimitReached where the latest sample is outside the limits; reads no sensor, so each step may ask."""
        if reached := self.board.limits.crossed(self.now, again=again):
            raise reached

    def _run(self) -> None:
        while not self._stop.wait(self.board.interval):
            self.sample()

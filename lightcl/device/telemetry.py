"""What a board's sensors say, read from sysfs and procfs: temperatures, power, throttling, disk, battery, uptime.

Every reading is None where there is no sensor, or where it vanished or gives garbage; none of them raises. Files are
looked for once, under a root folder that tests replace.

Power comes from the first of these that the board has: a rail that measures the entire board (`VDD_IN` on Jetson Orin
NX and Nano, `POM_5V_IN` on Jetson Nano), an INA238 (Jetson Thor), the sum of all INA3221 rails (Jetson AGX), the RAPL
energy counters (x86: the processor only). A desktop GPU is added by NVML, which refuses on Jetson Orin.
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOTAL_RAILS = ("VDD_IN", "POM_5V_IN")
"""Labels of INA3221 channels that measure everything that the board takes in."""
INA3221_CHANNELS = (1, 2, 3)
COLDEST, HOTTEST = -55.0, 150.0
"""Degrees Celsius that silicon can have; a zone without a sensor often reads -256 or 0x7fff."""
MOST_WATTS = 5000.0
_CONSTANT = re.compile("pmic", re.IGNORECASE)
"""Thermal zones that report a constant: `PMIC-Die` on Jetson is always 50 or 100 degrees."""
_PROCESSOR = re.compile("cpufreq|devfreq|throttle|processor|powerclamp|gpu", re.IGNORECASE)
_FAN = re.compile("fan", re.IGNORECASE)


@dataclass(frozen=True)
class Temperature:
    sensor: str
    celsius: float


@dataclass(frozen=True)
class Battery:
    percent: float
    status: str
    """As Linux says: Charging, Discharging, Not charging, Full, Unknown."""

    @property
    def draining(self) -> bool:
        return self.status not in ("Charging", "Not charging", "Full")


@dataclass(frozen=True)
class PowerGauge:
    """A sensor of the power that flows now: `read` gives watts."""

    name: str
    read: Callable[[], float | None]


@dataclass(frozen=True)
class EnergyCounter:
    """A counter of the energy used so far: `read` gives joules; after `span` joules it begins at zero again."""

    name: str
    read: Callable[[], float | None]
    span: float | None = None


Gauge = PowerGauge | EnergyCounter


class Sensors:
    """The sensors of this machine; `root` is where `sys` and `proc` are. `gpu` adds a desktop GPU (`nvml_gpu`)."""

    def __init__(self, root: Path = Path("/"), gpu: Gpu | None = None) -> None:
        self._root, self._gpu = root, gpu
        hwmon = _folders(root / "sys/class/hwmon", "hwmon*")
        self._temperatures = [*_zones(root), *_hwmon_temperatures(hwmon)]
        self._cooling = _cooling_devices(root)
        self._policies = _folders(root / "sys/devices/system/cpu/cpufreq", "policy*")
        self._batteries = _batteries(root)
        self.power: tuple[Gauge, ...] = (*_board_power(root, hwmon), *((gpu.energy,) if gpu else ()))
        """What the energy of the machine is the sum of."""

    @property
    def power_source(self) -> str:
        """Which sensors the power comes from; empty without any."""
        return " + ".join(gauge.name for gauge in self.power)

    def temperatures(self) -> list[Temperature]:
        """All sensors that give a plausible value."""
        found = [(name, _scaled(_integer(file), 1000)) for name, file in self._temperatures]
        if self._gpu:
            found.append(("GPU", self._gpu.temperature()))
        return [Temperature(name, t) for name, t in found if t is not None and COLDEST < t < HOTTEST]

    def hottest(self) -> Temperature | None:
        return max(self.temperatures(), key=lambda sensor: sensor.celsius, default=None)

    def throttled(self) -> bool | None:
        """Whether heat slows the processors down now.

        Thermal cooling devices say so; where there is none, a highest frequency below the hardware's does. It is not
        asked where there are cooling devices, because a power mode (nvpmodel) lowers it for good.
        """
        states = [state for file in self._cooling if (state := _integer(file)) is not None]
        if states:
            return max(states) > 0
        limits = [(_integer(p / "scaling_max_freq"), _integer(p / "cpuinfo_max_freq")) for p in self._policies]
        known = [(now, most) for now, most in limits if now and most]
        return any(now < most for now, most in known) if known else None

    def battery(self) -> Battery | None:
        """The battery that is the emptiest."""
        found = []
        for folder in self._batteries:
            percent = _integer(folder / "capacity")
            if percent is not None and 0 <= percent <= 100:
                found.append(Battery(float(percent), _text(folder / "status") or "Unknown"))
        return min(found, key=lambda battery: battery.percent, default=None)

    def uptime(self) -> float | None:
        """Seconds since the machine was started."""
        try:
            seconds = float((_text(self._root / "proc/uptime") or "").split()[0])
        except (ValueError, IndexError):
            return None
        return seconds if 0 <= seconds < float("inf") else None

    def found(self) -> dict[str, str]:
        """What there is, by kind, as text for a person; a kind without a sensor is missing."""
        temperatures, throttled, battery = self.temperatures(), self.throttled(), self.battery()
        kinds = {
            "temperature": ", ".join(f"{t.sensor} {t.celsius:.0f} °C" for t in temperatures),
            "power": self.power_source,
            "throttling": "" if throttled is None else "throttled now" if throttled else "not throttled",
            "battery": f"{battery.percent:.0f} %, {battery.status}" if battery else "",
        }
        return {kind: text for kind, text in kinds.items() if text}


def free_disk_mb(folder: Path) -> float | None:
    """Free space, in 10^6 bytes, of the disk on which a folder is or will be."""
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    try:
        return shutil.disk_usage(existing).free / 1e6
    except OSError:
        return None


# -- a desktop GPU -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """One GPU by NVML."""

    energy: Gauge
    temperature: Callable[[], float | None]
    """In degrees Celsius."""


def nvml_gpu(uuid: str, library: Any = None) -> Gpu | None:
    """The GPU with this UUID, where pynvml is installed and answers. `library`: the module; for tests."""
    try:
        nvml = library or importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:  # no library, no driver, no such GPU: each has an error of its own
        return None

    def ask(function: str, divisor: float, *values: Any) -> float | None:
        try:
            return float(getattr(nvml, function)(handle, *values)) / divisor
        except Exception:  # NVML_ERROR_NOT_SUPPORTED and its many siblings
            return None

    def temperature() -> float | None:
        return ask("nvmlDeviceGetTemperature", 1, 0)  # 0: NVML_TEMPERATURE_GPU

    energy: Gauge = EnergyCounter("GPU (NVML)", lambda: ask("nvmlDeviceGetTotalEnergyConsumption", 1000))
    if energy.read() is None:
        energy = PowerGauge("GPU (NVML)", lambda: ask("nvmlDeviceGetPowerUsage", 1000))
    return None if energy.read() is None else Gpu(energy, temperature)


# -- where the files are -------------------------------------------------------------------------------------------


def _zones(root: Path) -> list[tuple[str, Path]]:
    zones = _folders(root / "sys/class/thermal", "thermal_zone*")
    named = [(_text(zone / "type") or zone.name, zone / "temp") for zone in zones]
    return [(name, file) for name, file in named if not _CONSTANT.search(name)]


def _hwmon_temperatures(hwmon: Iterable[Path]) -> list[tuple[str, Path]]:
    found = []
    for folder in hwmon:
        chip = _text(folder / "name") or folder.name
        for file in _folders(folder, "temp*_input"):
            label = _text(folder / file.name.replace("_input", "_label"))
            found.append((f"{chip} {label}" if label else chip, file))
    return found


def _cooling_devices(root: Path) -> list[Path]:
    """The states of those that slow a processor down. Others are fans, alerts, or settings (`TCC Offset`)."""
    kinds = [(d, _text(d / "type") or "") for d in _folders(root / "sys/class/thermal", "cooling_device*")]
    return [d / "cur_state" for d, kind in kinds if _PROCESSOR.search(kind) and not _FAN.search(kind)]


def _batteries(root: Path) -> list[Path]:
    """Those of the machine; a mouse or a keyboard has the scope Device."""
    supplies = _folders(root / "sys/class/power_supply", "*")
    return [s for s in supplies if _text(s / "type") == "Battery" and _text(s / "scope") != "Device"]


def _board_power(root: Path, hwmon: Sequence[Path]) -> list[Gauge]:
    rails = [*_ina3221_rails(hwmon), *_iio_rails(root)]
    total = next((rail for rail in rails if rail.name in TOTAL_RAILS), None) or _ina238(hwmon)
    if total:
        return [total]
    if rails:
        return [PowerGauge(f"sum of {', '.join(rail.name for rail in rails)}", lambda: _sum(r.read() for r in rails))]
    return _rapl(root)


def _ina3221_rails(hwmon: Iterable[Path]) -> list[PowerGauge]:
    """The connected channels of INA3221 chips; a channel gives millivolts and milliamperes."""
    rails = []
    for folder in hwmon:
        if _text(folder / "name") != "ina3221":
            continue
        for channel in INA3221_CHANNELS:
            label = _text(folder / f"in{channel}_label")
            volts, amperes = folder / f"in{channel}_input", folder / f"curr{channel}_input"

            def watts(volts: Path = volts, amperes: Path = amperes) -> float | None:
                return _watts(_product(_integer(volts), _integer(amperes)), 1e6)

            if label and label != "NC" and watts() is not None:
                rails.append(PowerGauge(label, watts))
    return rails


def _iio_rails(root: Path) -> list[PowerGauge]:
    """The channels of INA3221 chips as JetPack 4 has them, in milliwatts."""
    rails = []
    for folder in _folders(root / "sys/bus/iio/devices", "iio:device*"):
        for file in _folders(folder, "rail_name_*"):
            label, power = _text(file), folder / f"in_power{file.name.removeprefix('rail_name_')}_input"

            def watts(power: Path = power) -> float | None:
                return _watts(_integer(power), 1e3)

            if label and label != "NC" and watts() is not None:
                rails.append(PowerGauge(label, watts))
    return rails


def _ina238(hwmon: Iterable[Path]) -> PowerGauge | None:
    """The power that the board takes in, where an INA238 measures it, in microwatts."""
    for folder in hwmon:

        def watts(file: Path = folder / "power1_input") -> float | None:
            return _watts(_integer(file), 1e6)

        if _text(folder / "name") == "ina238" and watts() is not None:
            return PowerGauge("INA238", watts)
    return None


def _rapl(root: Path) -> list[Gauge]:
    """The counters of the processors' packages; their parts are included. Linux lets only root read them by default."""
    counters: list[Gauge] = []
    for zone in _folders(root / "sys/class/powercap", "intel-rapl:*"):
        name, span = _text(zone / "name") or "", _integer(zone / "max_energy_range_uj")

        def joules(file: Path = zone / "energy_uj") -> float | None:
            count = _integer(file)
            return None if count is None or count < 0 else count / 1e6

        if name.startswith("package") and joules() is not None:
            counters.append(EnergyCounter(f"RAPL {name}", joules, span / 1e6 if span and span > 0 else None))
    return counters


def _folders(parent: Path, pattern: str) -> list[Path]:
    """Entries of a folder, sorted by the numbers in their names: hwmon10 comes after hwmon9."""
    try:
        found = list(parent.glob(pattern))
    except OSError:
        return []
    return sorted(found, key=lambda path: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", path.name)])


def _text(file: Path) -> str | None:
    """The first line, without white space around it; None where there is none."""
    try:
        return file.read_text(encoding="utf-8").partition("\n")[0].strip() or None
    except (OSError, ValueError):
        return None


def _integer(file: Path) -> int | None:
    try:
        return int(_text(file) or "")
    except ValueError:
        return None


def _scaled(value: int | None, divisor: float) -> float | None:
    return None if value is None else value / divisor


def _product(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first * second


def _watts(value: float | None, divisor: float) -> float | None:
    """A reading in watts; a rail without load may be slightly below zero."""
    if value is None or value / divisor > MOST_WATTS or value / divisor < -1:
        return None
    return max(0.0, value / divisor)


def _sum(values: Iterable[float | None]) -> float | None:
    """None where one is missing: the sum of the others would be too small."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)

"""Sensors on trees of files such as boards have, with numbers worked out by hand; meter and limits on them."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightcl.device.metering import Board, Condition, LimitReached, Limits, Meter, Spent, Tally
from lightcl.device.telemetry import (
    Battery,
    EnergyCounter,
    PowerGauge,
    Sensors,
    Temperature,
    free_disk_mb,
    nvml_gpu,
)
from tests.lightcl.device.boards import FakeBoard, orin


def watts(sensors: Sensors) -> float | None:
    (gauge,) = sensors.power
    return gauge.read()


# -- sensors -------------------------------------------------------------------------------------------------------


def test_orin_has_a_rail_for_the_entire_board(tmp_path: Path) -> None:
    orin(tmp_path)
    sensors = Sensors(tmp_path)
    assert sensors.power_source == "VDD_IN"
    assert watts(sensors) == pytest.approx(7.4)
    # The zone without a sensor and the constant of the PMIC do not count.
    assert sensors.temperatures() == [Temperature("cpu-thermal", 48.218), Temperature("gpu-thermal", 51.031)]
    assert sensors.hottest() == Temperature("gpu-thermal", 51.031)
    assert sensors.throttled() is False  # the fan runs, which slows nothing down
    assert sensors.battery() is None
    assert sensors.uptime() == 4711.08


def test_without_such_a_rail_power_is_the_sum_of_the_rails(tmp_path: Path) -> None:
    board = FakeBoard(tmp_path)  # AGX Orin has two chips
    board.rail(3, 1, "VDD_GPU_SOC", 19_000, 200)  # 3.8 W
    board.rail(3, 2, "VDD_CPU_CV", 19_000, 50)  # 0.95 W
    board.rail(3, 3, "VIN_SYS_5V0", 5_000, 620)  # 3.1 W
    board.rail(4, 1, "NC", 5_000, 900)
    board.rail(4, 2, "VDDQ_VDD2_1V8AO", 19_000, -8)  # no load: a little below zero
    sensors = Sensors(tmp_path)
    assert sensors.power_source == "sum of VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0, VDDQ_VDD2_1V8AO"
    assert watts(sensors) == pytest.approx(7.85)
    (tmp_path / "sys/class/hwmon/hwmon3/curr2_input").unlink()
    assert watts(sensors) is None  # and not a sum that is too small


def test_thor_has_an_ina238(tmp_path: Path) -> None:
    board = FakeBoard(tmp_path)
    board.rail(2, 1, "VDD_GPU", 12_000, 800)
    board.file("sys/class/hwmon/hwmon5/name", "ina238")
    board.file("sys/class/hwmon/hwmon5/power1_input", 38_250_000)
    sensors = Sensors(tmp_path)
    assert (sensors.power_source, watts(sensors)) == ("INA238", 38.25)


def test_jetpack_4_has_rails_under_iio(tmp_path: Path) -> None:
    board = FakeBoard(tmp_path)
    for number, (label, milliwatts) in enumerate([("POM_5V_GPU", 401), ("POM_5V_IN", 3250), ("POM_5V_CPU", 920)]):
        board.file(f"sys/bus/iio/devices/iio:device0/rail_name_{number}", label)
        board.file(f"sys/bus/iio/devices/iio:device0/in_power{number}_input", milliwatts)
    sensors = Sensors(tmp_path)
    assert (sensors.power_source, watts(sensors)) == ("POM_5V_IN", 3.25)


def test_a_raspberry_pi_has_a_temperature_and_no_power(tmp_path: Path) -> None:
    board = FakeBoard(tmp_path)
    board.zone(0, "cpu-thermal", 62_322)
    board.frequencies(0, 1_800_000, 1_800_000)
    sensors = Sensors(tmp_path)
    assert (sensors.power, sensors.power_source) == ((), "")
    assert sensors.hottest() == Temperature("cpu-thermal", 62.322)
    assert sensors.throttled() is False
    board.frequencies(0, 1_200_000, 1_800_000)
    assert sensors.throttled() is True


def test_a_lowered_frequency_is_a_power_mode_where_cooling_devices_say_that_it_is_not_heat(tmp_path: Path) -> None:
    board = FakeBoard(tmp_path)
    board.frequencies(0, 1_420_800, 1_984_000)
    state = board.cooling(1, "cpu-throttle-alert", 0)
    board.cooling(2, "TCC Offset", 3)
    board.cooling(3, "intel_powerclamp", -1)
    sensors = Sensors(tmp_path)
    assert sensors.throttled() is False
    state.write_text("1")
    assert sensors.throttled() is True


def test_x86_has_counters_of_its_packages(tmp_path: Path) -> None:
    board = FakeBoard(tmp_path)
    board.rapl("0", "package-0", 262_143_000_000, 262_143_328_850)
    board.rapl("0:0", "core", 1, 262_143_328_850)  # a part of the package
    board.rapl("1", "psys", 7, 262_143_328_850)
    board.file("sys/class/hwmon/hwmon2/name", "coretemp")
    board.file("sys/class/hwmon/hwmon2/temp1_label", "Package id 0")
    board.file("sys/class/hwmon/hwmon2/temp1_input", 71_000)
    board.file("sys/class/hwmon/hwmon10/name", "nvme")
    board.file("sys/class/hwmon/hwmon10/temp1_input", 38_850)
    sensors = Sensors(tmp_path)
    (counter,) = sensors.power
    assert isinstance(counter, EnergyCounter)
    assert (counter.name, counter.read()) == ("RAPL package-0", 262_143.0)
    assert counter.span == pytest.approx(262_143.32885)
    assert sensors.hottest() == Temperature("coretemp Package id 0", 71.0)


def test_a_counter_that_may_not_be_read_is_no_counter(tmp_path: Path) -> None:
    board = FakeBoard(tmp_path)
    board.rapl("0", "package-0", "", 100)  # Linux lets only root read it
    assert Sensors(tmp_path).power == ()


def test_a_laptop_has_a_battery_and_its_mouse_does_not_count(tmp_path: Path) -> None:
    board = FakeBoard(tmp_path)
    board.battery("BAT0", 83, "Discharging")
    board.battery("BAT1", 41, "Charging")
    board.battery("hidpp_battery_0", 5, "Discharging", scope="Device")
    board.file("sys/class/power_supply/ucsi-source-psy-1/type", "USB")
    assert Sensors(tmp_path).battery() == Battery(41.0, "Charging")


def test_sensors_that_vanish_or_give_garbage_are_skipped(tmp_path: Path) -> None:
    board = orin(tmp_path)
    board.battery("BAT0", 50, "Full")
    sensors = Sensors(tmp_path)
    (tmp_path / "sys/class/thermal/thermal_zone1/temp").write_text("hot")
    (tmp_path / "sys/class/thermal/cooling_device1/cur_state").write_bytes(b"\xff\xfe")
    (tmp_path / "sys/class/power_supply/BAT0/capacity").write_text("900")
    (tmp_path / "sys/class/hwmon/hwmon1/curr1_input").write_text("99999999999")
    (tmp_path / "proc/uptime").write_text("nan")
    assert sensors.temperatures() == [Temperature("cpu-thermal", 48.218)]
    assert (sensors.throttled(), sensors.battery(), watts(sensors), sensors.uptime()) == (None, None, None, None)
    shutil.rmtree(tmp_path / "sys")
    assert (sensors.hottest(), watts(sensors)) == (None, None)
    assert Sensors(tmp_path).found() == {}


def test_what_is_found_is_said_in_words(tmp_path: Path) -> None:
    board = orin(tmp_path)
    board.battery("BAT0", 50, "Full")
    assert Sensors(tmp_path).found() == {
        "temperature": "cpu-thermal 48 °C, gpu-thermal 51 °C",
        "power": "VDD_IN",
        "throttling": "not throttled",
        "battery": "50 %, Full",
    }


def test_free_disk_is_that_of_the_first_folder_that_exists(tmp_path: Path) -> None:
    expected = shutil.disk_usage(tmp_path).free / 1e6
    assert free_disk_mb(tmp_path / "not" / "yet") == pytest.approx(expected, rel=0.05)


class Nvml:
    """Stands for pynvml: `values` by function; others are not supported, as on Orin."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        def answer(*_: object) -> Any:
            if name not in self._values:
                raise RuntimeError("NVML_ERROR_NOT_SUPPORTED")
            return self._values[name]

        return answer


def test_a_desktop_gpu_has_a_counter_or_a_gauge_and_orin_neither() -> None:
    there = {"nvmlInit": None, "nvmlDeviceGetHandleByUUID": SimpleNamespace()}
    counting = nvml_gpu("GPU-1", Nvml(**there, nvmlDeviceGetTotalEnergyConsumption=81_500, nvmlDeviceGetTemperature=64))
    assert counting is not None
    assert isinstance(counting.energy, EnergyCounter)
    assert (counting.energy.read(), counting.temperature()) == (81.5, 64.0)
    gauged = nvml_gpu("GPU-1", Nvml(**there, nvmlDeviceGetPowerUsage=187_000))
    assert gauged is not None
    assert isinstance(gauged.energy, PowerGauge)
    assert (gauged.energy.read(), gauged.temperature()) == (187.0, None)
    assert nvml_gpu("GPU-1", Nvml(**there)) is None
    assert nvml_gpu("GPU-1", Nvml()) is None


def test_a_gpu_adds_to_the_processor(tmp_path: Path) -> None:
    FakeBoard(tmp_path).rapl("0", "package-0", 5_000_000, 262_143_328_850)
    gpu = nvml_gpu("GPU-1", Nvml(nvmlInit=0, nvmlDeviceGetHandleByUUID=0, nvmlDeviceGetPowerUsage=90_000,
                                 nvmlDeviceGetTemperature=77))  # fmt: skip
    sensors = Sensors(tmp_path, gpu)
    assert sensors.power_source == "RAPL package-0 + GPU (NVML)"
    assert sensors.hottest() == Temperature("GPU", 77.0)


# -- the meter -----------------------------------------------------------------------------------------------------


class Readings:
    """Gives one value after the other."""

    def __init__(self, *values: float | None) -> None:
        self._values = iter(values)

    def __call__(self) -> float | None:
        return next(self._values)


def tally_of(*gauges: PowerGauge | EnergyCounter, at: tuple[float, ...]) -> Tally:
    tally = Tally(gauges)
    for time in at:
        tally.add_(time, Condition())
    return tally


def test_power_is_summed_up_between_samples() -> None:
    # 2 s from 5 to 7 W, then 4 s from 7 to 10 W: 12 + 34 joules.
    tally = tally_of(PowerGauge("VDD_IN", Readings(5, 7, 10)), at=(100, 102, 106))
    assert (tally.joules, tally.seconds) == (46, 6)
    assert tally.watts == pytest.approx(46 / 6)


def test_a_counter_may_begin_at_zero_again() -> None:
    # 90 to 95, then over 100 to 3, then to 40: 5 + 8 + 37 joules.
    tally = tally_of(EnergyCounter("RAPL", Readings(90, 95, 3, 40), span=100), at=(0, 1, 2, 5))
    assert (tally.joules, tally.watts) == (50, 10)


def test_gauges_add_up() -> None:
    tally = tally_of(
        EnergyCounter("RAPL", Readings(10, 70)), PowerGauge("GPU", Readings(100, 140)), at=(0, 2)
    )  # fmt: skip
    assert (tally.joules, tally.watts) == (60 + 240, 150)


@pytest.mark.parametrize(
    ("values", "joules"), [((4.0, None, 4.0), 40.0), ((4.0, 4.0, None), None), ((None, 4.0, 4.0), None)]
)
def test_a_gauge_that_was_silent_at_an_end_says_nothing_about_all(
    values: tuple[float | None, ...], joules: float | None
) -> None:
    tally = tally_of(PowerGauge("VDD_IN", Readings(*values)), at=(0, 5, 10))
    assert tally.joules == joules


def test_without_a_gauge_there_is_no_energy() -> None:
    assert tally_of(at=(0, 1)).joules is None


def test_a_meter_samples_at_both_ends_and_in_between(tmp_path: Path) -> None:
    board = orin(tmp_path)
    seen: list[float] = []

    def clock() -> float:
        seen.append(float(len(seen)))
        return seen[-1]

    with Meter(Board(tmp_path, Sensors(tmp_path), interval=0.001, clock=clock)) as meter:
        while len(seen) < 3:
            pass
        board.zone(1, "gpu-thermal", 63_500)
        while len(seen) < 23:  # a sample that had begun before, or that met the file half written, is not the last one
            pass
        board.zone(1, "gpu-thermal", 40_000)
    tally = meter.tally
    assert tally.hottest == Temperature("gpu-thermal", 63.5)
    assert tally.watts == pytest.approx(7.4)
    assert tally.joules == pytest.approx(7.4 * tally.seconds)
    assert tally.throttled == 0
    assert meter.now.hottest == Temperature("cpu-thermal", 48.218)


def test_the_cost_of_a_training_adds_up_over_its_parts() -> None:
    first = tally_of(PowerGauge("VDD_IN", Readings(5, 5)), at=(0, 2))
    first.hottest = Temperature("gpu", 81)
    second = tally_of(PowerGauge("VDD_IN", Readings(7, 7)), at=(0, 1))
    second.hottest = Temperature("gpu", 60)
    spent = Spent().plus(64, 2.5, first).plus(32, 1.5, second)
    assert spent == Spent(96, 4.0, 17.0, Temperature("gpu", 81))
    assert spent.plus(1, 1.0, None).joules is None


# -- limits --------------------------------------------------------------------------------------------------------


LIMITS = Limits(temperature_c=80, free_disk_mb=500, battery_percent=20)


@pytest.mark.parametrize(
    ("condition", "again", "reason"),
    [
        (Condition(), False, None),
        (Condition(Temperature("gpu", 80.0)), False, None),
        (Condition(Temperature("gpu", 80.1)), False, "gpu has 80.1 °C, at most 80"),
        (Condition(Temperature("gpu", 77.5)), True, "gpu has 77.5 °C, at most 77"),
        (Condition(free_disk_mb=499.6), False, "500 MB of disk are free, at least 500"),
        (Condition(battery=Battery(19, "Discharging")), False, "the battery is at 19 %, at least 20"),
        (Condition(battery=Battery(19, "Charging")), False, None),
        (Condition(battery=Battery(22, "Unknown")), True, "the battery is at 22 %, at least 23"),
        (Condition(battery=Battery(22, "Unknown")), False, None),
    ],
)
def test_limits(condition: Condition, again: bool, reason: str | None) -> None:
    found = LIMITS.crossed(condition, again=again)
    assert (found and found.reason) == reason
    assert Limits().crossed(condition, again=again) is None


def test_a_meter_raises_where_its_latest_sample_is_outside(tmp_path: Path) -> None:
    board = orin(tmp_path)
    meter = Meter(Board(tmp_path, Sensors(tmp_path), Limits(temperature_c=50)))
    meter.check()  # nothing is known yet
    meter.sample()
    with pytest.raises(LimitReached, match=r"gpu-thermal has 51\.0 °C, at most 50"):
        meter.check()
    board.zone(1, "gpu-thermal", 49_000)
    meter.sample()
    meter.check()

"""Trees of files as Linux shows the sensors of boards, made in a folder: `Board(folder).file("sys/...", "42")`."""

from __future__ import annotations

from pathlib import Path


class FakeBoard:
    """A root folder with `sys` and `proc`; each method adds the files of one device."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def file(self, path: str, text: object) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
        return file

    def zone(self, number: int, name: str, millidegrees: object) -> Path:
        folder = f"sys/class/thermal/thermal_zone{number}"
        self.file(f"{folder}/type", name)
        return self.file(f"{folder}/temp", millidegrees)

    def cooling(self, number: int, kind: str, state: object) -> Path:
        folder = f"sys/class/thermal/cooling_device{number}"
        self.file(f"{folder}/type", kind)
        return self.file(f"{folder}/cur_state", state)

    def rail(self, hwmon: int, channel: int, label: str, millivolts: object, milliamperes: object) -> None:
        folder = f"sys/class/hwmon/hwmon{hwmon}"
        self.file(f"{folder}/name", "ina3221")
        self.file(f"{folder}/in{channel}_label", label)
        self.file(f"{folder}/in{channel}_input", millivolts)
        self.file(f"{folder}/curr{channel}_input", milliamperes)

    def rapl(self, zone: str, name: str, microjoules: object, span: object) -> Path:
        folder = f"sys/class/powercap/intel-rapl:{zone}"
        self.file(f"{folder}/name", name)
        self.file(f"{folder}/max_energy_range_uj", span)
        return self.file(f"{folder}/energy_uj", microjoules)

    def battery(self, name: str, percent: object, status: str, scope: str = "System") -> Path:
        folder = f"sys/class/power_supply/{name}"
        self.file(f"{folder}/type", "Battery")
        self.file(f"{folder}/scope", scope)
        self.file(f"{folder}/status", status)
        return self.file(f"{folder}/capacity", percent)

    def frequencies(self, policy: int, now: int, most: int) -> None:
        folder = f"sys/devices/system/cpu/cpufreq/policy{policy}"
        self.file(f"{folder}/scaling_max_freq", now)
        self.file(f"{folder}/cpuinfo_max_freq", most)


def orin(root: Path) -> FakeBoard:
    """A Jetson Orin NX: VDD_IN 5.000 V x 1.480 A = 7.4 W, of which 1.6 W go to CPU, GPU and CV."""
    board = FakeBoard(root)
    board.zone(0, "cpu-thermal", 48_218)
    board.zone(1, "gpu-thermal", 51_031)
    board.zone(2, "cv0-thermal", -256_000)
    board.zone(3, "PMIC-Die", 100_000)
    board.rail(1, 1, "VDD_IN", 5000, 1480)
    board.rail(1, 2, "VDD_CPU_GPU_CV", 5000, 320)
    board.rail(1, 3, "VDD_SOC", 5000, 400)
    board.cooling(0, "pwm-fan", 2)
    board.cooling(1, "thermal-cpufreq-0", 0)
    board.file("proc/uptime", "4711.08 9000.00")
    return board

"""`device.precision` and `device.convolutions`: auto, resolved for the machine that computes.

bf16 is no faster as such: a processor without instructions for it computes it by detours, more than ten times as slowly
as fp32. Winograd's algorithm pays where direct convolutions are slow compared with matrix products. The rules below are
what was measured with PyTorch 2.14 (docs/results/performance.md); where nothing was, the plain choice is made.

It is decided by what the hardware is and not by timing it: the workers of a simulation and a board that starts again
must all decide alike.
"""

from __future__ import annotations

import platform
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from lightcl.device.hardware import choose_accelerator
from lightcl.scenario import Device, Scenario

AMPERE = 8
"""The major compute capability from which NVIDIA's GPUs have bf16; a Jetson Orin has 8.7, a Xavier 7.2."""
ZEN_5 = 26
"""The processor family from which AMD's direct convolutions are twice as fast as the matrix products of MKL."""
KEYS = ("precision", "convolutions")
Pays = Literal["yes", "no", "unknown"]


@dataclass(frozen=True)
class Arithmetic:
    """How a device computes; the fields are keys of the scenario's section `device`."""

    precision: Literal["fp32", "bf16"]
    convolutions: Literal["direct", "winograd"]


def arithmetic_of(scenario: Scenario) -> Arithmetic:
    """The scenario's two keys; auto: bf16, or fp32 with Winograd's algorithm, where it is known to be faster.

    Raises RequestError without the accelerator.
    """
    device = scenario.device
    precision, convolutions = device.precision, device.convolutions
    if precision == "auto":
        precision = "bf16" if bf16_pays(choose_accelerator(device.accelerator)) == "yes" else "fp32"
    if convolutions == "auto":
        pays = precision == "fp32" and winograd_pays(choose_accelerator(device.accelerator)) == "yes"
        convolutions = "winograd" if pays else "direct"
    return Arithmetic(precision, convolutions)


def with_arithmetic(scenario: Scenario, before: Device | None = None) -> Scenario:
    """The scenario without "auto" in the two keys: as this machine chooses, or as in the run `before`, which it
    continues."""
    device = scenario.device
    if "auto" not in (device.precision, device.convolutions):
        return scenario
    chosen = asdict(arithmetic_of(scenario)) if before is None else before.model_dump()
    changes = {key: chosen[key] for key in KEYS if getattr(device, key) == "auto"}
    return scenario.model_copy(update={"device": device.model_copy(update=changes)})


def slow_precision(scenario: Scenario) -> str | None:
    """A warning where the scenario asks for bf16 and this machine is slower in it than in fp32."""
    if scenario.device.precision != "bf16" or bf16_pays(choose_accelerator(scenario.device.accelerator)) != "no":
        return None
    return (
        "device.precision is bf16, in which this machine is slower than in fp32; device.precision=auto chooses the "
        "faster one"
    )


def bf16_pays(accelerator: torch.device) -> Pays:
    """Whether bf16 is faster than fp32 on the accelerator."""
    if accelerator.type == "cuda":
        return "yes" if torch.cuda.get_device_capability(accelerator)[0] >= AMPERE else "no"
    processor = _processor()
    if processor is None:
        return "unknown"
    return "yes" if "amx_bf16" in processor.flags or (processor.amd and "avx512_bf16" in processor.flags) else "no"


def winograd_pays(accelerator: torch.device) -> Pays:
    """Whether Winograd's algorithm is faster than direct convolutions in fp32."""
    if accelerator.type != "cpu":
        return "no"  # it is for the CPU (lightcl/networks/winograd.py)
    processor = _processor()
    if processor is None:
        return "unknown"
    return "no" if processor.amd and processor.family >= ZEN_5 else "yes"


@dataclass(frozen=True)
class _Processor:
    """An x86 processor."""

    amd: bool
    family: int
    flags: frozenset[str]


def _processor() -> _Processor | None:
    """This machine's, where it is one that the rules know: x86 under Linux."""
    text = _cpuinfo()
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    family = re.search(r"^cpu family\s*:\s*(\d+)$", text, re.MULTILINE)
    if not flags or not family or platform.machine() != "x86_64":
        return None
    return _Processor("AuthenticAMD" in text, int(family[1]), frozenset(flags[1].split()))


@cache
def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""

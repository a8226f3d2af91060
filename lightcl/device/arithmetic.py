"""`device.precision` and `device.convolutions`: auto, resolved for the machine that computes.

bf16 is no faster as such: a processor without instructions for it computes it by detours, more than ten times as slowly
as fp32. A step in C is the fastest on the processors that were measured, but it needs a C compiler. Winograd's
algorithm on PyTorch's operations pays where direct convolutions are slow compared with matrix products. The rules below
are what was measured with PyTorch 2.14 (docs/results/performance.md); where nothing was, the plain choice is made.

It is decided by what the machine is and not by timing it: the workers of a simulation and a board that starts again
must all decide alike.
"""

from __future__ import annotations

import platform
import re
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from lightcl.device.hardware import choose_accelerator
from lightcl.networks.native.library import cpuinfo, find_library, flags_in, require_library
from lightcl.scenario import Device, Scenario

AMPERE = 8
"""The major compute capability from which NVIDIA's GPUs have bf16; a Jetson Orin has 8.7, a Xavier 7.2."""
ZEN_5 = 26
"""The processor family from which AMD's direct convolutions are twice as fast as the matrix products of MKL."""
KEYS = ("precision", "convolutions")
Pays = Literal["yes", "no", "unknown"]
Convolutions = Literal["direct", "winograd", "native"]


@dataclass(frozen=True)
class Arithmetic:
    """How a device computes; the fields are keys of the scenario's section `device`."""

    precision: Literal["fp32", "bf16"]
    convolutions: Convolutions


def arithmetic_of(scenario: Scenario) -> Arithmetic:
    """The scenario's two keys; auto: bf16 and Winograd's algorithm where they are known to be faster.

    Raises RequestError without the accelerator.
    """
    device = scenario.device
    precision, convolutions = device.precision, device.convolutions
    if precision == "auto":
        precision = "bf16" if bf16_pays(choose_accelerator(device.accelerator)) == "yes" else "fp32"
    if convolutions == "auto":
        accelerator = choose_accelerator(device.accelerator)
        if native_pays(accelerator) == "yes" and not isinstance(find_library(), str):
            convolutions = "native"
        elif precision == "fp32" and winograd_pays(accelerator) == "yes":
            convolutions = "winograd"
        else:
            convolutions = "direct"
    return Arithmetic(precision, convolutions)


def with_arithmetic(scenario: Scenario, before: Device | None = None) -> Scenario:
    """The scenario without "auto" in the two keys: as this machine chooses, or as in the run `before`, which it
    continues.

    Raises RequestError without the accelerator, and for native without a C compiler.
    """
    device = scenario.device
    if "auto" in (device.precision, device.convolutions):
        chosen = asdict(arithmetic_of(scenario)) if before is None else before.model_dump()
        changes = {key: chosen[key] for key in KEYS if getattr(device, key) == "auto"}
        scenario = scenario.model_copy(update={"device": device.model_copy(update=changes)})
    if scenario.device.convolutions == "native":
        require_library()
    return scenario


def slow_arithmetic(scenario: Scenario, asked: Device | None = None) -> list[str]:
    """Warnings about how a scenario computes on this machine: in bf16, in which it is slower than in fp32; or without
    the C compiler that would make it faster. `asked` is the scenario's section before "auto" was resolved."""
    device, found = scenario.device, []
    accelerator = choose_accelerator(device.accelerator)
    if device.precision == "bf16" and bf16_pays(accelerator) == "no":
        found.append(
            "device.precision is bf16, in which this machine is slower than in fp32; device.precision=auto chooses the "
            "faster one"
        )
    chosen = arithmetic_of(scenario)
    if (
        (asked or device).convolutions == "auto"
        and chosen.convolutions != "native"
        and native_pays(accelerator) == "yes"
        and isinstance(missing := find_library(), str)
    ):
        found.append(f"{missing}; with a C compiler such as gcc training would be faster on this machine")
    return found


def bf16_pays(accelerator: torch.device) -> Pays:
    """Whether bf16 is faster than fp32 on the accelerator."""
    if accelerator.type == "cuda":
        return "yes" if torch.cuda.get_device_capability(accelerator)[0] >= AMPERE else "no"
    processor = _processor()
    if processor is None:
        return "unknown"
    return "yes" if "amx_bf16" in processor.flags or (processor.amd and "avx512_bf16" in processor.flags) else "no"


def native_pays(accelerator: torch.device) -> Pays:
    """Whether a step in C is faster than one of PyTorch's operations."""
    if accelerator.type != "cpu":
        return "no"  # it is for the CPU (lightcl/networks/native)
    return "unknown" if _processor() is None else "yes"


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
    text = cpuinfo()
    flags = flags_in(text)
    family = re.search(r"^cpu family\s*:\s*(\d+)$", text, re.MULTILINE)
    if not flags or not family or platform.machine() != "x86_64":
        return None
    return _Processor("AuthenticAMD" in text, int(family[1]), flags)

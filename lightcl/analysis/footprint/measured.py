"""The peak memory of real training, measured in a fresh process: of the tensors, and of the entire process.

Tensors on the CPU: PyTorch's profiler reports every allocation and release with the total after it, so the peak is
exact and not sampled. On a GPU: `torch.cuda.max_memory_allocated`. The process: the peak resident set (VmHWM, which
Linux lets a process reset) above the baseline before the network is created, with all imports done and PyTorch warmed
up. The profiler itself takes memory, so the process is measured in a separate run without it.

The measured code is the device's own (`EdgeDevice.train`), on noise images: a first task, then a second one, which is
measured from its begin to the saved state. Each measurement has a fresh process, so that nothing is left of another.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lightcl.analysis.footprint.shapes import Image
from lightcl.analysis.footprint.theory import Workload, workload_of
from lightcl.assembly import untrained
from lightcl.data.partition import Share
from lightcl.data.sources import ImageSet, Source
from lightcl.device.device import EdgeDevice
from lightcl.device.hardware import choose_accelerator, reset_peak, resident, set_up_torch
from lightcl.device.prefix import warm
from lightcl.errors import Failure
from lightcl.scenario import Scenario, scenario_from_json

STEPS = 3
"""Training steps per task: from the second step on, everything that a step leaves behind is present."""
Way = Literal["tensors", "process"]


class MeasurementFailure(Failure):
    """The measured process failed; the text says why."""


@dataclass(frozen=True)
class Measurement:
    """Bytes. `training` and `evaluation` are peaks of tensors; the others are of the process, above its baseline."""

    accelerator: str
    training: int
    evaluation: int
    resident: int | None
    """During training; None if not measured or not reported by the system."""
    resident_preparing: int | None
    """While the network is created and the first task is learned."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(scenario: Scenario, image: Image, classes: int, *, process: bool = True) -> Measurement:
    """Trains two tasks of `STEPS` steps as the scenario says, once per way of measuring.

    Without `process` only the tensors are measured, in half the time; the process's figures are then None. Raises
    MeasurementFailure, with the last line of its output, if the process ends with an error.
    """
    tensors = _in_fresh_process(scenario, image, classes, "tensors")
    resident = _in_fresh_process(scenario, image, classes, "process") if process else {}
    return Measurement(
        tensors["accelerator"], tensors["training"], tensors["evaluation"], resident.get("training"),
        resident.get("preparation"),
    )  # fmt: skip


def rehearsal(scenario: Scenario, image: Image, classes: int) -> tuple[Scenario, Source]:
    """The scenario with one device, at most two short tasks, and noise images.

    Everything that determines a step's memory stays: network, method, batch, precision, size of the head. Weights are
    not loaded: PyTorch's profiler would see the allocation of a file's tensors but not their release.
    """
    tasks = min(2, scenario.stream.tasks)
    batch, per_task = scenario.training.batch_size, max(1, min(scenario.stream.classes_per_task, classes // tasks))
    labels = np.resize(np.arange(tasks * per_task), STEPS * batch * tasks)
    labels.sort()
    channels, height, width = image
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), height, width, channels), dtype=np.uint8)
    names = tuple(str(number) for number in range(classes))
    train = ImageSet(pixels, labels, names)
    some = slice(None, None, max(1, len(labels) // max(batch, tasks * per_task)))
    values = scenario.model_dump(mode="json")
    values["network"] = untrained(scenario.network).model_dump(mode="json")
    values["data"] |= {"augmentation": scenario.augmentation}
    values["stream"] |= {
        "tasks": tasks, "classes_per_task": per_task, "class_order": "natural", "per_device_order": False,
        "held_out": 0.0, "evaluate_on": "test", "cut": "shared", "min_samples": 2,
    }  # fmt: skip
    values["fleet"] |= {
        "devices": 1, "partition": "iid", "partition_by": None, "classes_per_device": None, "test_data": "share",
    }  # fmt: skip
    values["training"] |= {"epochs": 1}
    values["server"] |= {"aggregation": "none", "rounds_per_task": 1}
    return Scenario.model_validate(values), Source(train, ImageSet(pixels[some], labels[some], names))


def rehearsed_workload(scenario: Scenario, image: Image, classes: int) -> Workload:
    """The workload whose count can be compared with `measure`."""
    from lightcl.assembly import build_stream

    short, source = rehearsal(scenario, image, classes)
    stream = build_stream(short, source, _whole(source), 0, range(classes))
    return workload_of(short, stream, image, choose_accelerator(scenario.device.accelerator).type)


def _whole(source: Source) -> Share:
    return Share(np.arange(len(source.train)), np.arange(len(source.test)))


# -- tensors -------------------------------------------------------------------------------------------------------


def peak_allocations(parts: dict[str, Callable[[], object]]) -> dict[str, int]:
    """Runs the parts in turn and returns the peak of allocated CPU tensor bytes in each.

    Memory allocated before the first part does not count; memory that an earlier part still holds does.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    gc.collect()  # reference cycles of earlier work would otherwise be released in the middle of a part
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for name, part in parts.items():
            with record_function(f"part {name}"):
                part()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    # Device type 0 is the CPU. Of each part only the time span is used.
    moments = sorted(
        (event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == 0
    )
    # PyTorch's total continues from an earlier profile of the same process, which is subtracted here.
    earlier = moments[0][1] - moments[0][2] if moments else 0
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if str(e.get("name")).startswith("part ")}
    peaks = {}
    for name in parts:
        start, end = spans[f"part {name}"]
        before = [total for at, total, _ in moments if at < start]
        peaks[name] = max([*before[-1:], *(total for at, total, _ in moments if start <= at <= end)], default=0)
        peaks[name] = max(0, peaks[name] - earlier)
    return peaks


def _peak_on_gpu(parts: dict[str, Callable[[], object]]) -> dict[str, int]:
    peaks = {}
    earlier = torch.cuda.memory_allocated()  # workspaces of the libraries, since the warm-up
    for name, part in parts.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        part()
        torch.cuda.synchronize()
        peaks[name] = int(torch.cuda.max_memory_allocated()) - earlier
    return peaks


# -- the process ---------------------------------------------------------------------------------------------------


def _resident_peaks(parts: dict[str, Callable[[], object]]) -> dict[str, int | None]:
    """Runs the parts in turn and returns the peak resident set of each, above what was resident at the start."""
    baseline = resident("VmRSS")
    peaks: dict[str, int | None] = {}
    for name, part in parts.items():
        reset_peak()
        part()
        highest = resident("VmHWM")
        peaks[name] = None if baseline is None or highest is None else highest - baseline
    return peaks


def _warm_up(accelerator: torch.device) -> None:
    """Makes PyTorch load what any training needs; its optimizers alone import about 100 MiB of modules, and the first
    use of a GPU loads its libraries."""
    images = torch.randn(2, 3, 8, 8, device=accelerator).contiguous(memory_format=torch.channels_last)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    network.to(accelerator)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    F.cross_entropy(network(images), torch.tensor([0, 1], device=accelerator)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


# -- the fresh process ---------------------------------------------------------------------------------------------


def _in_fresh_process(scenario: Scenario, image: Image, classes: int, way: Way) -> dict[str, Any]:
    request = {"scenario": scenario.model_dump_json(), "image": image, "classes": classes, "way": way}
    root = str(Path(__file__).parents[3])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    answer = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(request), capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": paths}, check=False,
    )  # fmt: skip
    if answer.returncode:
        words = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        raise MeasurementFailure(f"the memory of method {scenario.method.name} could not be measured: {words}")
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


def _serve() -> None:
    """Reads a request from the standard input and writes the result to the standard output."""
    request = json.load(sys.stdin)
    channels, height, width = request["image"]
    scenario = scenario_from_json(request["scenario"])
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LIGHTCL_CACHE"] = cache
        result = measure_here(scenario, (channels, height, width), request["classes"], request["way"])
    sys.stdout.write(json.dumps(result) + "\n")


def measure_here(scenario: Scenario, image: Image, classes: int, way: Way) -> dict[str, Any]:
    """The peaks of preparation (network and first task), training and evaluation, in this process."""
    scenario, source = rehearsal(scenario, image, classes)
    accelerator = choose_accelerator(scenario.device.accelerator)
    set_up_torch(accelerator, scenario.device.threads)
    _warm_up(accelerator)
    devices: list[EdgeDevice] = []
    if scenario.caches_prefix:  # what is measured is training from the cache; a new task's memory samples are not in it
        list(warm(scenario, source, looked_at=False, classes=classes))
    with tempfile.TemporaryDirectory() as folder:

        def prepare() -> None:
            device = EdgeDevice(scenario, 0, Path(folder), source=source, share=_whole(source), head=range(classes))
            devices.append(device)
            for task in device.stream.ids[device.stream.first : -1]:
                device.train(task, 1)

        parts: dict[str, Callable[[], object]] = {
            "preparation": prepare,
            "training": lambda: devices[0].train(devices[0].stream.ids[-1], 1),
            "evaluation": lambda: devices[0].evaluate(),
        }
        if way == "process":
            peaks: dict[str, Any] = _resident_peaks(parts)
        else:
            peaks = dict(_peak_on_gpu(parts) if accelerator.type == "cuda" else peak_allocations(parts))
    return peaks | {"accelerator": accelerator.type}


if __name__ == "__main__":
    _serve()

"""`lightcl device check`: whether a board can take part in a scenario. Light at import."""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lightcl.errors import Failure, RequestError

if TYPE_CHECKING:
    from client.app import Local
    from lightcl.data.sources import Source
    from lightcl.scenario import Scenario


@dataclass(frozen=True)
class Check:
    """The outcome of one check: what was found, or what is wrong and what to do."""

    name: str
    passed: bool
    text: str


def check(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO")],
    node_config: Annotated[
        str,
        typer.Option(
            "--node-config", metavar="'KEY=VALUE ...'", help="The text that flower-supernode gets as --node-config"
        ),
    ] = "",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. fleet.devices=3; repeatable"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON")] = False,
) -> None:
    """Check this board before it joins a fleet: node configuration, state folder, data, accelerator, memory, network.

    SCENARIO is a YAML file, or the name of a bundled scenario. The exit code is 1 if a check fails.
    """
    from lightcl.scenario import load_scenario

    checks = run_checks(load_scenario(scenario, changes or []), read_node_config(node_config))
    report(checks, as_json=as_json)


def report(checks: Sequence[Check], *, as_json: bool) -> None:
    """Prints the checks; the program ends with 1 where one failed."""
    if as_json:
        sys.stdout.write(json.dumps([asdict(one) for one in checks], indent=2) + "\n")
    else:
        print_checks(checks)
    if not all(one.passed for one in checks):
        raise typer.Exit(1)


def read_node_config(text: str) -> dict[str, Any]:
    """The pairs of `partition-id=0 name="board 0"`; values are TOML, as for flower-supernode. Raises RequestError."""
    pairs = re.findall(r"""(\S+?)=('[^']*'|"[^"]*"|\S+)""", text)
    rest = re.sub(r"""\S+?=('[^']*'|"[^"]*"|\S+)""", "", text).strip()
    try:
        values = tomllib.loads("\n".join(f"{key} = {value}" for key, value in pairs))
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"--node-config {text!r}: not KEY=VALUE pairs ({error}); texts need quotes") from error
    if rest:
        raise RequestError(f"--node-config: {rest!r} is not KEY=VALUE; separate pairs by spaces, texts need quotes")
    return values


def run_checks(
    scenario: Scenario, node_config: Mapping[str, Any], memory_mb: int = 0, *, machine: bool = True
) -> list[Check]:
    """All checks in order. After a node configuration that is invalid, the others are not run.

    `memory_mb` is the board's budget for all its processes; 0: all that is free. Without `machine`, the state folder
    and the accelerator are left out.
    """
    from client.app import local_settings

    found: list[Check] = []

    def run(name: str, act: Callable[[], tuple[str, Any]]) -> Any:
        try:
            text, value = act()
        except (RequestError, Failure, OSError) as error:
            found.append(Check(name, False, str(error)))
            return None
        found.append(Check(name, True, text))
        return value

    def configuration() -> tuple[str, tuple[Local, Scenario]]:
        local = local_settings(node_config, None)
        return f"{local.name}, device {local.partition} of the fleet", (local, local.overrides.apply(scenario))

    settled = run("node configuration", configuration)
    if settled is None:
        return found
    local, own = settled
    if machine:
        run("state folder", lambda: _check_state_folder(local.state))
    data: tuple[Source, int] | None
    if own.data.source == "field":
        data, own = run("data", lambda: _check_field(local, own)) or (None, own)
    else:
        data = run("data", lambda: _check_data(local, own))
    if machine:
        run("accelerator", lambda: _check_accelerator(own))
    if data is not None:
        run("network", lambda: _check_network(own, *data))
        run("memory", lambda: _check_memory(own, data[0], local, memory_mb))
    return found


def _check_state_folder(folder: Path) -> tuple[str, None]:
    """Writes and removes a file; reports the free space of the disk."""
    import shutil
    import tempfile

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder):
        pass
    return f"{folder} is writable, {shutil.disk_usage(folder).free // 10**6} MB free", None


def _check_data(local: Local, scenario: Scenario) -> tuple[str, tuple[Source, int]]:
    """Opens the images and cuts this device's stream from them; gives them with the number of rows of the head."""
    from client.app import whole_share
    from lightcl.assembly import build_stream, fleet_head
    from lightcl.data.partition import share_of
    from lightcl.data.sources import load_source

    source = load_source(scenario.source_request())
    if local.own_data:
        share = whole_share(source)
    else:
        if local.partition >= scenario.fleet.devices:
            raise RequestError(
                f"partition-id is {local.partition}, but fleet.devices is {scenario.fleet.devices} "
                f"(allowed: 0 to {scenario.fleet.devices - 1})"
            )
        share = share_of(source, scenario.fleet, scenario.seed, local.partition)
    head = fleet_head(scenario, source, own_data=local.own_data)
    stream = build_stream(scenario, source, share, local.partition, head)
    if not stream:
        raise RequestError(
            f"the board can learn no task: {stream.skipped[0].reason}; give it more images or lower stream.min_samples"
        )
    height, width, channels = source.train.images.shape[1:]
    learned = f"{len(stream)} of {scenario.stream.tasks}" if stream.skipped else f"{len(stream)}"
    used = f" ({len(head)} in the fleet's streams)" if len(head) < len(source.classes) else ""
    return (
        f"{len(share.train)} training images of {height}x{width}x{channels}, {len(source.classes)} classes{used}, "
        f"{learned} tasks"
    ), (source, len(head))


def _check_field(local: Local, scenario: Scenario) -> tuple[str, tuple[tuple[Source, int], Scenario]]:
    """Looks into the folder that images come to. Gives blank images in their place, and a scenario that is counted on
    them: network and memory do not depend on what the images show."""
    import numpy as np

    from client.app import field_plan
    from lightcl.data.field import CHANNELS, FieldTasks, NotReady
    from lightcl.data.sources import ImageSet, Source

    plan = field_plan(scenario, local, local.partition)
    if not Path(plan.path).is_dir():
        raise RequestError(f"{plan.path} is not a folder (data of this board); make it, or mount its disk")
    if plan.keep != "all" and not os.access(plan.path, os.W_OK):
        raise RequestError(
            f"data.keep is {plan.keep!r}, but {plan.path} cannot be written to; give this user the right, or keep: all"
        )
    try:
        waiting = FieldTasks(local.state / ".check", plan).waiting()
    except NotReady as error:
        raise RequestError(error.reason) from error
    classes, side = len(plan.classes), plan.image_size
    labels = np.arange(max(plan.ready_images, 4 * classes) * scenario.fleet.devices) % classes
    blank = ImageSet(np.zeros((len(labels), side, side, CHANNELS), dtype=np.uint8), labels, plan.classes)
    counted = scenario.model_copy(
        update={
            "data": scenario.data.model_copy(update={"source": "image-folder", "classes": None}),
            "stream": scenario.stream.model_copy(update={"tasks": 1, "classes_per_task": classes}),
        }
    )
    return f"{plan.path}: {waiting.text(0, plan)}", ((Source(blank, blank), classes), counted)


def _check_accelerator(scenario: Scenario) -> tuple[str, None]:
    """Runs a training step on the accelerator and compares it with the CPU's."""
    import torch

    from client.board.kernel import check_kernels, memory_text
    from lightcl.device.arithmetic import arithmetic_of, slow_arithmetic
    from lightcl.device.hardware import choose_accelerator

    device = choose_accelerator(scenario.device.accelerator)
    found = check_kernels(device)
    chosen = arithmetic_of(scenario)
    says = [f"computes in {chosen.precision}, convolutions {chosen.convolutions}", *slow_arithmetic(scenario)]
    return "; ".join([memory_text(device), f"torch {torch.__version__}", found, *says]), None


def _check_network(scenario: Scenario, source: Source, classes: int) -> tuple[str, None]:
    """Reads the weights and builds the network and the method."""
    from lightcl.assembly import build_network

    if scenario.network.freeze == "auto":
        return "not built: the server chooses the freeze point when the run starts", None
    network = build_network(scenario, in_channels=source.channels, classes=classes)
    scenario.method.build(network)
    frozen = network.prefix.blocks[-1] if network.prefix.blocks else "none"
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"{parameters} parameters, frozen up to {frozen}, method {scenario.method.name}", None


def _check_memory(scenario: Scenario, source: Source, local: Local, memory_mb: int) -> tuple[str, None]:
    """The count of a training step's memory, beside what this process has loaded already, against what is free."""
    from lightcl.analysis.footprint.comparison import footprint_of
    from lightcl.device.hardware import resident

    if scenario.network.freeze == "auto":
        return "not counted: the server chooses the freeze point when the run starts", None
    step = footprint_of(scenario, source, None if local.own_data else local.partition, measuring=False).counted.peak
    loaded, free = resident("VmRSS") or 0, available_memory()
    text = (
        f"a training step takes {step / 1e6:.0f} MB beside {loaded / 1e6:.0f} MB for Python, PyTorch and images; "
        f"{free / 1e6:.0f} MB available"
    )
    if step > free:
        raise RequestError(f"{text}; end other programs, or run `lightcl plan` for a scenario that fits")
    if memory_mb and loaded + step > memory_mb * 10**6:
        raise RequestError(
            f"{text}; memory_mb is {memory_mb}: raise it, or run `lightcl plan` for a scenario that fits"
        )
    return text, None


def available_memory() -> int:
    """Bytes that can be allocated without swapping, as Linux estimates it."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def print_checks(checks: Sequence[Check]) -> None:
    """One line per check."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(emoji=False)
    for one in checks:
        mark = "[green]ok    [/]" if one.passed else "[red]failed[/]"
        console.print(f"{mark} {one.name}: {escape(one.text)}", highlight=False, soft_wrap=True)

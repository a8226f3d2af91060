"""`lightcl validate`: everything about a scenario that can be checked before it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from simulations.options import (
    Changes,
    Command,
    Plugins,
    ScenarioFile,
    amount,
    command_app,
    console,
    read_scenario,
)

if TYPE_CHECKING:
    import numpy as np

    from lightcl.preparation import Prepared

app = command_app()


@app.command(cls=Command)
def validate(scenario: ScenarioFile, changes: Changes = None, plugins: Plugins = None) -> None:
    """Check a scenario against its data and weights without running it."""
    from lightcl.data.field import CHANNELS
    from lightcl.data.sources import comes_to_boards
    from lightcl.device.arithmetic import arithmetic_of, slow_arithmetic, with_arithmetic
    from lightcl.preparation import prepare
    from server.aggregation import Aggregator
    from server.commands.check import check_scenario

    loaded = read_scenario(scenario, changes, plugins)
    Aggregator.check(loaded)
    name = "the standard input" if str(scenario) == "-" else str(scenario)
    if comes_to_boards(loaded.data.source):
        text = check_scenario(loaded, CHANNELS)
        console().print(
            f"{name}: valid for {amount(loaded.fleet.devices, 'board')} that collect images. {text}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        return
    with_arithmetic(loaded)  # refuses what this machine cannot compute
    prepared = prepare(loaded)
    checked, out = prepared.scenario, console()
    out.print(
        f"{name}: valid. {amount(checked.fleet.devices, 'device')}, {amount(checked.stream.tasks, 'task')} x "
        f"{amount(checked.stream.classes_per_task, 'class', 'classes')}, method {checked.method.name}.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for key, chosen in asdict(arithmetic_of(checked)).items():
        if getattr(checked.device, key) == "auto":
            out.print(f"device.{key}: auto chooses {chosen} on this machine", highlight=False)
    for line in [*fleet_lines(prepared), *(f"warning: {warning}" for warning in slow_arithmetic(checked))]:
        style = "yellow" if line.startswith("warning") else None
        out.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def fleet_lines(prepared: Prepared) -> Iterator[str]:
    """Images and tasks per device, skipped tasks, and a warning about small test sets.

    Images of skipped tasks do not count, and devices that learn no task are left out of the image counts.
    """
    from lightcl.metrics import FEW_TEST_IMAGES

    counts, tasks = prepared.counts, prepared.scenario.stream.tasks
    learning = counts.learned.any(axis=1)
    yield f"training images per device: {_range(counts.train_used[learning])}"
    yield f"test images per device: {_range(counts.tested_used[learning])}"
    learned = Counter(len(ids) for ids in prepared.tasks)
    parts = [f"{learned[number]} of {amount(number, 'task')}" for number in sorted(learned, reverse=True)]
    yield f"devices by the number of tasks that they learn: {', '.join(parts)}"
    if skipped := int((~counts.learned).sum()):
        least = prepared.scenario.stream.min_samples
        yield (
            f"skipped: {skipped} of {tasks * len(prepared.tasks)} tasks of all devices, by "
            f"{amount(int((~counts.learned).any(axis=1).sum()), 'device')}; a task needs {least} training images "
            "(stream.min_samples) and a test image"
        )
    few = int((counts.tested_used[learning] < FEW_TEST_IMAGES).sum())
    if few:
        advice = (
            "fleet.test_data=matched gives a device more"
            if prepared.scenario.fleet.test_data == "share"
            else ("their accuracies are coarse")
        )
        yield f"warning: {amount(few, 'device')} tested on fewer than {FEW_TEST_IMAGES} images; {advice}"


def _range(values: np.ndarray) -> str:
    import numpy as np

    return f"{values.min()} to {values.max()}, median {np.median(values):g}"

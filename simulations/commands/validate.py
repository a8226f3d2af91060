"""`lightcl validate`: everything about a scenario that can be checked before it runs."""

from __future__ import annotations

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

app = command_app()


@app.command(cls=Command)
def validate(scenario: ScenarioFile, changes: Changes = None, plugins: Plugins = None) -> None:
    """Check a scenario against its data and weights without running it."""
    from lightcl.preparation import prepare
    from server.aggregation import Aggregator

    loaded = read_scenario(scenario, changes, plugins)
    Aggregator.check(loaded.server)
    prepared = prepare(loaded)
    checked, sizes = prepared.scenario, [len(share.train) for share in prepared.shares]
    console().print(
        f"{scenario}: valid. {amount(checked.fleet.devices, 'device')} with {min(sizes)} to {max(sizes)} training "
        f"images, {amount(checked.stream.tasks, 'task')} x "
        f"{amount(checked.stream.classes_per_task, 'class', 'classes')}, method {checked.method.name}.",
        highlight=False,
        markup=False,
    )

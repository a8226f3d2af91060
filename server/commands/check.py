"""`lightcl server check`: what can be checked of a scenario without images. Light at import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lightcl.errors import RequestError

if TYPE_CHECKING:
    from lightcl.scenario import Scenario


def check(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. fleet.devices=3; repeatable"),
    ] = None,
    channels: Annotated[int, typer.Option(min=1, help="Color channels of the boards' images")] = 3,
) -> None:
    """Check what a server can check without images: the keys, the averaging strategy, the weights and the network.

    SCENARIO is a YAML file, or the name of a bundled scenario. Each board checks its data with `lightcl device check`.
    """
    from lightcl.scenario import load_scenario

    loaded = load_scenario(scenario, changes or [])
    text = check_scenario(loaded, channels)
    typer.echo(f"{scenario}: valid for {loaded.fleet.devices} boards. {text}")


def check_scenario(scenario: Scenario, channels: int) -> str:
    """What the fleet would share, in a sentence. Raises RequestError for a scenario that no fleet of boards can run."""
    from lightcl.assembly import build_network
    from lightcl.exchange.tensors import outgoing, size_in_bytes
    from server.aggregation import Aggregator

    Aggregator.check(scenario)
    if scenario.network.freeze == "auto":
        raise RequestError(
            "network.freeze is 'auto', which takes images to choose from; run `lightcl analyze` where images are, and "
            "set network.freeze to the block that it names"
        )
    classes = len(scenario.data.classes or ()) or scenario.stream.tasks * scenario.stream.classes_per_task
    network = build_network(scenario, in_channels=channels, classes=classes)
    scenario.method.build(network)
    if scenario.server.aggregation == "none":
        return "The boards share no weights (server.aggregation is 'none')."
    shared = outgoing(network, scenario.server.aggregation)
    if not shared:
        raise RequestError(
            f"server.aggregation {scenario.server.aggregation!r} has nothing to share: every block is frozen"
        )
    return (
        f"Each board sends {len(shared)} tensors, {size_in_bytes(shared) / 1024:.0f} KiB per round, with {classes} "
        "classes."
    )

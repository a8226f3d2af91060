"""The Flower ServerApp: runs a scenario over the devices of the grid and writes the run folder."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from lightcl.data.sources import comes_to_boards, reads_own_files
from lightcl.preparation import open_remote_run, open_run
from lightcl.records.folder import RunFolder
from lightcl.scenario import Scenario, keys_without_effect, load_scenario
from server.aggregation import Aggregator
from server.ledger import KnownImages
from server.listeners import LogListener
from server.rounds import Coordinator

logger = logging.getLogger("flwr")


def make_app(coordinator: Coordinator) -> ServerApp:
    """The app of one run; its results lie in the run folder afterwards."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        coordinator.run(grid)

    return app


def images_are_here(scenario: Scenario) -> bool:
    """Whether the server can load the images; otherwise they are on the boards alone (`data-path`)."""
    path = scenario.data.path
    if comes_to_boards(scenario.data.source):
        return False
    return path.exists() if path is not None else not reads_own_files(scenario.data.source)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """`flwr run`: the run configuration names `scenario` (a file or a bundled one), `set` and `out`."""
    config = context.run_config
    wanted = Path(str(config.get("scenario", "quickstart")))
    scenario = load_scenario(wanted, shlex.split(str(config.get("set", ""))))
    for line in keys_without_effect(scenario):
        logger.warning("%s", line)
    Aggregator.check(scenario)
    folder = RunFolder(Path(str(config.get("out") or f"runs/{scenario.name}-{context.run_id}")).absolute())
    command, resume = f"flwr run ({wanted})", bool(config.get("resume", False))
    tasks: Sequence[tuple[int, ...]] | None = None  # where only the boards have images, each says what it can learn
    images: KnownImages | None = None
    if images_are_here(scenario):

        def log_step(what: str, done: int, total: int) -> None:
            logger.info("choosing the freeze point: %s, epoch %d of %d", what, done, total)

        prepared = open_run(
            folder, scenario, command, "fleet", resume=resume, overwrite=False, here=False, on_step=log_step
        )  # fmt: skip
        scenario = prepared.scenario
        tasks, images = prepared.tasks, KnownImages.of(prepared)
    else:
        open_remote_run(folder, scenario, command, resume=resume)
    if folder.completed:
        logger.info("the run in %s is already complete", folder.path)
        return
    run = str(folder.read()["run"])
    with folder.locked():
        results = Coordinator(scenario, folder, run, LogListener(), tasks, images=images).run(grid)
    for setting in ("til", "cil"):
        if figures := results.figures(setting):
            logger.info("%s %.1f %%", setting.upper(), 100 * figures.average_accuracy.mean)
    logger.info("run folder: %s", folder.path)

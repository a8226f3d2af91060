"""`lightcl train`: one device of the fleet, without Flower."""

from __future__ import annotations

from typing import Annotated

import typer

from simulations.options import (
    Changes,
    Command,
    NoReport,
    OutFolder,
    Overwrite,
    Plugins,
    Resume,
    ScenarioFile,
    check_device,
    command_app,
    command_line,
    console,
    read_scenario,
)

app = command_app()


@app.command(cls=Command)
def train(
    scenario: ScenarioFile, changes: Changes = None,
    device: Annotated[int, typer.Option("--device", min=0, help="Number of the device in the fleet")] = 0,
    out_folder: OutFolder = None, resume: Resume = False, overwrite: Overwrite = False, plugins: Plugins = None,
    no_report: NoReport = False,
) -> None:  # fmt: skip
    """Train one device on its stream, on this machine and without Flower.

    The results equal those of the same device in a fleet with `server.aggregation: none`.
    """
    from lightcl.records.folder import RunFolder
    from simulations.alone import check_alone, train_alone
    from simulations.commands.shared import default_folder, open_folder, print_results
    from simulations.progress import LiveProgress

    loaded, out = read_scenario(scenario, changes, plugins), console()
    check_device(device, loaded)
    check_alone(loaded)
    folder = RunFolder((out_folder or default_folder(loaded, f"-device-{device}")).absolute())
    prepared = open_folder(
        folder, loaded, f"device {device}", command_line(), resume=resume, overwrite=overwrite, console=out
    )  # fmt: skip
    with folder.locked():
        if folder.completed:
            out.print("the run is already complete", highlight=False)
        else:
            rounds = 1 if loaded.method.joint else len(prepared.tasks[device])
            with LiveProgress(out, rounds, "opening the device") as progress:
                try:
                    train_alone(prepared, device, folder, progress)
                except KeyboardInterrupt:
                    folder.interrupt()
                    raise
    print_results(folder, out, report=not no_report)

"""`lightcl simulate`: a fleet of devices on this machine."""

from __future__ import annotations

from simulations.options import (
    Changes,
    Command,
    NoReport,
    OutFolder,
    Overwrite,
    Plugins,
    Resume,
    ScenarioFile,
    command_app,
    command_line,
    console,
    read_scenario,
)

app = command_app()


@app.command(cls=Command)
def simulate(
    scenario: ScenarioFile, changes: Changes = None, out_folder: OutFolder = None, resume: Resume = False,
    overwrite: Overwrite = False, plugins: Plugins = None,
    no_report: NoReport = False,
) -> None:  # fmt: skip
    """Simulate a fleet of devices and write a report."""
    from lightcl.records.folder import RunFolder
    from server.rounds import RunFailure
    from simulations.commands.shared import default_folder, open_folder, print_report, print_results
    from simulations.commands.validate import fleet_lines
    from simulations.fleet import check_simulation, disk_of_states, simulate_fleet
    from simulations.progress import LiveProgress

    loaded, out = read_scenario(scenario, changes, plugins), console()
    check_simulation(loaded)
    folder = RunFolder((out_folder or default_folder(loaded)).absolute())
    prepared = open_folder(
        folder, loaded, "fleet", command_line(), resume=resume, overwrite=overwrite, console=out
    )  # fmt: skip
    with folder.locked():
        if folder.completed:
            out.print("the run is already complete", highlight=False)
        else:
            rounds = loaded.server.rounds_per_task * sum(len(tasks) for tasks in prepared.tasks)
            for line in fleet_lines(prepared):
                if line.startswith("warning"):
                    out.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
            out.print(str(disk_of_states(prepared)), highlight=False)
            with LiveProgress(out, rounds) as progress:
                try:
                    simulate_fleet(prepared, folder, progress)
                except RunFailure:
                    if not no_report:
                        print_report(folder, out)  # it shows how far the run got and why it stopped
                    raise
    print_results(folder, out, report=not no_report)

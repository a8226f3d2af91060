"""`lightcl report`: the page of a run, from its run folder."""

from __future__ import annotations

from simulations.options import Command, Plugins, RunPath, command_app, console, use_plugins

app = command_app()


@app.command(cls=Command)
def report(run: RunPath, plugins: Plugins = None) -> None:
    """Rebuild the report of a run, finished or not."""
    from lightcl.records.folder import RunFolder
    from simulations.commands.shared import build_report

    use_plugins(plugins or [])
    console().print(f"report: {build_report(RunFolder(run))}", highlight=False, markup=False, soft_wrap=True)

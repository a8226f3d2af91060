"""The command line. Exit codes: 0 done, 1 the run failed, 2 the request was wrong, 130 interrupted (resume it)."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

from lightcl.errors import RequestError
from lightcl.scenario import Scenario, load_scenario, scenario_keys, scenario_schema
from simulations.commands.compare import compare
from simulations.options import amount, check_device
from simulations.sweeps.commands import sweep

app = typer.Typer(
    help="Continual learning on fleets of edge devices: LightCL on every device, Flower between them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(emoji=False)
err = Console(stderr=True, emoji=False)

GOING_ON = {
    **dict.fromkeys(("simulate", "train", "sweep"), "; what a run had reported is saved: go on with --resume"),
    "pretrain": "; the same command goes on where it was",
}
"""What to say of a command that was interrupted; the others write nothing before they are done."""

ARGUMENTS = {
    "scenario": "A YAML file, e.g. lightcl/scenario/bundled/quickstart.yaml; all keys: docs/scenario-keys.md",
    "run": "A run folder, as --out of simulate or train named it",
}


class Command(TyperCommand):
    """Gives arguments their help here: that of `typer.Argument` is lost between Typer 0.20 and Click 8.5."""

    def __init__(self, *args: Any, params: list[Any] | None = None, **options: Any) -> None:
        for parameter in params or []:
            if parameter.name in ARGUMENTS and parameter.param_type_name == "argument":
                parameter.help = ARGUMENTS[parameter.name]
        super().__init__(*args, params=params, **options)


ScenarioFile = Annotated[Path, typer.Argument(metavar="SCENARIO")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. training.epochs=5; repeatable"),
]
OutFolder = Annotated[Path | None, typer.Option("--out", help="Run folder; default: runs/<scenario's name>-<seed>")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the killed or interrupted run in --out")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out")]


def _print_version(asked: bool) -> None:
    if asked:
        from lightcl.records.provenance import version

        out.print(f"lightcl {version('lightcl-fleet') or 'of a checkout that is not installed'}", highlight=False)
        raise typer.Exit


@app.callback()
def _lightcl(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit")
    ] = False,
) -> None:
    pass


@app.command(cls=Command)
def simulate(
    scenario: ScenarioFile, changes: Changes = None, out_folder: OutFolder = None, resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Simulate a fleet of devices in Flower's simulation runtime, and write a report."""
    from simulations.runs import simulate_run

    loaded = load_scenario(scenario, changes or [])
    path = out_folder or _default_folder(loaded)
    simulate_run(loaded, path, command=_command(), resume=resume, overwrite=overwrite, console=out)


@app.command(cls=Command)
def train(
    scenario: ScenarioFile, changes: Changes = None,
    device: Annotated[int, typer.Option("--device", min=0, help="Which device of the fleet")] = 0,
    out_folder: OutFolder = None, resume: Resume = False, overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Learn one device's stream here, without Flower: the same numbers as that device under `aggregation: none`."""
    from simulations.runs import train_run

    loaded = load_scenario(scenario, changes or [])
    check_device(device, loaded)
    path = out_folder or _default_folder(loaded, f"-device-{device}")
    train_run(loaded, device, path, command=_command(), resume=resume, overwrite=overwrite, console=out)


@app.command(cls=Command)
def analyse(
    scenario: ScenarioFile, changes: Changes = None,
    device: Annotated[int, typer.Option("--device", min=0, help="Whose stream is analysed")] = 0,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", min=0, max=1, help="What a block needs to be frozen; network.freeze_threshold"),
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Folder; default: runs/<scenario's name>-<seed>-analysis-<device>")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the analysis in --out")] = False,
) -> None:  # fmt: skip
    """Measure how general every block is on one device's stream, and name a freeze point."""
    from simulations.runs import analyse_run

    given = [] if threshold is None else [f"network.freeze_threshold={threshold}"]
    loaded = load_scenario(scenario, [*(changes or []), *given])
    check_device(device, loaded)
    path = out_folder or _default_folder(loaded, f"-analysis-{device}")
    analyse_run(loaded, device, path, command=_command(), overwrite=overwrite, console=out)


@app.command(cls=Command)
def validate(scenario: ScenarioFile, changes: Changes = None) -> None:
    """Check a scenario against its data and weights without running it."""
    from lightcl.preparation import prepare
    from server.aggregation import Aggregator

    loaded = load_scenario(scenario, changes or [])
    Aggregator.check(loaded.server)
    prepared = prepare(loaded)
    checked, sizes = prepared.scenario, [len(share.train) for share in prepared.shares]
    out.print(
        f"{scenario}: can be run. {amount(checked.fleet.devices, 'device')} with {min(sizes)} to {max(sizes)} training "
        f"images, {amount(checked.stream.tasks, 'task')} x "
        f"{amount(checked.stream.classes_per_task, 'class', 'classes')}, method {checked.method.name}.",
        highlight=False,
        markup=False,
    )


@app.command(cls=Command)
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="All keys with their defaults, as a table")] = False,
) -> None:
    """Print the JSON schema of a scenario, for editors."""
    sys.stdout.write(scenario_keys() if markdown else json.dumps(scenario_schema(), indent=2) + "\n")


@app.command(cls=Command)
def report(run: Annotated[Path, typer.Argument(metavar="RUN")]) -> None:
    """Rebuild the report of a run, finished or not."""
    from lightcl.records.folder import RunFolder
    from simulations.reports.page import build_report

    out.print(f"report: {build_report(RunFolder(run))}", highlight=False, markup=False, soft_wrap=True)


@app.command(cls=Command)
def footprint(
    scenario: Annotated[Path | None, typer.Argument(metavar="SCENARIO")] = None,
    changes: Changes = None,
    table1: Annotated[bool, typer.Option("--table1", help="The paper's Table 1 (without a scenario)")] = False,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods to compare, by comma; those other than the scenario's with their own defaults"),
    ] = None,
    all_methods: Annotated[bool, typer.Option("--all-methods", help="Compare all methods")] = False,
    device: Annotated[
        int | None, typer.Option("--device", min=0, help="Whose images FLOPs are counted for; default: 0")
    ] = None,
    measuring: Annotated[
        bool, typer.Option("--measure", help="Run real training steps in fresh processes and report the peak")
    ] = False,
    json_to: Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write JSON; - prints it")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE.png", help="Draw stacked bars")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing files of --json and --picture")
    ] = False,
) -> None:
    """Count FLOPs and memory of training by method, and measure memory; MiB are 2^20 bytes."""
    from simulations.commands.footprint import footprint_run, table1_run

    if table1:
        if scenario or changes or methods is not None or all_methods or measuring or picture or device is not None:
            raise RequestError(
                "--table1 is the paper's own setting: it takes no scenario and only --json and --overwrite beside it"
            )
        table1_run(json_to=json_to, overwrite=overwrite, console=err if json_to == "-" else out)
        return
    if scenario is None:
        raise RequestError("footprint: name a SCENARIO, or --table1 for the paper's setting")
    loaded = load_scenario(scenario, changes or [])
    check_device(device or 0, loaded)
    footprint_run(
        loaded, scenario, methods=methods, all_methods=all_methods, device=device or 0, measuring=measuring,
        json_to=json_to, picture=picture, overwrite=overwrite, command=_command(),
        console=err if json_to == "-" else out,
    )  # fmt: skip


@app.command(cls=Command)
def plan(
    scenario: ScenarioFile,
    budget: Annotated[float, typer.Option("--budget-mb", min=0, help="Memory for training, in MiB (2^20 bytes)")],
    changes: Changes = None,
    file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.yaml", help="Default: <name>-<budget>mb.yaml")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files of --out and --json")] = False,
    whole: Annotated[bool, typer.Option("--all", help="Print all settings, not only those around the choice")] = False,
    json_to: Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write JSON; - prints it")] = None,
) -> None:
    """Fit a LightCL scenario into a memory budget: freeze point, sparsity, batch and memory size."""
    from simulations.commands.footprint import plan_run

    loaded = load_scenario(scenario, changes or [])
    plan_run(
        loaded, scenario, budget, file=file, overwrite=overwrite, whole=whole, json_to=json_to,
        console=err if json_to == "-" else out,
    )  # fmt: skip


@app.command(cls=Command)
def pretrain(
    source: Annotated[str, typer.Option(help="digits, cifar10, cifar100, fashion-mnist, parquet or image-folder")],
    weights: Annotated[
        Path, typer.Option("--out", help="The .safetensors file to write; the model card lies beside it")
    ],
    path: Annotated[Path | None, typer.Option(help="The images, for parquet and image-folder")] = None,
    data_name: Annotated[str, typer.Option(help="What the model card calls the data; default: the path's name")] = "",
    width: Annotated[int, typer.Option(min=4)] = 20,
    stem: Annotated[str, typer.Option(help="cifar or imagenet")] = "cifar",
    image_size: Annotated[int | None, typer.Option(min=8, help="Bring all images to this size")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 12,
    batch_size: Annotated[int, typer.Option(min=2)] = 128,
    learning_rate: Annotated[float, typer.Option(help="Peak of the one-cycle schedule")] = 0.2,
    fp32: Annotated[bool, typer.Option("--fp32", help="Without bf16 autocast")] = False,
    no_flip: Annotated[bool, typer.Option("--no-flip", help="Without horizontal flips (digits, letters)")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Torch threads; default: all cores")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing weights")] = False,
) -> None:
    """Train a network on labelled images, to be frozen as the shared prefix; a killed run goes on where it was."""
    from simulations.runs import pretrain_run

    pretrain_run(
        source=source, path=path, data_name=data_name, file=weights, width=width, stem=stem, image_size=image_size,
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, fp32=fp32, flip=not no_flip, seed=seed,
        threads=threads, overwrite=overwrite, command=_command(), console=out,
    )  # fmt: skip


app.command(cls=Command)(sweep)
app.command(cls=Command)(compare)


def _default_folder(scenario: Scenario, suffix: str = "") -> Path:
    return Path("runs") / f"{scenario.name}-{scenario.seed}{suffix}"


def _command() -> str:
    return shlex.join(["lightcl", *sys.argv[1:]])


def main() -> None:
    """Entry point: turns exceptions into one screen of text and an exit code."""
    from lightcl.analysis.footprint.measured import MeasurementFailure
    from lightcl.device.training import TrainingFailure
    from lightcl.storage.state import StateError
    from server.nodes import RunStopped
    from server.rounds import RunFailure

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except RequestError as error:
        err.print(f"[red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except (RunFailure, StateError, TrainingFailure, MeasurementFailure) as error:
        err.print(f"[red]the run failed:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except (KeyboardInterrupt, RunStopped):
        _end_interrupted()
    except SystemExit as ended:
        if ended.code == 130:  # Typer turns a KeyboardInterrupt of a command into this
            _end_interrupted()
        raise


def _end_interrupted() -> None:
    advice = GOING_ON.get(sys.argv[1] if len(sys.argv) > 1 else "", "")
    err.print(f"interrupted{advice}", highlight=False)
    sys.stdout.flush()
    os._exit(130)  # Ray, shut down by a signal, aborts when the interpreter ends in the usual way


def _plain(error: Exception) -> str:
    return escape(str(error))


if __name__ == "__main__":
    main()

"""LightCL, freezing alone and plain SGD on one fleet scenario, over seeds and training lengths.

    python benchmarks/compare_methods.py lightcl/scenario/bundled/cifar10-10-devices.yaml \
        --set data.source=parquet --set data.path=PATH --epochs 5 30 --seeds 0 1 2 --out runs/compare

Every run is `lightcl simulate` with the settings shown in the table. `--devices 0 1` takes these devices of the fleet
alone, with `lightcl train`, two runs at a time: under `aggregation: none` they learn exactly what they learn in the
fleet, and a long training need not be done ten times over. A killed benchmark goes on where it was; `--only-table`
prints what there is. Figures: mean over the devices, then mean ± standard error over the seeds.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

from lightcl.records import Results, load_run

VARIANTS = {
    "LightCL": [],
    "LightCL, scale-free": ["method.preset=scale-free"],
    "LightCL, β = 0 (freezing only)": ["method.beta=0"],
    "SGD, whole network": ["method.name=sgd"],
    "LightCL-plus": ["method.name=lightcl-plus"],
    "LightCL-plus, one head for the fleet": ["method.name=lightcl-plus", "method.share_statistics=true"],
}
TOY = ["network.weights=none", "network.width=4", "stream.tasks=2", "data.image_size=8"]
FIGURES = (("til", "average_accuracy"), ("til", "forgetting"), ("cil", "average_accuracy"), ("cil", "forgetting"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", type=Path, nargs="?")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 30])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--devices", type=int, nargs="+", default=[], help="only these, without Flower")
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("--toy", action="store_true", help="a tiny scenario of its own; the figures mean nothing")
    chosen = parser.parse_args()
    if chosen.toy:
        chosen.scenario, chosen.epochs, chosen.seeds, chosen.devices = Path("quickstart"), [1], [0], [0]
        chosen.variants, chosen.changes = ["LightCL", "SGD, whole network"], TOY
    if chosen.scenario is None:
        parser.error("name a SCENARIO, or --toy")

    for epochs in chosen.epochs:
        cells = [(name, seed) for seed in chosen.seeds for name in chosen.variants]
        runs = [one for name, seed in cells for one in commands(chosen, name, epochs, seed)]
        if not chosen.only_table and not carry_out(runs, jobs=2 if chosen.devices else 1):
            return 1
        print(table(chosen, epochs), flush=True)
    return 0


def folders(chosen: argparse.Namespace, name: str, epochs: int, seed: int) -> list[Path]:
    """The run folders behind one cell of the table: the fleet's, or one a device."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", name.replace("β", "beta")).strip("-")
    stem = f"{plain}-{epochs}-epochs-seed-{seed}"
    return [Path(chosen.out) / f"{stem}{f'-device-{d}' if d >= 0 else ''}" for d in chosen.devices or [-1]]


def commands(chosen: argparse.Namespace, name: str, epochs: int, seed: int) -> list[list[str]]:
    """The runs that are not complete yet."""
    changes = [*chosen.changes, *VARIANTS[name], f"training.epochs={epochs}", f"seed={seed}"]
    settings = [part for change in changes for part in ("--set", change)]
    found = []
    for device, out in zip(chosen.devices or [-1], folders(chosen, name, epochs, seed), strict=True):
        if (out / "results.json").exists():
            continue
        kind = ["simulate"] if device < 0 else ["train", "--device", str(device)]
        command = [sys.executable, "-m", "simulations.main", *kind, str(chosen.scenario), "--out", str(out), *settings]
        found.append(command + (["--resume"] if (out / "run.json").exists() else []))
    return found


def carry_out(runs: list[list[str]], jobs: int) -> bool:
    """Runs the commands, `jobs` at a time; False where one failed."""

    def one(command: list[str]) -> int:
        print(" ".join(command), flush=True)
        return subprocess.run(command, check=False).returncode

    with ThreadPoolExecutor(jobs) as pool:
        return not any(pool.map(one, runs))


def table(chosen: argparse.Namespace, epochs: int) -> str:
    devices = f"devices {', '.join(map(str, chosen.devices))}" if chosen.devices else "all devices"
    lines = [
        f"\n{epochs} epochs a task, {chosen.scenario.name}, {devices}, percent: mean ± standard error over seeds",
        "| method | seeds | TIL | TIL forgetting | CIL | CIL forgetting | seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in chosen.variants:
        seeds = [read(folders(chosen, name, epochs, seed)) for seed in chosen.seeds]
        complete = [results for results in seeds if results]
        if complete:
            cells = [spread([fmean(mean(r, s, key) for r in results) for results in complete]) for s, key in FIGURES]
            seconds = fmean(fmean(r.seconds for r in results) for results in complete)
            lines.append(f"| {name} | {len(complete)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def read(runs: list[Path]) -> list[Results]:
    """Their results, or none where one is not complete."""
    found = [load_run(run).results if (run / "results.json").exists() else None for run in runs]
    complete = [results for results in found if results]
    return complete if len(complete) == len(runs) else []


def mean(results: Results, setting: str, key: str) -> float:
    """NaN for a setting that the method is not tested in."""
    figures = results.figures(setting)
    return float(getattr(figures, key).mean) if figures else math.nan


def spread(values: list[float]) -> str:
    error = f" ± {100 * stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.2f}{error}"


if __name__ == "__main__":
    sys.exit(main())

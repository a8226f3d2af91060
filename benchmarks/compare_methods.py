"""LightCL, freezing alone and plain SGD on one fleet scenario, over seeds and training lengths.

    python benchmarks/compare_methods.py simulations/scenarios/cifar10-10-devices.yaml \
        --set data.source=parquet --set data.path=PATH --epochs 5 30 --seeds 0 1 2 --out runs/compare

Every run is `lightcl simulate` with the settings shown in the table. A killed benchmark goes on where it was, and
`--only-table` prints what there is. Figures: mean over the devices of a run, then mean ± standard error over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

VARIANTS = {
    "LightCL": [],
    "LightCL, relative β = 0.1": ["method.reduction=relative", "method.beta=0.1"],
    "LightCL, β = 0 (freezing only)": ["method.beta=0"],
    "SGD, whole network": ["method.name=sgd"],
}
FIGURES = (("til", "average_accuracy"), ("til", "forgetting"), ("cil", "average_accuracy"), ("cil", "forgetting"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", type=Path)
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 30])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--only-table", action="store_true")
    chosen = parser.parse_args()

    for epochs in chosen.epochs:
        for seed in chosen.seeds:
            for name in chosen.variants:
                if not chosen.only_table and run(chosen, name, epochs, seed):
                    return 1
        print(table(chosen, epochs), flush=True)
    return 0


def folder(chosen: argparse.Namespace, name: str, epochs: int, seed: int) -> Path:
    plain = "".join(c if c.isalnum() else "-" for c in name.replace("β", "beta"))
    return Path(chosen.out) / f"{plain}-{epochs}-epochs-seed-{seed}"


def run(chosen: argparse.Namespace, name: str, epochs: int, seed: int) -> int:
    """One simulation; returns its exit code. One that is complete already takes no time."""
    out = folder(chosen, name, epochs, seed)
    if (out / "results.json").exists():
        return 0
    changes = [*chosen.changes, *VARIANTS[name], f"training.epochs={epochs}", f"seed={seed}"]
    command = [str(Path(sys.executable).with_name("lightcl")), "simulate", str(chosen.scenario), "--out", str(out)]
    command += [part for change in changes for part in ("--set", change)]
    if (out / "run.json").exists():
        command.append("--resume")
    print(" ".join(command), flush=True)
    return subprocess.run(command, check=False).returncode


def table(chosen: argparse.Namespace, epochs: int) -> str:
    lines = [
        f"\n{epochs} epochs a task, {chosen.scenario.name}, percent: mean ± standard error over seeds",
        "| method | seeds | TIL | TIL forgetting | CIL | CIL forgetting | seconds a run |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in chosen.variants:
        results = [
            json.loads(file.read_text())
            for seed in chosen.seeds
            if (file := folder(chosen, name, epochs, seed) / "results.json").exists()
        ]
        if results:
            cells = [spread([r[s][key]["mean"] for r in results]) for s, key in FIGURES]
            seconds = fmean(r["timing"]["seconds"] for r in results)
            lines.append(f"| {name} | {len(results)} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def spread(values: list[Any]) -> str:
    error = f" ± {100 * stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.2f}{error}"


if __name__ == "__main__":
    sys.exit(main())

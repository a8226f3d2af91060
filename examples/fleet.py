"""A simulated fleet from Python: non-iid devices whose deep layers a server averages, and what they learned.

    python examples/fleet.py
    python examples/fleet.py --devices 10 --epochs 10 --out runs/fleet

Needs the extra `simulation`: pip install -e '.[simulation]'
"""

import argparse
import tempfile
from pathlib import Path

import lightcl
from lightcl.records import RoundRow
from server.listeners import Listener
from simulations import run_fleet


class PrintRounds(Listener):
    """Is told what happens in the run; all methods of `Listener` do nothing unless they are overridden."""

    def round_finished(self, row: RoundRow) -> None:
        accuracy = "" if row.til is None else f", accuracy {row.til.mean:.2f} (task known, mean over devices)"
        print(f"round {row.round} finished{accuracy}")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--devices", type=int, default=4, help="devices of the fleet (default: %(default)s)")
    options.add_argument("--tasks", type=int, default=3, help="tasks of two digits each (default: %(default)s)")
    options.add_argument("--epochs", type=int, default=2, help="epochs per task (default: %(default)s)")
    options.add_argument("--out", type=Path, help="run folder; default: a temporary one")
    asked = options.parse_args()

    scenario = lightcl.load_scenario(
        "quickstart",
        stream={"tasks": asked.tasks},
        fleet={"devices": asked.devices, "partition": "inner-dirichlet", "alpha": 1.0},
        training={"epochs": asked.epochs},
        server={"aggregation": "suffix"},
    )
    with tempfile.TemporaryDirectory() as folder:
        run = run_fleet(scenario, asked.out or Path(folder) / "run", listeners=[PrintRounds()])

    print("\naverage accuracy per device, task known:")
    for number, matrix in run.matrices("til").items():
        print(f"device {number}: {matrix.average_accuracy():.2f}")
    assert run.results is not None  # only None while a run is in progress
    print(f"forgetting: {100 * run.results.til.forgetting.mean:.1f} points")


if __name__ == "__main__":
    main()

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
    """Receives the events of the run; override the methods of `Listener` for the events that you need."""

    def round_finished(self, row: RoundRow) -> None:
        accuracy = "" if row.til is None else f", accuracy {row.til.mean:.2f} (task known, mean over devices)"
        print(f"round {row.round} finished{accuracy}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=4, help="devices of the fleet (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=3, help="tasks of two digits each (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="epochs per task (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="run folder; default: a temporary one")
    args = parser.parse_args()

    scenario = lightcl.load_scenario(
        "quickstart",
        stream={"tasks": args.tasks},
        fleet={"devices": args.devices, "partition": "inner-dirichlet", "alpha": 1.0},
        training={"epochs": args.epochs},
        server={"aggregation": "suffix"},
    )
    with tempfile.TemporaryDirectory() as folder:
        run = run_fleet(scenario, args.out or Path(folder) / "run", listeners=[PrintRounds()])

    print("\naverage accuracy per device, task known:")
    for number, matrix in run.matrices("til").items():
        print(f"device {number}: {matrix.average_accuracy():.2f}")
    assert run.results is not None  # only None while a run is in progress
    print(f"forgetting: {100 * run.results.til.forgetting.mean:.1f} points")


if __name__ == "__main__":
    main()

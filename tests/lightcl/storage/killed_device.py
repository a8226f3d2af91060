"""Run by test_device.py in a process of its own: a device that hangs in the middle of an epoch, to be killed there.

python -m tests.lightcl.killed_device FOLDER SECTIONS-AS-JSON
"""

import json
import signal
import sys
from pathlib import Path

import torch

from lightcl.data.tasks import TaskContext
from tests.lightcl import toys

HANG_IN = (1, 2)
"""Task and epoch (0-based), after its second step."""


def main(folder: Path, sections: dict[str, dict[str, object]]) -> None:
    torch.set_num_threads(1)
    device = toys.device(folder, **sections)
    steps = 0

    def report(task: int, epochs: int, _: float) -> None:
        nonlocal steps
        steps = 0
        sys.stdout.write(f"{task} {epochs}\n")
        sys.stdout.flush()

    def count(_: object, context: TaskContext) -> None:
        nonlocal steps
        steps += 1
        if (context.task.id, device.position.epochs, steps) == (*HANG_IN, 2):
            sys.stdout.write("hanging\n")
            sys.stdout.flush()
            signal.pause()

    device.method.after_step = count
    for task in range(len(device.stream)):
        device.train(task, device.scenario.training.epochs, report)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

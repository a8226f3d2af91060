"""A continual-learning method in one file: SGD with a penalty on changes of the head since the previous task.

Run it on one device, against plain SGD:

    python examples/a_new_method.py

Or use the same file as a plugin of the command line, on one device or on a fleet:

    lightcl train quickstart --plugin examples/a_new_method.py --set method.name=hold-head
    lightcl simulate quickstart --plugin examples/a_new_method.py --set method.name=hold-head --set method.strength=10

docs/tutorials/own-method.md explains it step by step.
"""

import argparse
from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

import lightcl
from lightcl.data.tasks import Batch, TaskContext


class HoldHeadParameters(lightcl.MethodParameters):
    """The keys of the scenario's section `method`: types and bounds are checked before a run starts."""

    name: Literal["hold-head"] = "hold-head"
    strength: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the penalty."""


@lightcl.register(HoldHeadParameters)
class HoldHead(lightcl.Method):
    """loss = CE + strength / 2 * ||head - head after the previous task||^2"""

    parameters: HoldHeadParameters
    anchor: Tensor | None = None

    def loss(self, batch: Batch, context: TaskContext) -> Tensor:
        loss = super().loss(batch, context)
        if self.anchor is not None:
            change = self.network.head.weight - self.anchor
            loss = loss + self.parameters.strength / 2 * change.square().sum()
        return loss

    def end_task(self, context: TaskContext) -> None:
        self.anchor = self.network.head.weight.detach().clone()

    # Everything that a restarted device needs, as tensors.
    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.anchor is None else {"anchor": self.anchor}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.anchor = state.get("anchor")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, default=5, help="tasks of two digits each (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs per task (default: %(default)s)")
    parser.add_argument("--strength", type=float, default=10.0, help="weight of the penalty (default: %(default)s)")
    args = parser.parse_args()

    sizes = {"stream.tasks": args.tasks, "training.epochs": args.epochs}
    for method in ({"name": "sgd"}, {"name": "hold-head", "strength": args.strength}):
        scenario = lightcl.load_scenario("quickstart", sizes, method=method)
        with lightcl.open_device(scenario) as device:
            for task in device.tasks:
                device.learn(task)
                device.evaluate()
            accuracies = [device.matrix(setting).average_accuracy() for setting in ("til", "cil")]
        print("{:10} task known {:.2f}   task not known {:.2f}".format(method["name"], *accuracies))


if __name__ == "__main__":
    main()

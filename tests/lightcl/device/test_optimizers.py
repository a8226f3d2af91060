"""The steps of the optimizers equal PyTorch's own, and a device does without PyTorch's compiler."""

import subprocess
import sys

import pytest
import torch

from lightcl.device.optimizers import make_optimizer, step
from tests.lightcl import toys

SETTINGS = [{"momentum": 0.9, "weight_decay": 0.01}, {"optimizer": "adam"}, {"optimizer": "adamw"}]


@pytest.mark.parametrize("training", SETTINGS)
def test_a_step_equals_that_of_pytorch(training):
    def weights_after(one_step):
        scenario = toys.scenario(training=training)
        method = scenario.method.build(toys.network())
        optimizer = make_optimizer(method, scenario)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for parameter in method.trainable().values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            one_step(optimizer)
        return {name: parameter.detach() for name, parameter in method.trainable().items()}

    toys.assert_same(weights_after(step), weights_after(lambda optimizer: optimizer.step()))


PROGRAM = """
import sys, torch
from lightcl.device.optimizers import make_optimizer, step
from tests.lightcl import toys

scenario = toys.scenario(training={"optimizer": sys.argv[1]})
method = scenario.method.build(toys.network())
optimizer = make_optimizer(method, scenario)
for parameter in method.trainable().values():
    parameter.grad = torch.ones_like(parameter)
step(optimizer)
optimizer.zero_grad(set_to_none=True)
optimizer.load_state_dict(optimizer.state_dict())
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_device_does_not_import_the_compiler(optimizer):
    finished = subprocess.run([sys.executable, "-c", PROGRAM, optimizer], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "False"

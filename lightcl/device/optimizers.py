"""The optimizer of a device, and its two ways to step.

PyTorch's optimizers import its compiler, `torch._dynamo`, when they are built and again in every step. The import takes
1.5 s and 80 MB in every process that trains, and a device compiles nothing, so it is left out here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._compile
from torch import Tensor

from lightcl.methods import Method
from lightcl.scenario import Scenario


def make_optimizer(method: Method, scenario: Scenario) -> torch.optim.Optimizer:
    """`training.optimizer` over all parameters that the method trains, in the order of `method.trainable()`."""
    _leave_out_the_compiler()
    training = scenario.training
    parameters = list(method.trainable().values())
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay
        )
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)


def step(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` without its wrappers, which run hooks (a device has none) and call the compiler.

    Plain SGD is one call here: PyTorch's takes as long to sort the parameters into lists as to add to them.
    """
    with torch.no_grad():
        if type(optimizer) is not torch.optim.SGD or any(
            group["momentum"] or group["weight_decay"] or group["maximize"] for group in optimizer.param_groups
        ):
            inspect.unwrap(type(optimizer).step)(optimizer)
            return
        for group in optimizer.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            if moved:
                torch._foreach_add_(moved, [parameter.grad for parameter in moved], alpha=-group["lr"])


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.zero_grad(set_to_none=True)` without its wrapper, which takes longer than the work."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


@contextmanager
def updates_at_once(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside a `with`, the backward pass updates each parameter by plain SGD as soon as its gradient is complete.

    Autograd calls the hook of a parameter after the last operation that used it, so the update changes nothing that the
    backward pass still reads, and the gradient is released before the next one is computed. The update is that of
    torch.optim.SGD without momentum: p ← p - lr (g + weight decay · p).
    """
    handles = []
    for group in optimizer.param_groups:
        rate, decay = group["lr"], group["weight_decay"]

        @torch.no_grad()
        def step(parameter: Tensor, rate: float = rate, decay: float = decay) -> None:
            gradient = parameter.grad
            if gradient is None:
                return
            parameter.grad = None
            if decay:
                gradient = gradient.add(parameter, alpha=decay)
            parameter.add_(gradient, alpha=-rate)

        handles += [parameter.register_post_accumulate_grad_hook(step) for parameter in group["params"]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _leave_out_the_compiler() -> None:
    """Let the optimizers' methods be called without importing the compiler first.

    `torch._disable_dynamo` wraps a method so that the compiler, once it is there, passes over it; the wrapper looks for
    its result in the attribute `__dynamo_disable` of the method, and without a compiler that is the method itself. In a
    version of PyTorch that does this in another way, nothing happens here and the import takes place.
    """
    for wrapper in vars(torch.optim.Optimizer).values():
        if not inspect.isfunction(wrapper) or wrapper.__code__.co_filename != inspect.getfile(torch._compile):
            continue
        method = inspect.unwrap(wrapper)
        if not hasattr(method, "__dynamo_disable"):
            setattr(method, "__dynamo_disable", method)

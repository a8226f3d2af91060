"""Whether an accelerator computes: one step of a small network on it, compared with the CPU's in double precision."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional

from lightcl.errors import RequestError

_TOLERANCE = 1e-3
"""Of the largest number. fp32 stays below 1e-5; a kernel built for another GPU is wrong altogether."""


def check_kernels(device: torch.device) -> str:
    """Runs convolution, batch-norm, ReLU and a linear layer forward and backward; returns what was found, in words.

    Raises RequestError where the accelerator does not compute, or computes wrong numbers.
    """
    expected = _step(torch.device("cpu"), torch.float64)
    try:
        found = _step(device, torch.float32)
    except RuntimeError as error:
        raise RequestError(
            f"{device}: the accelerator does not compute ({_first_line(error)}); install a PyTorch built for this "
            "machine's GPU, or set accelerator to cpu"
        ) from error
    difference = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
    if not difference < _TOLERANCE:  # also where it is not a number
        raise RequestError(
            f"{device}: wrong results of a training step (relative difference {difference:.1e} from the CPU); "
            "install a PyTorch built for this machine's GPU, or set accelerator to cpu"
        )
    return f"a training step differs by {difference:.0e} from the CPU's in double precision"


def memory_text(device: torch.device) -> str:
    """The device's name, and its free and total memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
    else:
        page = os.sysconf("SC_PAGE_SIZE")
        free, total = page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")
        name = f"cpu, {os.cpu_count()} cores"
    return f"{name}; {free / 1e6:.0f} of {total / 1e6:.0f} MB memory free"


def _step(device: torch.device, kind: torch.dtype) -> list[Tensor]:
    """The loss and all gradients, on the CPU."""
    draw = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, kind)

    images, labels = tensor(8, 3, 16, 16), torch.arange(8, device=device) % 4
    weights = [tensor(8, 3, 3, 3), tensor(8), tensor(8), tensor(4, 8)]
    for weight in weights:
        weight.requires_grad_()
    kernel, scale, shift, head = weights
    maps = functional.conv2d(images, kernel, padding=1)
    maps = functional.relu(functional.batch_norm(maps, None, None, scale, shift, training=True))
    loss = functional.cross_entropy(functional.linear(maps.mean((2, 3)), head), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return [loss.detach().cpu(), *(weight.grad.cpu() for weight in weights if weight.grad is not None)]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]

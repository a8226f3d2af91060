"""Batch-norm, shortcut and ReLU in C: against PyTorch's in fp64, for every length of a vector."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lightcl.methods.parts.batch_norm import split_statistics
from lightcl.networks.native import NativeBatchNorm2d, library, use_native_
from lightcl.networks.staged import Stage
from lightcl.networks.unit import activated
from tests.lightcl import toys
from tests.lightcl.networks.exact import distance, maps
from tests.lightcl.networks.native.vectors import STRICT, VECTORS

BOUND = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
COUNT = 5
"""Samples of the batch; the others are memory samples."""


def norms(channels: int, training: bool) -> tuple[NativeBatchNorm2d, nn.BatchNorm2d]:
    """One in C, and PyTorch's in fp64 with the same numbers."""
    torch.manual_seed(1)
    exact = nn.BatchNorm2d(channels).train(training)
    assert exact.running_mean is not None
    assert exact.running_var is not None
    nn.init.uniform_(exact.weight, 0.5, 2)
    nn.init.normal_(exact.bias)
    exact.running_mean.normal_()
    exact.running_var.uniform_(0.5, 2)
    native = copy.deepcopy(exact)
    use_native_(nn.Sequential(native))
    assert isinstance(native, NativeBatchNorm2d)
    return native, exact.double()


def everything(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None, split: str | None, relu: bool) -> list[Tensor]:
    """The result, the gradients of all that goes in, and the running statistics."""
    x = x.detach().requires_grad_()
    wanted = [x, norm.weight, norm.bias]
    if shortcut is not None:
        shortcut = shortcut.detach().requires_grad_()
        wanted.append(shortcut)
    stage = Stage({}, {"norm": norm}, ())
    with split_statistics(stage, COUNT, "train" if split == "train" else "eval") if split else nullcontext():
        y = activated(norm, x, shortcut) if relu else norm(x)
    gradient = maps(*y.shape, seed=9).detach().to(y.dtype)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return [y.detach(), *torch.autograd.grad(y, wanted, gradient), norm.running_mean, norm.running_var]


@toys.needs_compiler
@pytest.mark.parametrize("flags", VECTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_it_computes_what_pytorch_does(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], dtype: torch.dtype, training: bool
) -> None:
    monkeypatch.setattr(library, "FLAGS", (*STRICT, *flags))
    for channels, side in ((3, 5), (20, 8), (16, 4), (160, 4), (77, 3)):  # rows of one position, and of several
        shape = (7, channels, side, side)
        x, shortcut = (maps(*shape, seed=seed).detach() * 2 + 3 for seed in (2, 3))
        x, shortcut = x.to(dtype), shortcut.to(dtype)
        for split in (None, "eval", "train"):
            for relu, added in ((False, None), (True, None), (True, shortcut)):
                native, exact = norms(channels, training)
                given = everything(native, x, added, split, relu)
                expected = everything(exact, x.double(), None if added is None else added.double(), split, relu)
                for one, other in zip(given, expected, strict=True):
                    assert distance(one.double(), other) < BOUND[dtype], (channels, split, relu, added is None)
                assert given[0].dtype == dtype
                assert given[0].is_contiguous(memory_format=torch.channels_last)
                assert native.num_batches_tracked == exact.num_batches_tracked


@toys.needs_compiler
def test_two_numbers_by_hand() -> None:
    """1 and 3: mean 2, variance 1, and 2 for the running one, which is unbiased."""
    norm, _ = norms(1, training=True)
    with torch.no_grad():
        norm.weight.fill_(3)
        norm.bias.fill_(1)
    norm.eps, norm.momentum = 0.0, 0.5
    norm.running_mean, norm.running_var = torch.zeros(1), torch.zeros(1)
    y = activated(norm, torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
    assert y.flatten().tolist() == [0, 4]  # -2 and 4 before ReLU
    assert (norm.running_mean.item(), norm.running_var.item()) == (1, 1)


@toys.needs_compiler
def test_a_large_mean_costs_no_accuracy() -> None:
    native, exact = norms(3, training=True)
    x = maps(64, 3, 8, 8).detach() + 1000
    assert distance(native(x).double(), exact(x.double())) < 1e-4


@toys.needs_compiler
@pytest.mark.parametrize("channels", [20, 160])
def test_the_number_of_threads_changes_nothing(channels: int) -> None:
    x, shortcut = maps(47, channels, 4, 4).detach(), maps(47, channels, 4, 4, seed=4).detach()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(everything(norms(channels, True)[0], x, shortcut, "eval", True))
    for one, other in pairwise(found):
        assert all(map(torch.equal, one, other))


@toys.needs_compiler
def test_nan_stays_nan() -> None:
    native, _ = norms(4, training=False)
    x = torch.zeros(2, 4, 4, 4)
    x[1, 2, 3, 3] = torch.nan
    assert activated(native, x).isnan().sum() == 1


@toys.needs_compiler
def test_one_value_per_channel_has_no_variance() -> None:
    native, _ = norms(4, training=True)
    with pytest.raises(ValueError, match=r"more than one value per channel in training, not \(1, 4, 1, 1\)"):
        native(torch.zeros(1, 4, 1, 1))
    assert native.num_batches_tracked == 0


@toys.needs_compiler
@pytest.mark.parametrize("split", [None, "eval", "train"])
def test_others_are_computed_by_pytorch(split: str | None) -> None:
    """In fp64, as on a GPU, and with a cumulative average as the running statistics."""
    x, shortcut = maps(7, 4, 4, 4).detach().double(), maps(7, 4, 4, 4, seed=1).detach().double()
    for momentum in (0.1, None):
        native, exact = norms(4, training=True)
        native.double()
        native.momentum = exact.momentum = momentum
        given, expected = (everything(norm, x, shortcut, split, True) for norm in (native, exact))
        assert all(map(torch.equal, given, expected))


@toys.needs_compiler
def test_no_samples_move_no_statistics() -> None:
    native, _ = norms(4, training=True)
    assert native.running_mean is not None
    before = native.running_mean.clone()
    assert native(torch.zeros(0, 4, 2, 2)).shape == (0, 4, 2, 2)
    assert torch.equal(native.running_mean, before)

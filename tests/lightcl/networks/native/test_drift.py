"""The squared drift in C: against PyTorch's operations, and by hand."""

from __future__ import annotations

import pytest
import torch

from lightcl.methods.parts.feature_memory import _SquaredDrift
from lightcl.networks.native import NativeSquaredDrift, library
from tests.lightcl import toys
from tests.lightcl.networks.exact import distance, maps
from tests.lightcl.networks.native.vectors import STRICT, VECTORS


@toys.needs_compiler
@pytest.mark.parametrize("flags", VECTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_that_of_pytorchs_operations(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(library, "FLAGS", (*STRICT, *flags))
    vital, then = torch.tensor([0, 3, 6]), torch.randn(3, 3, 4, 5, generator=torch.Generator().manual_seed(5))
    then = then.contiguous(memory_format=torch.channels_last)
    found = []
    for kind in (NativeSquaredDrift, _SquaredDrift):
        feature_map = maps(8, 7, 4, 5).detach().to(dtype).requires_grad_()
        drift = kind.apply(feature_map, vital, then, 5)
        (gradient,) = torch.autograd.grad(drift, feature_map, torch.tensor(0.3))
        assert drift.dtype == torch.float32
        assert gradient.dtype == dtype
        assert gradient.is_contiguous(memory_format=torch.channels_last)
        found.append((drift, gradient))
    (drift, gradient), (exact_drift, exact_gradient) = found
    assert distance(drift, exact_drift) < 1e-6
    assert distance(gradient.float(), exact_gradient.float()) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert not gradient[:5].any()
    assert not gradient[5:, [1, 2, 4, 5]].any()


@toys.needs_compiler
def test_one_number_by_hand() -> None:
    """(3 - 1)² = 4, whose derivative is 2 (3 - 1) = 4; the other channel is not vital."""
    feature_map = torch.tensor([[[[5.0]], [[3.0]]]], requires_grad=True)
    drift = NativeSquaredDrift.apply(feature_map, torch.tensor([1]), torch.ones(1, 1, 1, 1), 0)
    assert drift == 4
    assert torch.autograd.grad(drift, feature_map)[0].flatten().tolist() == [0, 4]

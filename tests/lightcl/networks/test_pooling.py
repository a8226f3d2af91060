import pytest
import torch
from torch import Tensor

from lightcl.networks.pooling import global_average

LAYOUTS = [torch.channels_last, torch.contiguous_format]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("side", [1, 4, 7])
def test_value_and_gradient_are_those_of_the_mean_to_the_bit(
    layout: torch.memory_format, dtype: torch.dtype, side: int
) -> None:
    values = torch.randn(5, 16, side, side).to(dtype).contiguous(memory_format=layout)
    weights = torch.randn(5, 16).to(dtype)

    def both(ours: bool) -> tuple[Tensor, Tensor]:
        feature_map = values.clone().requires_grad_()
        pooled = global_average(feature_map) if ours else feature_map.mean((2, 3))
        (pooled * weights).sum().backward()
        assert feature_map.grad is not None
        return pooled, feature_map.grad

    assert all(torch.equal(one, other) for one, other in zip(both(True), both(False), strict=True))


def test_the_gradient_has_the_maps_memory_format() -> None:
    feature_map = torch.randn(3, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    gradients: list[Tensor] = []
    between = feature_map * 1
    between.register_hook(gradients.append)  # type: ignore[no-untyped-call]
    global_average(between).sum().backward()
    (gradient,) = gradients
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert not gradient.is_contiguous()


def test_the_gradient_is_that_of_finite_differences() -> None:
    feature_map = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(global_average, (feature_map,))

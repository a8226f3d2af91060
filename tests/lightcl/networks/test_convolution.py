from copy import deepcopy
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from lightcl.networks.convolution import Conv1x1, Conv3x3, by_product, use_products_, weight_gradient
from lightcl.networks.resnet import StagedResNet
from lightcl.networks.winograd import use_winograd_

LAYOUTS = [torch.channels_last, torch.contiguous_format]


def test_weight_gradient_by_hand() -> None:
    """A 2x2 map, one output: the patch is the map with a border of zeros to the left and on top."""
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    gradient = torch.tensor([[[[10.0]]]])
    assert weight_gradient(x, gradient, stride=2).tolist() == [[[[0, 0, 0], [0, 10, 20], [0, 30, 40]]]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", [1, 7, 8])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_weight_gradient_agrees_with_pytorchs(layout: torch.memory_format, side: int, stride: int) -> None:
    x = torch.randn(5, 6, side, side, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(8, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    result = torch.conv2d(x, weight, None, stride, 1)
    gradient = torch.randn_like(result).contiguous(memory_format=layout)
    result.backward(gradient)  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert torch.allclose(weight_gradient(x, gradient, stride), weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2])
def test_in_bf16_all_gradients_are_as_exact_as_pytorchs(layout: torch.memory_format, stride: int) -> None:
    """Measured against fp64 on the same rounded inputs; a bf16 number has a relative error of up to 1/256."""
    x = torch.randn(4, 16, 4 * stride, 4 * stride).bfloat16().contiguous(memory_format=layout)
    ours = Conv3x3(16, 32, stride).to(memory_format=layout)
    with torch.no_grad():
        ours.weight.copy_(ours.weight.bfloat16())
    gradient = torch.randn(4, 32, 4, 4).bfloat16()

    def gradients(convolution: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        maps = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            result: Tensor = convolution(maps)
        of_maps, of_weight = torch.autograd.grad(result, (maps, convolution.weight), gradient.to(dtype))  # type: ignore[arg-type]
        return result.double(), of_maps.double(), of_weight.double()

    plain = nn.Conv2d(16, 32, 3, stride, 1, bias=False).to(memory_format=layout)
    plain.load_state_dict(ours.state_dict())
    exact = gradients(plain.double(), torch.float64)
    for one, true in zip(gradients(ours, torch.bfloat16), exact, strict=True):
        assert (one - true).abs().max() <= true.abs().max() / 256
    assert not torch.equal(gradients(ours, torch.bfloat16)[2], exact[2])  # it did round


def test_it_is_pytorchs_convolution_outside_bf16_training() -> None:
    ours = Conv3x3(4, 8, 2)
    x = torch.randn(2, 4, 8, 8)
    assert not chosen(ours, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(ours, x)
        with torch.no_grad():
            assert torch.equal(ours(x), torch.conv2d(x, ours.weight, None, 2, 1))


@pytest.mark.parametrize(
    ("stride", "side", "expected"), [(1, 4, True), (1, 5, False), (2, 8, True), (2, 16, True), (2, 17, False)]
)
def test_only_small_maps_are_computed_by_a_product(stride: int, side: int, expected: bool) -> None:
    """At most 4x4 outputs, with a stride at most 8x8: a side of 17 and a stride of 2 give 9."""
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(Conv3x3(4, 8, stride), torch.randn(2, 4, side, side)) is expected
    assert by_product(((side - 1) // stride + 1) ** 2, stride) is expected


def test_winograds_convolution_is_the_same_in_bf16() -> None:
    stage = nn.Sequential(Conv3x3(64, 64))
    assert use_winograd_(stage) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(stage[0], torch.randn(2, 64, 4, 4))


def test_passes_of_a_step_share_one_copy_of_the_weight() -> None:
    """As in autocast; the copy is gone with the last graph, and an update makes a new one."""
    ours = Conv3x3(4, 8)
    x = torch.randn(2, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = ours(x), ours(x)
        assert saved_weight(first) is saved_weight(second)
        copy = ref(saved_weight(first))
        (first.sum() + second.sum()).backward()
        del first, second
        assert copy() is None
        before = ours(x)
        with torch.no_grad():
            ours.weight.add_(1)
        assert saved_weight(before) is not saved_weight(ours(x))
        assert torch.equal(saved_weight(ours(x)), ours.weight.bfloat16())


def test_a_copied_module_rounds_its_own_weight() -> None:
    ours, x = Conv3x3(4, 8), torch.randn(2, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        result = ours(x)
        other = deepcopy(ours)
        assert saved_weight(other(x)) is not saved_weight(result)
        assert torch.equal(other(x), result)


def test_a_1x1_convolution_by_hand() -> None:
    """Two channels to one, of a 3x3 map with a stride of 2: the corners are met."""
    ours = Conv1x1(2, 1, 2).to(memory_format=torch.channels_last)
    with torch.no_grad():
        ours.weight.copy_(torch.tensor([1.0, 10.0]).view(1, 2, 1, 1))
    numbers = torch.arange(18.0).view(1, 2, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    result = ours(numbers)
    assert result.tolist() == [[[[90, 112], [156, 178]]]]
    of_maps, of_weight = torch.autograd.grad(result, (numbers, ours.weight), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    assert of_weight.flatten().tolist() == [0 * 1 + 2 * 2 + 6 * 3 + 8 * 4, 9 * 1 + 11 * 2 + 15 * 3 + 17 * 4]
    assert of_maps.tolist() == [[[[1, 0, 2], [0, 0, 0], [3, 0, 4]], [[10, 0, 20], [0, 0, 0], [30, 0, 40]]]]


@pytest.mark.parametrize("side", [1, 7, 8])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_1x1_convolution_agrees_with_pytorchs(layout: torch.memory_format, stride: int, side: int) -> None:
    x = (
        torch.randn(5, 6, side, side, dtype=torch.float64)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
    )
    ours = Conv1x1(6, 8, stride).double().to(memory_format=layout)
    plain = torch.conv2d(x, ours.weight, None, stride)
    gradient = torch.randn_like(plain)
    for arriving in (gradient, gradient.contiguous()):
        expected = torch.autograd.grad(plain, (x, ours.weight), arriving, retain_graph=True)
        result = ours(x)
        assert "OverPositions" in str(result.grad_fn)
        assert result.is_contiguous(memory_format=torch.channels_last)
        given = torch.autograd.grad(result, (x, ours.weight), arriving)
        for one, other in zip((result, *given), (plain, *expected), strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_1x1_convolution_in_bf16_is_as_exact_as_pytorchs() -> None:
    x = torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    ours = Conv1x1(16, 32, 2).to(memory_format=torch.channels_last)
    with torch.no_grad():
        ours.weight.copy_(ours.weight.bfloat16())
        x.copy_(x.bfloat16())
    exact = torch.conv2d(x.double(), ours.weight.double(), None, 2)
    of_exact = torch.autograd.grad(exact, (x, ours.weight), torch.ones_like(exact))
    with torch.autocast("cpu", torch.bfloat16):
        result = ours(x)
    assert result.dtype == torch.bfloat16
    of_result = torch.autograd.grad(result, (x, ours.weight), torch.ones_like(result))
    for one, true in zip((result, *of_result), (exact, *of_exact), strict=True):
        assert (one.double() - true.double()).abs().max() <= true.abs().max() / 128
    assert of_result[1].dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_1x1_convolution_that_is_not_trained_is_pytorchs(layout: torch.memory_format) -> None:
    """So are those of exported models. A map that is not channels-last stays so."""
    ours, x = Conv1x1(4, 8, 2), torch.randn(2, 4, 8, 8).contiguous(memory_format=layout)
    with torch.no_grad():
        expected = torch.conv2d(x, ours.weight, None, 2)
        assert torch.equal(ours(x), expected)
    assert ("OverPositions" in str(ours(x).grad_fn)) == (layout == torch.channels_last)
    ours.requires_grad_(False)
    assert "OverPositions" not in str(ours(x.requires_grad_()).grad_fn)
    assert deepcopy(ours).weight is not ours.weight


def test_plain_1x1_convolutions_become_products() -> None:
    """Not those with a bias or of groups. The parameters stay the same objects."""
    plain = nn.Conv2d(4, 8, 1, 2, bias=False).to(memory_format=torch.channels_last)
    stage = nn.Sequential(plain, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, groups=2, bias=False), Conv3x3(8, 8))
    weight, x = plain.weight, torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    expected = plain(x)
    use_products_(stage)
    assert [type(module) is Conv1x1 for module in stage] == [True, False, False, False]
    assert plain.weight is weight
    assert "OverPositions" in str(plain(x).grad_fn)
    assert torch.allclose(plain(x), expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(x).dtype == torch.bfloat16


def saved_weight(result: Tensor) -> Tensor:
    weight: Tensor = result.grad_fn.saved_tensors[1]  # type: ignore[union-attr]
    return weight


def chosen(convolution: nn.Module, x: Tensor) -> bool:
    return "ByProduct" in str(convolution(x).grad_fn)


@pytest.mark.parametrize("name", ["layer4.0.conv1", "layer4.1.conv2"])
def test_the_weights_gradient_lies_in_memory_as_the_weights_do(name: str) -> None:
    """Otherwise autograd copies it."""
    network = StagedResNet(width=4).to(memory_format=torch.channels_last)
    convolution = network.get_submodule(name)
    assert isinstance(convolution, Conv3x3)
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.rand(3, 3, 32, 32)).sum().backward()
    assert convolution.weight.grad is not None
    assert convolution.weight.grad.stride() == convolution.weight.stride()

"""Convolutions in bf16 as products of entire matrices: against PyTorch in fp64, by hand, and where they are chosen."""

from __future__ import annotations

import copy
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightcl.networks.native import convolution as module
from lightcl.networks.native import library, use_native_
from lightcl.networks.native.products import col2im, convolved, im2col, transposed
from tests.lightcl import toys
from tests.lightcl.networks.exact import distance, native_convolution
from tests.lightcl.networks.native.vectors import STRICT, VECTORS

pytestmark = toys.needs_compiler
SHAPES = [(1, 1, 1, 1), (3, 5, 4, 4), (2, 33, 7, 10), (47, 80, 8, 8), (5, 16, 3, 16)]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def this_machine_multiplies_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products are PyTorch's and right on every machine; only their speed depends on it."""
    monkeypatch.setattr(module, "has_amx", lambda: True)


def whole(*shape: int, seed: int = 0, most: int = 3) -> Tensor:
    """Small whole numbers, which bf16 and sums of them in fp32 hold exactly; channels-last."""
    drawn = torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).to(BF16)
    return drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn


def test_a_patch_by_hand() -> None:
    """A 2x2 map of two channels, one output: zeros to the left and on top."""
    maps = torch.tensor([[[[1, 2], [3, 4]], [[10, 20], [30, 40]]]], dtype=BF16)
    maps = maps.contiguous(memory_format=torch.channels_last)
    rows = im2col(maps, 2)
    assert rows.tolist() == [[0] * 8 + [1, 10, 2, 20, 0, 0, 3, 30, 4, 40]]
    back = torch.empty_like(maps)
    col2im(2 * rows, back, 2)
    assert torch.equal(back, 2 * maps)


@pytest.mark.parametrize("flags", VECTORS)
@pytest.mark.parametrize("threads", [1, 3])
def test_patches_are_pytorchs(monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], threads: int) -> None:
    monkeypatch.setattr(library, "FLAGS", (*STRICT, *flags))
    torch.set_num_threads(threads)
    for n, channels, height, width in SHAPES:
        for stride in (1, 2, 3):
            maps = whole(n, channels, height, width)
            exact = F.unfold(maps.float(), 3, padding=1, stride=stride)  # [N, C·9, outputs]
            rows = im2col(maps, stride)
            assert torch.equal(rows.float(), exact.view(n, channels, 9, -1).permute(0, 3, 2, 1).reshape(rows.shape))
            given, back = whole(*rows.shape, seed=1), torch.full_like(maps, torch.nan)
            col2im(given, back, stride)
            columns = given.float().view(n, -1, 9, channels).permute(0, 3, 2, 1).reshape(n, channels * 9, -1)
            assert torch.equal(back.float(), F.fold(columns, (height, width), 3, padding=1, stride=stride))


@pytest.mark.parametrize("flags", VECTORS)
def test_a_matrix_is_transposed(monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]) -> None:
    monkeypatch.setattr(library, "FLAGS", (*STRICT, *flags))
    for shape in ((1, 1), (16, 16), (33, 5), (5, 33), (752, 160)):
        rows = whole(*shape, most=100)
        assert torch.equal(transposed(rows), rows.t())
    special = torch.tensor([[torch.inf, -torch.inf, -0.0, 1e-40, 3.3e38]], dtype=BF16)
    assert torch.equal(transposed(special).view(torch.int16), special.t().view(torch.int16))
    assert transposed(torch.full((3, 2), torch.nan, dtype=BF16)).isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_results_and_gradients_are_exact_where_bf16_is(
    shape: tuple[int, ...], stride: int, layout: torch.memory_format
) -> None:
    """Sums of up to 9·80 products stay below 256 in absolute value here, which bf16 holds exactly."""
    x = whole(*shape, most=1).contiguous(memory_format=layout).requires_grad_()
    weight = (whole(7, shape[1], 3, 3, seed=2, most=1) * (whole(7, shape[1], 3, 3, seed=3) == 0)).requires_grad_()
    result = convolved(x, weight, stride)
    gradient = whole(*result.shape, seed=4, most=1).contiguous(memory_format=layout)
    given = result, *torch.autograd.grad(result, (x, weight), gradient)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = F.conv2d(exact_x, exact_weight, stride=stride, padding=1)
    expected = exact, *torch.autograd.grad(exact, (exact_x, exact_weight), gradient.double())
    assert result.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(given, expected, strict=True):
        assert one.dtype == BF16
        assert torch.equal(one.double(), other.to(BF16).double())


@pytest.mark.parametrize("stride", [1, 2])
def test_results_are_rounded_once_and_the_gradient_of_maps_twice(stride: int) -> None:
    """The latter is a sum of up to nine products, each of which is rounded as well."""
    torch.manual_seed(0)
    x = torch.randn(8, 40, 8, 8).to(BF16).requires_grad_()
    weight = torch.randn(70, 40, 3, 3).to(BF16).requires_grad_()
    result = convolved(x, weight, stride)
    gradient = torch.randn(result.shape).to(BF16)
    given = result, *torch.autograd.grad(result, (x, weight), gradient)
    doubles = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.conv2d(*doubles, stride=stride, padding=1)
    expected = exact, *torch.autograd.grad(exact, doubles, gradient.double())
    for one, other, bound in zip(given, expected, (2**-8, 2**-7, 2**-8), strict=True):
        assert distance(one.double(), other) < bound


def test_only_wanted_gradients_are_computed() -> None:
    x, weight = whole(2, 3, 4, 4), whole(5, 3, 3, 3, seed=1)
    (of_weight,) = torch.autograd.grad(convolved(x, weight.requires_grad_(), 1).sum(), weight)
    assert of_weight.shape == weight.shape
    weight = weight.detach()
    (of_x,) = torch.autograd.grad(convolved(x.requires_grad_(), weight, 1).sum(), x)
    assert of_x.shape == x.shape


# -- in a network ------------------------------------------------------------------------------------------------------


def multiplied(convolution: nn.Conv2d, x: Tensor) -> bool:
    with torch.autocast("cpu", BF16):
        return "_Product" in str(convolution(x).grad_fn)


@pytest.mark.parametrize(
    ("stride", "side", "expected"), [(1, 4, True), (1, 5, False), (1, 8, False), (2, 16, True), (2, 17, False)]
)
def test_small_maps_are_computed_so(stride: int, side: int, expected: bool) -> None:
    assert multiplied(native_convolution(3, 7, stride), torch.randn(2, 3, side, side)) is expected


def test_only_in_bf16_and_only_where_the_processor_multiplies_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution, x = native_convolution(3, 7), torch.randn(2, 3, 4, 4)
    assert "_Product" not in str(convolution(x).grad_fn)
    assert multiplied(convolution, x)
    monkeypatch.setattr(module, "has_amx", lambda: False)
    assert not multiplied(convolution, x)


def test_a_test_computes_as_training_does() -> None:
    """A method that holds a map to its recorded value would see another rounding."""
    convolution, x = native_convolution(33, 70, 2), torch.randn(9, 33, 8, 8)
    with torch.autocast("cpu", BF16):
        trained = convolution(x)
        with torch.no_grad():
            assert torch.equal(convolution(x), trained)
        convolution.weight.requires_grad_(False)
        assert torch.equal(convolution(x), trained)


def test_passes_of_a_step_share_one_copy_of_the_weight() -> None:
    convolution, x = native_convolution(3, 7), torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", BF16):
        with torch.no_grad():
            convolution(x)  # keeps no copy that a graph could not use
        first, second = convolution(x), convolution(x)
        copies = [result.grad_fn.saved_tensors[1] for result in (first, second)]
        assert copies[0] is copies[1]
        alive = ref(copies[0])
        del copies
        (first.sum() + second.sum()).backward()
        assert convolution.weight.grad is not None
        assert convolution.weight.grad.dtype == torch.float32
        del first, second
        assert alive() is None


def test_no_maps_have_no_gradient() -> None:
    convolution = native_convolution(3, 7)
    with torch.autocast("cpu", BF16):
        (of_weight,) = torch.autograd.grad(convolution(torch.randn(0, 3, 4, 4)).sum(), convolution.weight)
    assert not of_weight.any()


def test_the_gradients_of_a_network_are_as_exact_as_with_pytorchs_convolutions() -> None:
    """Against fp32; the error of all gradients together, each one's divided by its size."""
    network = toys.network(freeze="layer3")
    plain, exact, images = copy.deepcopy(network), copy.deepcopy(network), toys.images(32, size=32)
    use_native_(network.suffix)

    def gradients(one: nn.Module, half: bool) -> list[Tensor]:
        with torch.autocast("cpu", BF16, enabled=half):
            logits = one.train()(images)
        logits.float().square().mean().backward()
        return [p.grad for p in one.parameters() if p.grad is not None]

    expected = gradients(exact, half=False)
    ours, pytorchs = (
        sum(float((g - e).norm() / e.norm()) for g, e in zip(gradients(one, half=True), expected, strict=True))
        for one in (network, plain)
    )
    assert ours < 1.3 * pytorchs


def test_on_this_machine_the_choice_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert module.multiplies_half(16, 1) is library.has_amx()
    assert not module.multiplies_half(17, 1)

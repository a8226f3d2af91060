"""Winograd's algorithm in C: against direct convolutions in fp64, for every length of a vector."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from weakref import ref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightcl.networks.native import NativeConv3x3, kept_scratch, library, use_native_
from lightcl.networks.native import convolution as module
from lightcl.networks.native.calls import Pass, winograd_scratch
from lightcl.networks.native.convolution import scratch_size
from lightcl.networks.native.library import require_library
from lightcl.networks.unit import fused
from tests.lightcl import toys
from tests.lightcl.networks.exact import (
    check_a_shift_by_hand,
    check_against_the_exact_convolution,
    distance,
    maps,
    results,
)
from tests.lightcl.networks.exact import native_convolution as convolution
from tests.lightcl.networks.native.vectors import FEATURES, STRICT, VECTORS


@toys.needs_compiler
@pytest.mark.parametrize("flags", VECTORS)
@pytest.mark.parametrize(
    ("shape", "outputs", "stride"),
    [
        ((3, 5, 4, 4), 7, 1), ((2, 33, 8, 12), 70, 1), ((1, 1, 16, 16), 1, 1), ((47, 160, 4, 4), 160, 1),
        ((5, 20, 32, 32), 9, 1), ((3, 5, 8, 8), 7, 2), ((2, 33, 16, 24), 70, 2), ((47, 80, 8, 8), 160, 2),
        ((9, 20, 32, 32), 9, 2),
    ],
)  # fmt: skip
def test_it_computes_the_convolution_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], shape: tuple[int, ...], outputs: int, stride: int
) -> None:
    monkeypatch.setattr(library, "FLAGS", (*STRICT, *flags))
    check_against_the_exact_convolution(convolution(shape[1], outputs, stride), maps(*shape))


@toys.needs_compiler
@pytest.mark.parametrize("stride", [1, 2])
def test_a_shift_by_hand(stride: int) -> None:
    check_a_shift_by_hand(convolution(1, 1, stride))


@toys.needs_compiler
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("count", [5, 150])
def test_the_number_of_threads_changes_nothing(count: int, stride: int) -> None:
    """Also where each of them computes entire groups of maps, and where more than two share one."""
    fast, x = convolution(33, 70, stride), maps(count, 33, 8, 8)
    alone = results(fast, x)
    of_weight_alone = torch.autograd.grad(fast(x.detach()).square().sum(), fast.weight)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for one, other in zip(results(fast, x), alone, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(
            torch.autograd.grad(fast(x.detach()).square().sum(), fast.weight)[0], of_weight_alone[0]
        )  # fmt: skip


@toys.needs_compiler
def test_fewer_threads_than_asked_for_are_enough() -> None:
    """A system may grant fewer, and then other parts of the scratch memory are used than by all of them."""
    program = """
        import torch
        from torch.nn import functional as F
        from lightcl.networks.native.convolution import _Winograd
        for threads in (8, 3):
            torch.set_num_threads(threads)
            for stride in (1, 2):
                for count in (3, 47, 200):
                    x = torch.randn(count, 40, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
                    weight = torch.randn(70, 40, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
                    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
                    y, of_exact = _Winograd.apply(x, weight, stride, torch.float32), F.conv2d(*exact, None, stride, 1)
                    gradient = torch.randn(y.shape)
                    given = [y, *torch.autograd.grad(y, (x, weight), gradient)]
                    alone = _Winograd.apply(x.detach(), weight, stride, torch.float32)
                    given += torch.autograd.grad(alone, weight, gradient)
                    expected = [of_exact, *torch.autograd.grad(of_exact, exact, gradient.double())]
                    for one, other in zip(given, [*expected, expected[2]], strict=True):
                        assert (one - other).abs().max() < 5e-5 * other.abs().max(), (threads, stride, count)
        print("computed")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"OMP_THREAD_LIMIT": "2"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stdout.endswith("computed\n"), run.stderr


@toys.needs_compiler
@pytest.mark.parametrize("stride", [1, 2])
def test_only_what_is_wanted_is_computed(stride: int) -> None:
    fast, x = convolution(5, 7, stride), maps(2, 5, 8, 8)
    y, of_x, of_weight = results(fast, x)
    gradient = maps(*y.shape, seed=1)
    fast.weight.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(fast(x), x, gradient)[0], of_x)
    fast.weight.requires_grad_(True)
    assert torch.equal(torch.autograd.grad(fast(x.detach()), fast.weight, gradient)[0], of_weight)
    with torch.no_grad():
        assert torch.equal(fast(x), fast(x.contiguous()))  # not channels-last: another order in memory


@toys.needs_compiler
@pytest.mark.parametrize("flags", VECTORS)
@pytest.mark.parametrize("side", [4, 8])
def test_in_bf16_it_computes_in_fp32_and_rounds_its_result(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], side: int
) -> None:
    monkeypatch.setattr(library, "FLAGS", (*STRICT, *flags))
    fast, x = convolution(5, 19), maps(2, 5, side, side)
    rounded = x.detach().bfloat16().requires_grad_()
    exact = fast(rounded.float())
    with torch.autocast("cpu", torch.bfloat16):
        y = fast(rounded)
        assert torch.equal(y, fast(rounded.float()))  # what autocast would do
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())
    gradient = maps(*y.shape, seed=1).bfloat16()
    of_x, of_weight = torch.autograd.grad(y, (rounded, fast.weight), gradient)
    exact_x, exact_weight = torch.autograd.grad(exact, (rounded, fast.weight), gradient.float())
    assert of_x.dtype == torch.bfloat16
    assert of_weight.dtype == torch.float32
    assert torch.equal(of_x, exact_x)
    assert torch.equal(of_weight, exact_weight)


@toys.needs_compiler
def test_special_numbers_are_rounded_as_pytorch_does() -> None:
    """Halves of a unit in the last place go to the even number, NaN stays NaN."""
    zero = convolution(1, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for value in (1 + 2**-8, 1 + 3 * 2**-8, 3.3e38, 3.4028e38, 1e-40, torch.inf, torch.nan, -1.0):
            shift = torch.tensor([value])
            y = zero.followed(torch.zeros(1, 1, 4, 4), torch.ones(1), shift, None)
            expected = torch.relu(shift).bfloat16().expand(16)
            assert torch.equal(y.flatten(), expected) or (y.isnan().all() and expected.isnan().all())


@toys.needs_compiler
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("with_shortcut", [False, True])
def test_without_a_graph_batch_norm_shortcut_and_relu_are_part_of_it(half: bool, with_shortcut: bool) -> None:
    fast, norm = convolution(5, 19), nn.BatchNorm2d(19)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    use_native_(nn.Sequential(norm.eval()))
    x, shortcut = maps(40, 5, 8, 8).detach(), maps(40, 19, 8, 8, seed=2).detach()  # more maps than one group
    expected = norm(F.conv2d(x, fast.weight, padding=1)) + shortcut * with_shortcut
    added = shortcut if with_shortcut else None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert fused(fast, norm, x, added) is None  # in bf16 it would round less often than training does
        fast.weight.requires_grad_(False)
        given = fused(fast, norm, x, added)
    assert given is not None
    assert given.dtype == (torch.bfloat16 if half else torch.float32)
    assert distance(given.float(), F.relu(expected)) < (2e-2 if half else 1e-4)


@toys.needs_compiler
@pytest.mark.parametrize("shape", [(2, 5, 6, 8), (2, 5, 2, 2), (1, 5, 36, 32)])
def test_other_sides_are_computed_directly(shape: tuple[int, ...]) -> None:
    fast, x = convolution(5, 7), maps(*shape)
    assert torch.equal(fast(x), F.conv2d(x, fast.weight, padding=1))
    double = copy.deepcopy(fast).double()
    assert torch.equal(double(x.double()), F.conv2d(x.double(), double.weight, padding=1))


@toys.needs_compiler
def test_no_maps_have_no_gradient() -> None:
    fast, x = convolution(5, 7), maps(0, 5, 4, 4)
    (of_weight,) = torch.autograd.grad(fast(x).sum(), fast.weight)
    assert not of_weight.any()


@toys.needs_compiler
def test_in_bf16_a_processor_that_multiplies_matrices_computes_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, x = convolution(5, 7), maps(1, 5, 8, 8)
    monkeypatch.setattr(module, "has_amx", lambda: True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), F.conv2d(x, fast.weight, padding=1))
    assert not torch.equal(fast(x), F.conv2d(x, fast.weight, padding=1))  # in fp32 it is Winograd's algorithm


@toys.needs_compiler
def test_large_maps_in_bf16_are_computed_directly() -> None:
    fast, x = convolution(5, 7), maps(1, 5, 20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), F.conv2d(x, fast.weight, padding=1))


@toys.needs_compiler
def test_what_it_cannot_compute_stays_as_it_is() -> None:
    network = toys.network(freeze="layer3")
    copied = copy.deepcopy(network)
    use_native_(network.suffix)
    native = [module for module in network.suffix.modules() if isinstance(module, NativeConv3x3)]
    assert len(native) == 4  # not the shortcut's, which is 1x1
    assert not any(isinstance(module, NativeConv3x3) for module in network.prefix.modules())
    images = toys.images(4, size=32)
    assert torch.allclose(network.eval()(images), copied.eval()(images), rtol=1e-3, atol=1e-4)
    assert isinstance(copy.deepcopy(network).get_submodule("layer4.1.conv2"), NativeConv3x3)


@toys.needs_compiler
@pytest.mark.parametrize("of", list(Pass))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("shape", "outputs"), [((47, 8, 8, 80), 160), ((3, 8, 16, 33), 70), ((9, 32, 32, 5), 5)])
def test_the_count_of_scratch_memory_is_that_of_the_longest_vectors(
    shape: tuple[int, ...], outputs: int, threads: int, stride: int, of: Pass
) -> None:
    n, height, width, inputs = shape
    tiles = NativeConv3x3.tiles(height, width, stride)
    counted = scratch_size(n, tiles, inputs, outputs, stride=stride, of=of, threads=threads)
    torch.set_num_threads(threads)
    memory, own = winograd_scratch(require_library().code, (*shape, outputs, 0, stride), of)
    given = own, len(memory) - threads * own
    exact = "avx512f" in FEATURES
    assert counted == given if exact else counted[0] >= given[0] and counted[1] >= given[1]


SMALL, LARGE = (47, 4, 4, 80), (47, 8, 8, 160)


@toys.needs_compiler
@pytest.mark.parametrize("threads", [2, 3])
def test_kept_scratch_memory_is_used_by_one_pass_after_another(threads: int) -> None:
    torch.set_num_threads(threads)
    with kept_scratch():
        large, of_large = scratch_of(LARGE)
        small, of_small = scratch_of(SMALL)
        assert small is large
        assert of_small == of_large  # each thread's part begins where it began before
        with kept_scratch():  # within itself: nothing changes
            assert scratch_of(LARGE)[0] is large
        assert scratch_of(LARGE)[0] is large
        alive = ref(large)
        del small, large
    assert alive() is None
    assert len(scratch_of(SMALL)[0]) < threads * of_large
    assert scratch_of(SMALL)[0] is not scratch_of(SMALL)[0]


@toys.needs_compiler
def test_kept_scratch_memory_grows() -> None:
    torch.set_num_threads(2)
    with kept_scratch():
        alive = ref(scratch_of(SMALL)[0])
        assert alive() is not None
        assert len(scratch_of(LARGE)[0]) == 2 * scratch_of(LARGE)[1]
        assert alive() is None
        torch.set_num_threads(3)
        memory, own = scratch_of(SMALL)
        assert len(memory) > 3 * own  # and what they share
        with kept_scratch(wanted=False):
            assert scratch_of(SMALL)[0] is not scratch_of(SMALL)[0]
            alive = ref(memory)
            del memory
            assert alive() is None


@toys.needs_compiler
def test_with_one_thread_no_scratch_memory_is_kept() -> None:
    torch.set_num_threads(1)
    with kept_scratch():
        alive = ref(scratch_of(SMALL)[0])
        assert alive() is None


@toys.needs_compiler
@pytest.mark.parametrize("threads", [2, 3])
def test_in_kept_scratch_memory_passes_compute_the_same(threads: int) -> None:
    """Passes of several sizes, so that a part of memory has another pass's numbers in it."""
    passes = [
        (convolution(80, 160), maps(47, 80, 8, 8)),
        (convolution(64, 70, 2), maps(100, 64, 8, 8)),
        (convolution(40, 90), maps(3, 40, 8, 8)),
    ]
    torch.set_num_threads(threads)
    expected = [results(*each) for each in passes]
    with kept_scratch():
        for _ in range(2):
            for each, alone in zip(passes, expected, strict=True):
                for one, other in zip(results(*each), alone, strict=True):
                    assert torch.equal(one, other)


def scratch_of(shape: tuple[int, ...]) -> tuple[torch.Tensor, int]:
    return winograd_scratch(require_library().code, (*shape, 160, 0, 1), Pass.OF_MAPS)

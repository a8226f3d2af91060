"""Winograd's algorithm in C: against direct convolutions in fp64, for every length of a vector; without a compiler."""

from __future__ import annotations

import copy
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightcl.errors import RequestError
from lightcl.networks import native, winograd
from lightcl.networks.native import (
    NativeWinogradConv2d,
    find_library,
    require_library,
    scratch_size,
    use_native_winograd_,
)  # fmt: skip
from lightcl.storage.files import cache_folder
from tests.lightcl import toys
from tests.lightcl.networks.exact import check_a_shift_by_hand, check_against_the_exact_convolution, maps, results

X86 = platform.machine() == "x86_64"
FEATURES = native._processor().split()
VECTORS = [
    pytest.param(("-march=native",), id="this processor's"),
    pytest.param(("-march=x86-64",), id="4 numbers", marks=pytest.mark.skipif(not X86, reason="x86")),
    pytest.param(
        ("-march=haswell",), id="8 numbers", marks=pytest.mark.skipif("avx2" not in FEATURES, reason="no AVX2")
    ),
    pytest.param(
        ("-march=skylake-avx512",), id="16 numbers",
        marks=pytest.mark.skipif("avx512vl" not in FEATURES, reason="no AVX-512"),
    ),
]  # fmt: skip


@pytest.fixture(autouse=True)
def few_channels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(winograd, "CHANNELS", 1)
    find_library.cache_clear()
    yield
    find_library.cache_clear()


def convolution(inputs: int, outputs: int) -> nn.Conv2d:
    torch.manual_seed(3)
    made = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    assert use_native_winograd_(nn.Sequential(made)) == 1
    assert isinstance(made, NativeWinogradConv2d)
    return made


@toys.needs_compiler
@pytest.mark.parametrize("flags", VECTORS)
@pytest.mark.parametrize(
    ("shape", "outputs"), [((3, 5, 4, 4), 7), ((2, 33, 8, 12), 70), ((1, 1, 16, 16), 1), ((47, 160, 4, 4), 160)]
)
def test_it_computes_the_convolution_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], shape: tuple[int, ...], outputs: int
) -> None:
    monkeypatch.setattr(native, "FLAGS", ("-O3", "-fPIC", "-std=gnu11", "-Wall", "-Wextra", "-Werror", *flags))
    check_against_the_exact_convolution(convolution(shape[1], outputs), maps(*shape))


@toys.needs_compiler
def test_a_shift_by_hand() -> None:
    check_a_shift_by_hand(convolution(1, 1))


@toys.needs_compiler
def test_the_number_of_threads_changes_nothing() -> None:
    fast, x = convolution(33, 70), maps(5, 33, 8, 8)
    alone = results(fast, x)
    torch.set_num_threads(3)
    for one, other in zip(results(fast, x), alone, strict=True):
        assert torch.equal(one, other)


@toys.needs_compiler
def test_only_what_is_wanted_is_computed() -> None:
    fast, x = convolution(5, 7), maps(2, 5, 4, 4)
    _, of_x, of_weight = results(fast, x)
    gradient = maps(2, 7, 4, 4, seed=1)
    fast.weight.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(fast(x), x, gradient)[0], of_x)
    fast.weight.requires_grad_(True)
    assert torch.equal(torch.autograd.grad(fast(x.detach()), fast.weight, gradient)[0], of_weight)
    with torch.no_grad():
        assert torch.equal(fast(x), fast(x.contiguous()))  # not channels-last: another order in memory


@toys.needs_compiler
def test_in_bf16_it_computes_in_fp32_and_rounds_its_result() -> None:
    fast, x = convolution(5, 7), maps(2, 5, 4, 4)
    rounded = x.detach().bfloat16().requires_grad_()
    exact = fast(rounded.float())
    with torch.autocast("cpu", torch.bfloat16):
        y = fast(rounded)
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
@pytest.mark.parametrize("shape", [(2, 5, 6, 8), (2, 5, 2, 2), (2, 5, 20, 16)])
def test_other_sides_are_computed_directly(shape: tuple[int, ...]) -> None:
    fast, x = convolution(5, 7), maps(*shape)
    assert torch.equal(fast(x), F.conv2d(x, fast.weight, padding=1))
    double = copy.deepcopy(fast).double()
    assert torch.equal(double(x.double()), F.conv2d(x.double(), double.weight, padding=1))


@toys.needs_compiler
def test_what_it_cannot_compute_stays_as_it_is() -> None:
    network = toys.network(freeze="layer3")
    copied = copy.deepcopy(network)
    assert use_native_winograd_(network.suffix) == 3  # not the first, whose stride is 2, nor the shortcut's
    assert not any(isinstance(module, NativeWinogradConv2d) for module in network.prefix.modules())
    images = toys.images(4, size=32)
    assert torch.allclose(network.eval()(images), copied.eval()(images), rtol=1e-3, atol=1e-4)
    assert isinstance(copy.deepcopy(network).get_submodule("layer4.1.conv2"), NativeWinogradConv2d)


@toys.needs_compiler
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("shape", "outputs"), [((47, 4, 4, 160), 160), ((3, 8, 12, 33), 70)])
def test_the_count_of_scratch_memory_is_that_of_the_longest_vectors(
    shape: tuple[int, ...], outputs: int, backward: bool
) -> None:
    n, height, width, inputs = shape
    tiles = n * (height // 4) * (width // 4)
    counted = scratch_size(tiles, inputs, outputs, backward=backward)
    own = require_library().winograd_scratch((native.ctypes.c_long * 5)(*shape, outputs), int(backward), 1)
    assert counted == own if "avx512f" in FEATURES else counted >= own


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert find_library() == "there is no C compiler"
    with pytest.raises(RequestError, match=r"winograd-native, but there is no C compiler \(allowed without one: auto"):
        use_native_winograd_(nn.Sequential())


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("nonesuch", "there is no C compiler (CC is 'nonesuch')"),
        ("false", "winograd.c cannot be compiled (exit status 1)"),
    ],
)
def test_the_compiler_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, compiler: str, reason: str) -> None:
    monkeypatch.setenv("CC", compiler)
    assert find_library() == reason


@toys.needs_compiler
def test_a_compiler_may_be_given_with_options_and_is_found_inside_autocast(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", f"{next(filter(shutil.which, native.COMPILERS))} -g0")
    with torch.autocast("cpu", torch.bfloat16):
        assert not isinstance(find_library(), str)


@toys.needs_compiler
def test_an_error_of_the_compiler_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "winograd.c"
    source.write_text('#error "no"\n')
    monkeypatch.setattr(native, "SOURCE", source)
    assert "cannot be compiled" in str(find_library())
    assert "#error" in str(find_library())


@toys.needs_compiler
def test_a_cache_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path / "file"))
    assert "cannot be compiled" in str(find_library())


LOAD = "from lightcl.networks.native import require_library; require_library(); print('loaded')"


def inode_of_the_library_of_a_new_process(cache: Path) -> int:
    """In this process a library that is loaded once stays loaded."""
    assert subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True).stdout == "loaded\n"
    (file,) = (cache / "native").iterdir()
    return file.stat().st_ino


@toys.needs_compiler
def test_a_damaged_library_is_made_again_and_a_good_one_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path))  # for the processes as well
    first = inode_of_the_library_of_a_new_process(tmp_path)
    assert inode_of_the_library_of_a_new_process(tmp_path) == first
    (file,) = (cache_folder() / "native").iterdir()  # nothing of the compiler's is left
    file.write_bytes(b"\x7fELF, but no more")
    assert inode_of_the_library_of_a_new_process(tmp_path) != first
    assert file.stat().st_size > 10_000


@toys.needs_compiler
def test_a_library_that_computes_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "winograd.c"
    text = native.SOURCE.read_text()
    assert text.count("y[to] = tilt + 2 * bend;") == 1
    source.write_text(text.replace("y[to] = tilt + 2 * bend;", "y[to] = tilt + 3 * bend;"))
    monkeypatch.setattr(native, "SOURCE", source)
    assert find_library() == "winograd.c cannot be compiled (what it computes is wrong)"


@toys.needs_compiler
def test_processes_that_compile_at_once(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD], stdout=subprocess.PIPE, text=True,
            env=dict(native.os.environ, LIGHTCL_CACHE=str(tmp_path)),
        )
        for _ in range(3)
    ]  # fmt: skip
    assert [process.communicate()[0].strip() for process in started] == ["loaded"] * 3
    assert len(list((tmp_path / "native").iterdir())) == 1

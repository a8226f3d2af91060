"""Winograd's algorithm in C (winograd.c): compiled once on the machine that runs it, and called on tensors.

A C compiler (GCC or Clang) takes about a second. The result lies in the cache folder under a digest of everything that
it depends on, so that a changed source, compiler or processor makes a new one. Nothing is compiled when the package is
installed, and where there is no compiler, `find_library` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightcl.errors import RequestError
from lightcl.networks.winograd import REACH, WinogradConv2d, tiles_of, use_winograd_
from lightcl.storage.files import cache_folder, sync

SOURCE = Path(__file__).with_name("winograd.c")
COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-O3", "-march=native", "-fPIC", "-std=gnu11", "-w")
SECONDS = 120
"""The longest that a compiler may take; a small board needs about ten."""
ERROR = 5e-5
"""Of the largest value, in the test after compiling; measured is a tenth of it."""


class NativeWinogradConv2d(WinogradConv2d):
    """A convolution that computes by winograd.c where Winograd's algorithm applies.

    It applies to fp32 maps on the CPU whose sides are multiples of 4 and which are not large. Inside autocast to bf16
    it computes in fp32 as well and rounds its result: that is faster than multiplying in bf16, and more exact.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[N, C, H, W]` -> `[N, C', H, W]`, channels-last."""
        half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if (
            not tiles_of(*input.shape[-2:])
            or input.device.type != "cpu"
            or input.dtype not in ((torch.float32, torch.bfloat16) if half else (torch.float32,))
            or self.weight.dtype != torch.float32
        ):
            return super().forward(input)
        result: Tensor = _Native.apply(input, self.weight, torch.bfloat16 if half else torch.float32)
        return result


def use_native_winograd_(stage: nn.Module) -> int:
    """Makes every convolution of `stage` that Winograd's algorithm can compute a `NativeWinogradConv2d`; returns how
    many.

    Raises RequestError where winograd.c cannot be compiled.
    """
    require_library()
    return use_winograd_(stage, NativeWinogradConv2d)


def require_library() -> ctypes.CDLL:
    """Raises RequestError where winograd.c cannot be compiled."""
    found = find_library()
    if isinstance(found, str):
        raise RequestError(
            f"device.convolutions is winograd-native, but {found} (allowed without one: auto, direct, winograd)"
        )
    return found


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        n, _, height, width = x.shape
        maps, flat = _maps(x), _flat(weight)
        result = maps.new_empty(n, height, width, len(flat))
        _call("forward", maps, flat, result)
        return result.permute(0, 3, 1, 2).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, _ = ctx.needs_input_grad
        maps, flat = _maps(x), _flat(weight)
        of_x, of_weight = torch.empty_like(maps) if for_x else None, torch.empty_like(flat) if for_weight else None
        _call("backward", maps, flat, _maps(gradients[0]), of_x, of_weight)
        return (
            None if of_x is None else of_x.permute(0, 3, 1, 2).to(x.dtype),
            None if of_weight is None else of_weight.permute(0, 3, 1, 2),
            None,
        )


def scratch_size(tiles: int, inputs: int, outputs: int, *, backward: bool) -> int:
    """Numbers of scratch memory of a pass by one thread, for `tiles` of all maps and so many channels.

    It is winograd.c's own count for AVX-512; processors with shorter vectors take less.
    """

    def apart(numbers: int) -> int:
        return ((numbers + 15) // 16 | 1) * 16

    places, width, high = REACH * REACH, 32, 24
    padded_inputs, padded_outputs = -(-inputs // 16) * 16, -(-outputs // 16) * 16
    turned = 0 if backward else 9 * inputs * padded_outputs
    block = max(REACH * max(inputs, outputs) * width, places * (high * width + 16))
    return places * (apart(tiles * padded_inputs) + apart(tiles * padded_outputs)) + turned + block


def _maps(x: Tensor) -> Tensor:
    """Maps `[N, C, H, W]` as `[N, H, W, C]` in fp32, which they are in memory where they lie channels-last."""
    return x.permute(0, 2, 3, 1).contiguous().float()


def _flat(weight: Tensor) -> Tensor:
    """Weights `[C', C, 3, 3]` as `[C', 3, 3, C]`, which they are in memory where they lie channels-last."""
    return weight.detach().permute(0, 2, 3, 1).contiguous()


def _call(
    direction: str, maps: Tensor, weights: Tensor, *others: Tensor | None, library: ctypes.CDLL | None = None
) -> None:
    """Runs a function of winograd.c on contiguous tensors; None: a result that is not wanted."""
    library = library or require_library()
    threads = torch.get_num_threads()
    sizes = (ctypes.c_long * 5)(*maps.shape, len(weights))
    scratch = maps.new_empty(library.winograd_scratch(sizes, int(direction == "backward"), threads))
    given = (maps, weights, *others, scratch)
    addresses = (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in given)
    getattr(library, f"winograd_{direction}")(sizes, threads, *addresses)


@cache
def find_library() -> ctypes.CDLL | str:
    """winograd.c, compiled and loaded; or why there is none, as the end of a sentence."""
    name = os.environ.get("CC")
    commands = [shlex.split(name)] if name else [[compiler] for compiler in COMPILERS]
    found = [command for command in commands if shutil.which(command[0])]
    if not found:
        return f"there is no C compiler (CC is {name!r})" if name else "there is no C compiler"
    try:
        folder = cache_folder() / "native"
        folder.mkdir(parents=True, exist_ok=True)
        return _compiled(found[0], folder)
    except (OSError, RequestError, subprocess.SubprocessError) as error:
        return f"winograd.c cannot be compiled ({_reason(error)})"


def _compiled(compiler: list[str], folder: Path) -> ctypes.CDLL:
    """Loads the library that fits this machine; compiles it where it does not exist, or is not what it should be."""
    parts = [SOURCE.read_text(encoding="utf-8"), *compiler, _run([*compiler, "--version"]), *FLAGS]
    digest = hashlib.sha256("\0".join([*parts, _processor(), torch.__version__, sys.platform]).encode()).hexdigest()
    file = folder / f"winograd-{digest[:20]}.so"
    if file.exists() and file.stat().st_uid == os.getuid():  # it runs with our rights, so nobody else may have made it
        with suppress(OSError):  # damaged: it is made again
            return _loaded(file)
    # PyTorch brings its own OpenMP runtime. A second one would have threads of its own, which wait for work on the
    # same cores.
    runtimes = sorted(Path(torch.__file__).parent.joinpath("lib").glob("libgomp*"))
    attempts = [("-fopenmp", str(runtime)) for runtime in runtimes[:1]] + [("-fopenmp", "-fopenmp"), ("", "")]
    for number, (flag, runtime) in enumerate(attempts, start=1):
        with tempfile.TemporaryDirectory(dir=folder) as made:
            try:
                code, target = Path(made, "winograd.o"), Path(made, "winograd.so")
                _run([*compiler, *FLAGS, *flag.split(), "-c", str(SOURCE), "-o", str(code)])
                _run([*compiler, "-shared", str(code), *([runtime] if runtime else []), "-o", str(target)])
                library = _loaded(target)
                sync(target)  # after a power cut a part of it might be loaded, which would end the process
                target.replace(file)
                return library
            except (OSError, subprocess.SubprocessError):
                if number == len(attempts):
                    raise
    raise AssertionError("the last attempt returns or raises")


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout


def _loaded(file: Path) -> ctypes.CDLL:
    """Raises OSError for a library that is none, or that computes wrongly."""
    library = ctypes.CDLL(str(file))
    draw = torch.Generator().manual_seed(0)
    maps = torch.rand((1, 8, 8, 3), generator=draw, dtype=torch.float32)
    weights = torch.rand((5, 3, 3, 3), generator=draw, dtype=torch.float32)
    result = torch.empty((1, 8, 8, 5), dtype=torch.float32)
    try:
        library.winograd_scratch.restype = ctypes.c_long
        _call("forward", maps, weights, result, library=library)
    except AttributeError as error:
        raise OSError(f"{file} is not winograd.c") from error
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = torch.conv2d(maps.permute(0, 3, 1, 2), weights.permute(0, 3, 1, 2), padding=1).permute(0, 2, 3, 1)
    if not (result - expected).abs().max() < ERROR * expected.abs().max():
        raise OSError("what it computes is wrong")
    return library


def _processor() -> str:
    """What the compiler makes instructions for: the processor's model and features, under Linux."""
    lines = cpuinfo().splitlines() or [platform.processor()]
    known = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    found = sorted({line for line in lines if ":" not in line or line.split(":")[0].strip() in known})
    return "\n".join([platform.machine(), *found])


@cache
def cpuinfo() -> str:
    """The processor as Linux describes it; elsewhere nothing."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _reason(error: Exception) -> str:
    """The first line that a compiler said, or what else went wrong."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in str(error.stderr).splitlines() if "error" in line] or [
            f"exit status {error.returncode}"
        ]
        return lines[0]
    return str(error)

"""The C sources of this folder: compiled once on the machine that runs them, and called on tensors.

A C compiler (GCC or Clang) takes a few seconds. The result lies in the cache folder under a digest of everything that
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightcl.errors import RequestError
from lightcl.storage.files import cache_folder, sync

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.c")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-O3", "-march=native", "-fPIC", "-std=gnu11", "-w")
SECONDS = 120
"""The longest that a compiler may take; a small board needs about ten."""
ERROR = 5e-5
"""Of the largest value, in the test after compiling; measured is a tenth of it."""
Argument = Tensor | int | float | None
_P = ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "winograd_scratch": [_P, ctypes.c_int, ctypes.c_int],
    "winograd_forward": [_P, ctypes.c_int, ctypes.c_int, *[_P] * 7],
    "winograd_backward": [_P, ctypes.c_int, *[_P] * 6],
    "norm_forward": [_P, ctypes.c_int, ctypes.c_float, ctypes.c_float, *[_P] * 9],
    "norm_backward": [_P, ctypes.c_int, *[_P] * 10],
    "drift_forward": [_P, ctypes.c_int, *[_P] * 5],
    "drift_backward": [_P, ctypes.c_int, *[_P] * 4],
}
"""The parameters of the functions that Python calls: sizes, and the number of threads, come first."""


def require_library() -> ctypes.CDLL:
    """Raises RequestError where the sources cannot be compiled."""
    found = find_library()
    if isinstance(found, str):
        raise RequestError(
            f"device.convolutions is winograd-native, but {found} (allowed without one: auto, direct, winograd)"
        )
    return found


def run(function: str, sizes: tuple[int, ...], *arguments: Argument, library: ctypes.CDLL | None = None) -> None:
    """Runs a function of the library on `sizes`, PyTorch's number of threads, and contiguous tensors, numbers, and NULL
    for None."""
    library = library or require_library()
    given = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    getattr(library, function)(_array(sizes), torch.get_num_threads(), *given)


def scratch_memory(sizes: tuple[int, ...], *, backward: bool, library: ctypes.CDLL | None = None) -> Tensor:
    """What a forward or backward pass of winograd.c takes while it runs."""
    library = library or require_library()
    numbers = library.winograd_scratch(_array(sizes), int(backward), torch.get_num_threads())
    return torch.empty(numbers, dtype=torch.float32)


@lru_cache(1024)
def _array(sizes: tuple[int, ...]) -> ctypes.Array[ctypes.c_long]:
    """Sizes as C reads them; it never writes there."""
    return (ctypes.c_long * len(sizes))(*sizes)


@cache
def find_library() -> ctypes.CDLL | str:
    """The sources, compiled and loaded; or why there is no library, as the end of a sentence."""
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
        return f"the C sources of lightcl cannot be compiled ({_reason(error)})"


def _compiled(compiler: list[str], folder: Path) -> ctypes.CDLL:
    """Loads the library that fits this machine; compiles it where it does not exist, or is not what it should be."""
    texts = [file.read_text(encoding="utf-8") for file in (*SOURCES, *HEADERS)]
    parts = [*texts, *compiler, _run([*compiler, "--version"]), *FLAGS]
    digest = hashlib.sha256("\0".join([*parts, _processor(), torch.__version__, sys.platform]).encode()).hexdigest()
    file = folder / f"lightcl-{digest[:20]}.so"
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
                target = Path(made, "lightcl.so")
                objects = [str(Path(made, source.stem + ".o")) for source in SOURCES]
                options = [*compiler, *FLAGS, *flag.split(), "-c"]
                commands = [[*options, str(source), "-o", code] for source, code in zip(SOURCES, objects, strict=True)]
                with ThreadPoolExecutor() as side_by_side:
                    list(side_by_side.map(_run, commands))
                _run([*compiler, "-shared", *objects, *([runtime] if runtime else []), "-lm", "-o", str(target)])
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
    sizes = (1, 8, 8, 3, 5, 0)
    try:
        library.winograd_scratch.restype = ctypes.c_long
        for name, parameters in _SIGNATURES.items():
            getattr(library, name).argtypes = parameters
        scratch = scratch_memory(sizes, backward=False, library=library)
        after = (None, None, None)  # no scale, shift and shortcut
        run("winograd_forward", sizes, 1, maps, weights, *after, result, scratch, library=library)
        normalized, kept = torch.empty_like(result), torch.empty(20, dtype=torch.float32)
        plain = torch.tensor([[1.0], [0.0], [0.0], [1.0]], dtype=torch.float32).repeat(1, 5)
        scratch = torch.empty(64, dtype=torch.float32)
        rows = (64, 64, 5, 5, 0, 0, 1, 0)
        run("norm_forward", rows, 1e-5, 0.0, result, None, *plain, normalized, kept, scratch, library=library)
    except AttributeError as error:
        raise OSError(f"{file} is not made of these sources") from error
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = torch.conv2d(maps.permute(0, 3, 1, 2), weights.permute(0, 3, 1, 2), padding=1).relu()
        spread = torch.batch_norm(expected, None, None, None, None, True, 0.0, 1e-5, False)
    for computed, exact in ((result, expected), (normalized, spread)):
        if not (computed - exact.permute(0, 2, 3, 1)).abs().max() < ERROR * exact.abs().max():
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

"""The C sources of this folder: compiled once on the machine that runs them, and loaded.

A C compiler (GCC or Clang) takes a few seconds. The result lies in the cache folder under a digest of everything that
it depends on, so that a changed source, compiler or processor makes a new one. Nothing is compiled when the package is
installed, and where there is no compiler, `find_library` says why.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from lightcl.errors import RequestError
from lightcl.networks.native.calls import declare
from lightcl.networks.native.check import check
from lightcl.storage.files import cache_folder, sync

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.c")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-O3", "-march=native", "-fPIC", "-std=gnu11", "-w")
SECONDS = 120
"""The longest that a compiler may take; a small board needs about ten."""


class Library(NamedTuple):
    """The sources, compiled and loaded."""

    code: ctypes.CDLL
    digest: str
    """Of everything that its results may depend on: sources, compiler, processor and PyTorch."""


def require_library() -> Library:
    """Raises RequestError where the sources cannot be compiled."""
    found = find_library()
    if isinstance(found, str):
        raise RequestError(f"device.convolutions is native, but {found} (allowed without one: auto, direct, winograd)")
    return found


@cache
def find_library() -> Library | str:
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


def _compiled(compiler: list[str], folder: Path) -> Library:
    """Loads the library that fits this machine; compiles it where it does not exist, or is not what it should be."""
    texts = [file.read_text(encoding="utf-8") for file in (*SOURCES, *HEADERS)]
    parts = [*texts, *compiler, _run([*compiler, "--version"]), *FLAGS]
    parts += [_processor(), torch.__version__, sys.platform]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    file = folder / f"lightcl-{digest}.so"
    if file.exists() and file.stat().st_uid == os.getuid():  # it runs with our rights, so nobody else may have made it
        with suppress(OSError):  # damaged: it is made again
            return Library(_loaded(file), digest)
    # PyTorch brings its own OpenMP runtime. A second one would have threads of its own, which wait for work on the
    # same cores.
    runtimes = sorted(Path(torch.__file__).parent.joinpath("lib").glob("libgomp*"))
    attempts = [("-fopenmp", str(runtime)) for runtime in runtimes[:1]] + [("-fopenmp", "-fopenmp"), ("", "")]
    for number, (flag, runtime) in enumerate(attempts, start=1):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            try:
                target = Path(temporary, "lightcl.so")
                objects = [str(Path(temporary, source.stem + ".o")) for source in SOURCES]
                options = [*compiler, *FLAGS, *flag.split(), "-c"]
                commands = [[*options, str(source), "-o", made] for source, made in zip(SOURCES, objects, strict=True)]
                with ThreadPoolExecutor() as side_by_side:
                    list(side_by_side.map(_run, commands))
                _run([*compiler, "-shared", *objects, *([runtime] if runtime else []), "-lm", "-o", str(target)])
                code = _loaded(target)
                sync(target)  # after a power cut a part of it might be loaded, which would end the process
                target.replace(file)
                return Library(code, digest)
            except (OSError, subprocess.SubprocessError):
                if number == len(attempts):
                    raise
    raise AssertionError("the last attempt returns or raises")


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout


def _loaded(file: Path) -> ctypes.CDLL:
    """Raises OSError for a library that is none, or that computes wrongly."""
    code = ctypes.CDLL(str(file))
    declare(code)
    check(code)
    return code


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


def flags_in(text: str) -> frozenset[str]:
    """The features of an x86 processor, of which `text` is Linux's description; else none."""
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(flags[1].split()) if flags else frozenset()


@cache
def has_amx() -> bool:
    """Whether the processor multiplies matrices in bf16, eight times as fast as vectors in fp32."""
    return "amx_bf16" in flags_in(cpuinfo())


def _reason(error: Exception) -> str:
    """The first line that a compiler said, or what else went wrong."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in str(error.stderr).splitlines() if "error" in line] or [
            f"exit status {error.returncode}"
        ]
        return lines[0]
    return str(error)

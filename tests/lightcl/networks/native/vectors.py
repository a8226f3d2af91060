"""The compiler's options for every length of a vector that this machine can compute with."""

from __future__ import annotations

import platform

import pytest

from lightcl.networks.native import library

X86 = platform.machine() == "x86_64"
FEATURES = library._processor().split()
STRICT = ("-O3", "-fPIC", "-std=gnu11", "-Wall", "-Wextra", "-Werror")
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

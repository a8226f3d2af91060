"""Each test finds the library anew, and computes layers of few channels in C as well, in bf16 also with AMX."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightcl.networks.native import NativeConv3x3, convolution
from lightcl.networks.native.library import find_library


@pytest.fixture(autouse=True)
def few_channels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(NativeConv3x3, "fewest_channels", {1: 1, 2: 1})
    monkeypatch.setattr(NativeConv3x3, "largest_map", {1: 1024, 2: 1024})
    monkeypatch.setattr(convolution, "has_amx", lambda: False)
    find_library.cache_clear()
    yield
    find_library.cache_clear()

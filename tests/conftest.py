"""For all tests: a separate cache, one torch thread, so that rounding does not depend on the machine, and Flower's log.

A simulation that failed leaves Flower's log silent; a test that reads it must not depend on what ran before it.
"""

import logging
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first, beside all others; at the end they would run alone."""
    items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in ("long", "ray")))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images and partitions go to a temporary folder; processes that a test starts inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTCL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _flower_logs() -> None:
    logging.getLogger("flwr").setLevel(logging.INFO)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)

"""Packages that only some sources need and that the base install of a board leaves out."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from lightcl.errors import RequestError


def package(module: str, source: str) -> ModuleType:
    """Imports a module that a source needs. Raises RequestError where its package is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise RequestError(
            f"data.source {source!r} needs the package {error.name!r}, which is not installed; install it by "
            "pip install 'lightcl-fleet[simulation]', or use data.source: image-folder, which needs no extra"
        ) from error

"""LightCL: continual learning on one edge device within a few dozen megabytes.

The names below are the Python interface (docs/reference/python.md). Each is imported on first use, so that
`import lightcl` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightcl.data.images import ImageSet, Source, SourceRequest
    from lightcl.data.partition import Share
    from lightcl.data.partitioners import register_partitioner
    from lightcl.data.sources import register_source
    from lightcl.errors import RequestError
    from lightcl.interface import OpenDevice, open_device, source_from_arrays
    from lightcl.methods import Method, MethodParameters, register
    from lightcl.networks import register_backbone
    from lightcl.networks.staged import Backbone
    from lightcl.plugins import load_plugins
    from lightcl.records import Run, load_run
    from lightcl.scenario import Scenario, load_scenario

__all__ = [
    "Backbone",
    "ImageSet",
    "Method",
    "MethodParameters",
    "OpenDevice",
    "RequestError",
    "Run",
    "Scenario",
    "Share",
    "Source",
    "SourceRequest",
    "load_plugins",
    "load_run",
    "load_scenario",
    "open_device",
    "register",
    "register_backbone",
    "register_partitioner",
    "register_source",
    "source_from_arrays",
]

_MODULES = {
    "lightcl.data.images": ("ImageSet", "Source", "SourceRequest"),
    "lightcl.data.partition": ("Share",),
    "lightcl.data.partitioners": ("register_partitioner",),
    "lightcl.data.sources": ("register_source",),
    "lightcl.errors": ("RequestError",),
    "lightcl.interface": ("OpenDevice", "open_device", "source_from_arrays"),
    "lightcl.methods": ("Method", "MethodParameters", "register"),
    "lightcl.networks": ("register_backbone",),
    "lightcl.networks.staged": ("Backbone",),
    "lightcl.plugins": ("load_plugins",),
    "lightcl.records": ("Run", "load_run"),
    "lightcl.scenario": ("Scenario", "load_scenario"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lightcl' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Plugins: a user's Python files and installed packages that register methods, networks, data sources or partitioners.

Files are named in the environment variable LIGHTCL_PLUGINS (separated as in PATH), installed packages by the
entry-point group `lightcl.plugins`. Every registry loads both before a lookup (lightcl/registry.py). Child processes
and local Ray workers inherit the variable and so have the same plugins; on another machine the file must be at the
same path.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from lightcl.errors import RequestError

VARIABLE = "LIGHTCL_PLUGINS"
GROUP = "lightcl.plugins"


def load_plugins(files: Sequence[Path]) -> None:
    """Imports the files and adds them to the environment, so that processes started later load them too.

    Raises RequestError with the file and the line for a file that cannot be imported.
    """
    paths = [file.expanduser().absolute() for file in files]
    for path in paths:
        if os.pathsep in str(path):
            raise RequestError(f"plugin {path}: the path must not contain {os.pathsep!r}")
        _import_file(path)
    known = _requested()
    os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys([*known, *map(str, paths)]))


def load_requested() -> None:
    """Imports the files that LIGHTCL_PLUGINS names and the packages of the entry-point group, once per process.

    Raises RequestError for a plugin that cannot be imported.
    """
    for path in _requested():
        _import_file(Path(path))
    _import_installed()


def _requested() -> list[str]:
    return [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


def _import_file(path: Path) -> ModuleType:
    """The module of a file; imported once per process, under a name that is unique to its path."""
    name = f"lightcl_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise RequestError(f"plugin {path}: no such file")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RequestError(f"plugin {path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: what it registers may look into registries, which load plugins
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RequestError(f"plugin {path}{_line(error, path)}: {type(error).__name__}: {error}") from error
    return module


def _line(error: Exception, path: Path) -> str:
    """`, line 3`: the last line of the file that was running, or that could not be parsed."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


@cache  # once per process; an error is not cached
def _import_installed() -> None:
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            raise RequestError(
                f"plugin {point.name} ({point.value}), an installed package: {type(error).__name__}: {error}"
            ) from error

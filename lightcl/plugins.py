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
import inspect
import marshal
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from functools import cache, partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from lightcl.errors import RequestError

VARIABLE = "LIGHTCL_PLUGINS"
GROUP = "lightcl.plugins"
_DIGEST = "__lightcl_digest__"
"""Attribute of a plugin's module: digest of its file when it was imported."""


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
    content = path.read_bytes()
    setattr(module, _DIGEST, _digest(content))
    sys.modules[name] = module  # before it runs: what it registers may look into registries, which load plugins
    try:
        if isinstance(spec.loader, SourceFileLoader):
            # The text that the digest is of: compiled code on disk may be that of a text of the same second and length.
            exec(spec.loader.source_to_code(content, str(path)), module.__dict__)
        else:
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


def source_digest(defined: object) -> str:
    """Digest of the file that defines a class, a function or the class of an object, so that a cache notices a change.

    A plugin's file counts as it was when it was imported. Where there is no file, as in a notebook, the compiled code
    counts. Files that this one imports do not.
    """
    while isinstance(defined, partial):
        defined = defined.func
    owner = defined if inspect.isclass(defined) or inspect.isroutine(defined) else type(defined)
    imported: str | None = getattr(sys.modules.get(owner.__module__), _DIGEST, None)
    if imported is not None:
        return imported
    try:
        file = inspect.getsourcefile(owner)
    except (TypeError, OSError):  # defined in no file
        file = None
    if file and Path(file).is_file():
        return _digest(Path(file).read_bytes())
    name = f"{owner.__module__}.{owner.__qualname__}"
    return _digest(b"".join([name.encode(), *(marshal.dumps(code) for code in _code_of(owner))]))


def from_plugin(defined: object) -> bool:
    """Whether a class or function is neither this project's nor PyTorch's nor Python's: then it is a plugin's."""
    root = str(getattr(defined, "__module__", "")).partition(".")[0]
    return root == "__main__" or root not in {"lightcl", "torch", *sys.stdlib_module_names}


def _code_of(owner: object) -> Iterator[CodeType]:
    """The code of a function, or of the functions that a class defines."""
    for value in vars(owner).values() if inspect.isclass(owner) else [owner]:
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            yield code


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@cache  # once per process; an error is not cached
def _import_installed() -> None:
    for point in importlib.metadata.entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            raise RequestError(
                f"plugin {point.name} ({point.value}), an installed package: {type(error).__name__}: {error}"
            ) from error

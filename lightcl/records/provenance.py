"""Provenance of a run: versions, machine, git commit, command."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LIBRARIES = (
    "lightcl-fleet", "flwr", "flwr-datasets", "ray", "torch", "torchvision", "numpy", "pydantic", "PyYAML", "datasets",
    "scikit-learn", "scipy", "safetensors", "pillow", "pyarrow",
)  # fmt: skip


def describe_run(command: str, run: str) -> dict[str, Any]:
    """The part of run.json beside the scenario; `run` is the name of the devices' state folders."""
    return {
        "run": run,
        "command": command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def version(name: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The checkout's commit, with "+changes" where the tree differs from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        # An installed copy may lie inside some other repository.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True, check=True)
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")

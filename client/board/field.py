"""What a board's newest run with `data.source: field` waits for. Needs no PyTorch."""

from __future__ import annotations

from pathlib import Path

from lightcl.data.field import ABOUT, FieldPlan, FieldTasks
from lightcl.data.sources.field import FIELD


def newest_field(state_folder: Path) -> FieldTasks | None:
    """The tasks of the run that was noted last below a board's state folder; None where there is none."""
    files = sorted(state_folder.glob(f"*/device-*/{FIELD}/{ABOUT}"), key=lambda file: file.stat().st_mtime)
    for file in reversed(files):
        try:
            return FieldTasks(file.parent, FieldPlan.read(file.parent))
        except (OSError, ValueError):  # of another version, or being removed
            continue
    return None

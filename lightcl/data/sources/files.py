"""Rules that the readers of a user's own files share."""

from __future__ import annotations

import os
from pathlib import Path

from lightcl.data.images import SourceRequest
from lightcl.errors import RequestError

TEST_SPLITS = ("test", "val")
"""Names of test splits, in the order in which they are tried."""


def existing_path(request: SourceRequest) -> Path:
    """`data.path`. Raises RequestError where it is not given or does not exist."""
    if request.path is None:
        raise RequestError(f"data.source {request.name!r} needs data.path (your file or folder)")
    if not request.path.exists():
        raise RequestError(f"data.path: no such file or folder: {request.path}")
    return request.path


def files_below(folder: Path, suffixes: tuple[str, ...] = ("",)) -> list[str]:
    """Files with these suffixes (in lower case), also behind links to folders.

    Folder by folder in sorted order, sorted within each.
    """
    return [
        str(Path(place, name))
        for place, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(suffixes)
    ]

"""Files that are called images and are dangerous to open."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import EpsImagePlugin

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(hello) show\n%%EOF\n"
"""A program in PostScript, which Pillow gives to Ghostscript."""


def blank_png(width: int, height: int) -> bytes:
    """A valid black image with a palette of one color, some 1300 times smaller than its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"PLTE", bytes(3)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def icon(content: bytes, side: int) -> bytes:
    """An icon that says that it has `side` x `side` pixels, and holds a PNG."""
    entry = struct.pack("<BBBBHHII", side, side, 0, 0, 1, 32, len(content), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + content


def fake_ghostscript(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a Ghostscript first in PATH, which makes the file that is returned when it is run."""
    ran, program = folder / "ran", folder / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # where it was looked for already
    return ran

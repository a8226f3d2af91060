"""Compiling and loading the C sources: once, for this machine, and never one that computes wrongly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightcl.errors import RequestError
from lightcl.networks.native import library, use_native_
from lightcl.networks.native.library import find_library
from lightcl.storage.files import cache_folder
from tests.lightcl import toys


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert find_library() == "there is no C compiler"
    with pytest.raises(RequestError, match=r"native, but there is no C compiler \(allowed without one: auto"):
        use_native_(nn.Sequential())


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("nonesuch", "there is no C compiler (CC is 'nonesuch')"),
        ("false", "the C sources of lightcl cannot be compiled (exit status 1)"),
    ],
)
def test_the_compiler_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, compiler: str, reason: str) -> None:
    monkeypatch.setenv("CC", compiler)
    assert find_library() == reason


@toys.needs_compiler
def test_a_compiler_may_be_given_with_options_and_is_found_inside_autocast(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", f"{next(filter(shutil.which, library.COMPILERS))} -g0")
    with torch.autocast("cpu", torch.bfloat16):
        assert not isinstance(find_library(), str)


@toys.needs_compiler
def test_an_error_of_the_compiler_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "winograd.c"
    source.write_text('#error "no"\n')
    monkeypatch.setattr(library, "SOURCES", (source,))
    assert "cannot be compiled" in str(find_library())
    assert "#error" in str(find_library())


@toys.needs_compiler
def test_a_cache_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path / "file"))
    assert "cannot be compiled" in str(find_library())


QUICK = ("-O1", "-fPIC", "-std=gnu11", "-w")
"""The compiler's options where the speed of the result does not matter."""
LOAD = f"""
from lightcl.networks.native import library
library.FLAGS = {QUICK}
library.require_library()
print('loaded')
"""


def inode_of_the_library_of_a_new_process(cache: Path) -> int:
    """In this process a library that is loaded once stays loaded."""
    assert subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True).stdout == "loaded\n"
    (file,) = (cache / "native").iterdir()
    return file.stat().st_ino


@toys.needs_compiler
def test_a_damaged_library_is_made_again_and_a_good_one_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path))  # for the processes as well
    first = inode_of_the_library_of_a_new_process(tmp_path)
    assert inode_of_the_library_of_a_new_process(tmp_path) == first
    (file,) = (cache_folder() / "native").iterdir()  # nothing of the compiler's is left
    file.write_bytes(b"\x7fELF, but no more")
    assert inode_of_the_library_of_a_new_process(tmp_path) != first
    assert file.stat().st_size > 10_000


@toys.needs_compiler
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("winograd.c", "y[to] = tilt + 2 * bend;", "y[to] = tilt + 3 * bend;"),
        ("winograd.c", "w[to] = (r[2 * from]", "w[to] = (r[3 * from]"),  # only the backward pass
        ("norm.c", "variance = all.square[i] / all.size", "variance = all.square[i]"),
        ("drift.c", "2 * difference", "3 * difference"),
        ("vectors.h", "+ 0x7fff", "+ 0x7fffff"),  # only bf16
    ],
)
def test_a_library_that_computes_wrongly_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, right: str, wrong: str
) -> None:
    for file in (*library.SOURCES, *library.HEADERS):
        shutil.copy(file, tmp_path)
    text = (tmp_path / name).read_text()
    assert text.count(right) == 1
    (tmp_path / name).write_text(text.replace(right, wrong))
    monkeypatch.setattr(library, "FLAGS", QUICK)  # there are three attempts
    for files in ("SOURCES", "HEADERS"):
        monkeypatch.setattr(library, files, tuple(tmp_path / file.name for file in getattr(library, files)))
    assert find_library() == "the C sources of lightcl cannot be compiled (what it computes is wrong)"


@toys.needs_compiler
def test_processes_that_compile_at_once(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD], stdout=subprocess.PIPE, text=True,
            env=dict(os.environ, LIGHTCL_CACHE=str(tmp_path)),
        )
        for _ in range(3)
    ]  # fmt: skip
    assert [process.communicate()[0].strip() for process in started] == ["loaded"] * 3
    assert len(list((tmp_path / "native").iterdir())) == 1

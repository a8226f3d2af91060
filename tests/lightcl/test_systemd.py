"""Paths in systemd units: by hand, and as systemd itself reads them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lightcl.systemd import argument_word, escaped, program_word


def test_paths_as_words() -> None:
    assert escaped("a 100% name") == "a 100%% name"
    assert argument_word(Path("/etc/device.toml")) == "/etc/device.toml"
    assert argument_word(Path("/a b/100%")) == '"/a b/100%%"'
    assert argument_word(Path("/it's/$HOME")) == '"/it\'s/$$HOME"'
    assert argument_word(Path('/a"b\\c')) == '"/a\\"b\\\\c"'
    assert argument_word(Path("/a;b")) == '"/a;b"'
    assert argument_word(Path("/a\tb\nc")) == '"/a\\tb\\nc"'
    assert program_word(Path("/$HOME/it's")) == '"/$HOME/it\'s"'


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here")
@pytest.mark.parametrize("name", ["plain", "a b", "$HOME", "50%", "a;b"])
def test_systemd_finds_the_program(tmp_path: Path, name: str) -> None:
    """Quotes, backslashes and control characters in the path of a program are refused by systemd itself."""
    program = tmp_path / name / "program"
    program.parent.mkdir()
    program.symlink_to("/bin/true")
    assert verified(tmp_path, program, tmp_path) == (0, "")
    program.unlink()
    assert "is not executable" in verified(tmp_path, program, tmp_path)[1], "systemd looks for the program"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here")
@pytest.mark.parametrize("name", ["it's", 'a"b', "a\\b", "a b\tc\nd", "50% of $HOME; it's"])
def test_systemd_reads_the_argument(tmp_path: Path, name: str) -> None:
    assert verified(tmp_path, Path("/bin/true"), Path(name)) == (0, "")


def verified(folder: Path, program: Path, argument: Path) -> tuple[int, str]:
    unit = folder / "one.service"
    unit.write_text(f"[Service]\nExecStart={program_word(program)} {argument_word(argument)}\n")
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr

"""The systemd unit of a server, and the table of its boards."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from server.commands.devices import row_of
from server.link.devices import Device
from server.link.flower import Node
from server.link.folder import ServerFolder, Settings
from tests.simulations.test_command_line import lightcl


def make(place: Path) -> ServerFolder:
    settings = Settings("127.0.0.1", devices=1, insecure=True)
    return ServerFolder.create(place, settings, ["127.0.0.1"], overwrite=False)


def test_the_unit_is_one_that_systemd_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "a server of 100%")
    home = tmp_path / "a home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    assert lightcl(monkeypatch, "server", "install", "--print", "--folder", folder.path) == 0
    text = capfd.readouterr().out
    assert f'server run --folder "{tmp_path}/a server of 100%%"\n' in text
    assert "\nRestart=always\n" in text
    assert "\nUser=" in text
    assert f"\nWorkingDirectory={home}\n" in text
    assert not (home / ".config").exists(), "--print writes nothing"
    assert lightcl(monkeypatch, "server", "install", "--user", "--folder", folder.path) == 0
    file = home / ".config" / "systemd" / "user" / "lightcl-server.service"
    assert "\nUser=" not in file.read_text()
    assert "systemctl --user daemon-reload" in capfd.readouterr().out
    if shutil.which("systemd-analyze"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # without one it looks at nothing
        done = subprocess.run(
            ["systemd-analyze", "verify", "--user", file], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_a_unit_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "server")
    (tmp_path / ".config").write_text("a file in the way")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lightcl(monkeypatch, "server", "install", "--user", "--folder", folder.path) == 2
    assert "--print" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("node", "nodes", "known", "registered", "state"),
    [
        ("", {}, True, "no", ""),
        ("5", {"5": Node("5", "registered", "")}, True, "yes", "never seen"),
        ("5", {"5": Node("5", "online", "now")}, True, "yes", "online"),
        ("5", {"6": Node("6", "online", "now")}, True, "no", ""),
        ("5", {}, False, "yes", ""),
        ("", {}, False, "no", ""),
    ],
)
def test_what_the_table_says_of_a_board(
    node: str, nodes: dict[str, Node], known: bool, registered: str, state: str
) -> None:
    row = row_of(Device("a", 0, "key", "then", node), nodes, known=known, keys=True)
    assert (row["registered"], row["state"]) == (registered, state)

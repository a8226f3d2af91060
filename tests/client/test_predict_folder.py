"""Where `lightcl device predict` and `serve` look for a board's models."""

from pathlib import Path

import pytest

from client.board.config import BoardConfig
from client.commands.shared import state_folder


def test_the_folder_given_comes_first_then_the_configuration_then_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "device.toml"
    monkeypatch.setenv("LIGHTCL_DEVICE", str(file))
    monkeypatch.setenv("LIGHTCL_STATE", str(tmp_path / "default"))
    assert state_folder(None) == tmp_path / "default"
    file.write_text(BoardConfig("a", 0, 1, "b:1", state=str(tmp_path / "own"), insecure=True).to_toml())
    assert state_folder(None) == tmp_path / "own"
    assert state_folder(tmp_path / "given") == tmp_path / "given"

"""`lightcl cache`: warm, ls, clear."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simulations.test_command_line import lightcl

VIEWS = ("--set", "data.views=2", "--set", "data.augmentation=crop")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTCL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text("network: {weights: none, width: 4, freeze: layer3}\ndevice: {accelerator: cpu}\n")
    return file


def test_warm_ls_and_clear(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Digits: 1,797 images, of which 359 become the test split."""
    assert lightcl(monkeypatch, "cache", "warm", scenario, *VIEWS) == 0
    assert "cached: 4673 prefix outputs" in capsys.readouterr().out  # 359 + 3 x 1438
    assert lightcl(monkeypatch, "cache", "ls") == 0
    printed = capsys.readouterr().out
    assert "359 of 359" in printed
    assert printed.count("1438 of 1438") == 3
    assert "1 (crop, seed 0)" in printed
    assert "resnet18, width 4, up to layer3" in printed
    keys = sorted(folder.name for folder in (tmp_path / "cache" / "prefix").glob("*/"))
    assert lightcl(monkeypatch, "cache", "clear", keys[0]) == 0
    assert sorted(folder.name for folder in (tmp_path / "cache" / "prefix").glob("*/")) == keys[1:]
    assert lightcl(monkeypatch, "cache", "clear") == 0
    capsys.readouterr()
    assert lightcl(monkeypatch, "cache", "ls") == 0
    assert "0 stores, 0.0 MB" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["nothing", "*", ".."])
def test_a_store_that_is_not_there(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lightcl(monkeypatch, "cache", "clear", key) == 2
    assert f"the cache has no store '{key}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ((), "this scenario uses no prefix cache"),
        ((*VIEWS, "--set", "device.prefix_cache_gb=0.0001"), "device.prefix_cache_gb is 0.0001"),
        ((*VIEWS, "--set", "device.prefix_cache=off"), "this scenario uses no prefix cache"),
    ],
)
def test_scenarios_whose_cache_cannot_be_warmed(
    scenario: Path,
    changes: tuple[str, ...],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert lightcl(monkeypatch, "cache", "warm", scenario, *changes) == 2
    assert text in capsys.readouterr().err

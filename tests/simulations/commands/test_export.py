"""`lightcl export`: what it prints, and what a wrong request gets before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.simulations.test_command_line import SCENARIO, lightcl


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(SCENARIO)
    assert lightcl(monkeypatch, "train", "tiny.yaml", "--device", 1, "--out", "run", "--no-report") == 0
    return tmp_path / "run"


def test_export_of_a_run(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: object, code: int) -> str:
        capsys.readouterr()
        assert lightcl(monkeypatch, "export", *words) == code
        printed = capsys.readouterr()
        return printed.out + printed.err

    made = said("run", "--format", "torchscript", "--images", 400, code=0)
    assert "run-device-1.pt: device 1, task 1, epoch 1 of 1, 4 classes" in made
    assert "compared with PyTorch on 400 images: largest difference of a score" in made  # 359 test images, 41 others
    assert "same prediction on 100.0%" in made
    files = sorted(file.name for file in run.parent.iterdir())
    assert files == ["run", "run-device-1.pt", "tiny.yaml"]

    assert "run-device-1.pt exists; replace it with --overwrite" in said("run", "--format", "torchscript", code=2)
    assert "device 1" in said("run", "--format", "torchscript", "--overwrite", "--images", 10, code=0)
    assert "--format is 'tflite'; allowed: onnx, torchscript" in said("run", "--format", "tflite", code=2)
    assert "allowed: 1, which this run trained alone" in said("run", "--format", "onnx", "--device", 0, code=2)
    assert "no model is here" in said("tiny.yaml", "--format", "onnx", code=2)
    assert "is a folder; name a file" in said("run", "--format", "torchscript", "--out", "run", code=2)
    refused = said("run", "--format", "torchscript", "--out", "tiny.yaml/model.pt", code=2)
    assert "--out: tiny.yaml/model.pt cannot be written to" in refused
    assert sorted(file.name for file in run.parent.iterdir()) == files


def test_a_damaged_state_is_a_wrong_request_since_no_run_was_started(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (run / "devices").rglob("*.json"):
        file.write_text("{")
    capsys.readouterr()
    assert lightcl(monkeypatch, "export", "run", "--format", "torchscript") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "the run failed" not in said
    assert "state.json" in said

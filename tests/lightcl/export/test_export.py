"""Exported files answer as the device does in PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from lightcl.data.sources import load_source
from lightcl.data.tasks import Batch
from lightcl.errors import Failure, RequestError
from lightcl.export import formats
from lightcl.export.checked import Comparison, compare, export, real_images
from lightcl.export.folders import find_model
from lightcl.export.model import Model, read_model
from lightcl.methods import Method
from lightcl.methods.parts.fused import quarters
from tests.lightcl.export.trained import WIDTH, scenario, train

SPARSE = {"method": {"name": "lightcl-sparse", "channel_sparsity": {"layer3": 0.5, "layer4": 0.5}}}


def opened(folder: Path) -> Model:
    return read_model(*find_model(folder))


def thousand(model: Model) -> np.ndarray:
    return real_images(load_source(model.about.scenario.source_request()), 1000, seed=0)


@pytest.mark.parametrize(
    ("method", "sections"),
    [
        pytest.param("lightcl", {}, marks=pytest.mark.slow),  # a part of lightcl-plus and of lightcl-sparse
        ("lightcl-plus", {}),
        pytest.param(
            "lightcl-plus",
            {"method": {"name": "lightcl-plus", "suffix_weight": 0.5, "statistics_mb": 0.02}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sgd",
            {"network": {"weights": "none", "width": WIDTH, "frozen_batch_norm": "train"}},
            marks=pytest.mark.slow,
        ),
        ("lightcl-sparse", SPARSE),
    ],
)
def test_onnxruntime_answers_as_pytorch_on_a_thousand_images(method: str, sections: dict, tmp_path: Path) -> None:
    device = train(scenario(method, **sections), tmp_path / "state")
    model = opened(tmp_path / "state")
    file, images = tmp_path / "model.onnx", thousand(model)
    found = export(model, "onnx", file, images)
    assert found.images == found.same == 1000
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    floats = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    scores = session.run(["scores"], {"images": floats})[0]  # a batch of 1,000: the batch dimension is free
    assert len(session.run(["scores"], {"images": floats[:1]})[0]) == 1
    # The device that trained, and not the model that was read from its state.
    device.network.eval()
    with torch.no_grad():
        batch = Batch(torch.from_numpy(images).permute(0, 3, 1, 2), torch.zeros(1000, dtype=torch.int64))
        expected = device.method.predict(batch).softmax(1).numpy()
    assert np.abs(scores - expected).max() <= 1e-4
    assert (scores.argmax(1) == expected.argmax(1)).all()
    assert len(set(expected.argmax(1))) > 2, "the device has learned to tell some classes apart"
    graph = onnx.load(file)
    onnx.checker.check_model(graph)
    about = json.loads({entry.key: entry.value for entry in graph.metadata_props}["lightcl"])
    assert about["classes"] == [str(digit) for digit in range(10)]
    assert (about["model"]["task"], about["model"]["epochs"], about["input"]["height"]) == (1, 1, 8)
    assert about["network"]["pruned"] == (method == "lightcl-sparse")
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


PLAIN_PROCESS = """
import json, sys
sys.modules["lightcl"] = None  # an import of it, also by the file, would fail
import torch
extra = {"lightcl.json": ""}
model = torch.jit.load(sys.argv[1], _extra_files=extra)
images = torch.load(sys.argv[2], weights_only=True)
about = json.loads(extra["lightcl.json"])
print(json.dumps({"classes": about["classes"], "best": model(images).argmax(1).tolist()}))
"""


def test_torchscript_runs_in_a_process_without_lightcl(tmp_path: Path) -> None:
    train(scenario("lightcl-plus"), tmp_path / "state")
    model = opened(tmp_path / "state")
    images = thousand(model)
    found = export(model, "torchscript", tmp_path / "model.pt", images)
    assert found.images == found.same == 1000
    torch.save(torch.from_numpy(images[:50]).permute(0, 3, 1, 2).float() / 255, tmp_path / "images.pt")
    words = [sys.executable, "-W", "ignore", "-c", PLAIN_PROCESS, tmp_path / "model.pt", tmp_path / "images.pt"]
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    printed = json.loads(ran.stdout)
    assert printed["best"] == model.scores(images[:50]).argmax(1).tolist()
    assert printed["classes"] == list(model.about.classes)


def test_safetensors_hold_the_network_under_torchvisions_names(tmp_path: Path) -> None:
    train(scenario("sgd"), tmp_path / "state")
    model = opened(tmp_path / "state")
    file = tmp_path / "model.safetensors"
    assert export(model, "safetensors", file, thousand(model)).passed
    with safe_open(file, "pt") as stored:
        assert torch.equal(stored.get_tensor("layer4.1.conv2.weight"), model.network.layer4[1].conv2.weight)
        assert torch.equal(stored.get_tensor("head.weight"), model.network.fc.weight)
        about = json.loads(stored.metadata()["lightcl"])
    assert about["input"]["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3])  # gray
    assert about["method"] == "sgd"


def test_the_check_by_hand() -> None:
    """Two images, two classes; the file is 0.25 off in one score and predicts the other class there."""

    class Known:
        def scores(self, images: np.ndarray) -> np.ndarray:
            return np.asarray([[0.9, 0.1], [0.625, 0.375]][: len(images)], dtype=np.float32)

    images = np.zeros((2, 8, 8, 1), dtype=np.uint8)

    def run(floats: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.9, 0.1], [0.375, 0.625]])[: len(floats)]

    assert compare(Known(), run, images) == Comparison(2, 0.25, 1)
    assert not Comparison(2, 0.25, 2).passed
    assert not Comparison(2, 1e-5, 1).passed
    assert not Comparison(2, float("nan"), 2).passed
    assert not Comparison(0, 0.0, 0).passed
    assert Comparison(2, 1e-4, 2).passed


def test_a_file_that_answers_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(scenario("sgd"), tmp_path / "state", tasks=1)
    model = opened(tmp_path / "state")
    module = formats.export_module(model)
    with torch.no_grad():
        module.inference.head.bias[0] += 0.01
    monkeypatch.setattr("lightcl.export.checked.export_module", lambda model: module)
    with pytest.raises(Failure, match="does not answer as PyTorch does: the largest difference of a score is"):
        export(model, "torchscript", tmp_path / "model.pt", thousand(model)[:20])
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_the_model_is_not_changed_by_an_export(tmp_path: Path) -> None:
    train(scenario("lightcl-plus"), tmp_path / "state", tasks=1)
    model = opened(tmp_path / "state")
    images = thousand(model)[:20]
    before = model.scores(images)
    export(model, "safetensors", tmp_path / "model.safetensors", images)
    assert np.array_equal(model.scores(images), before)


@pytest.mark.parametrize("size", range(1, 8))
def test_quarters_are_those_of_adaptive_pooling(size: int) -> None:
    maps = torch.rand(3, 5, size, size + 1)
    assert torch.allclose(quarters(maps), F.adaptive_avg_pool2d(maps, 2).flatten(1), atol=1e-6)


def test_a_class_that_nobody_has_shown_scores_zero(tmp_path: Path) -> None:
    """After task 0 of two, classes 5 to 9 have no samples: `predict` gives minus infinity, the file 0."""
    train(scenario("lightcl-plus"), tmp_path / "state", tasks=1)
    model = opened(tmp_path / "state")
    images = thousand(model)
    assert export(model, "torchscript", tmp_path / "model.pt", images).passed
    scores = torch.jit.load(tmp_path / "model.pt")(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    assert (scores[:, 5:] == 0).all()
    assert torch.allclose(scores.sum(1), torch.ones(1000))


def test_a_format_that_is_not_known_and_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="--format is 'tflite'; allowed: onnx, torchscript, safetensors, executorch"):
        formats.find_format("tflite")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RequestError, match=r"onnxscript is needed for --format onnx .* 'lightcl-fleet\[export\]'"):
        formats.find_format("onnx")
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(RequestError, match="executorch is needed for --format executorch and is not installed"):
        formats.find_format("executorch")


def test_a_method_with_its_own_predict_has_to_say_how_it_is_exported(tmp_path: Path) -> None:
    class Own(Method):
        def predict(self, batch: Batch) -> torch.Tensor:
            return -self.logits_of(batch)

    device = train(scenario("sgd"), tmp_path / "state", tasks=1)
    with pytest.raises(RequestError, match=r"method sgd cannot be exported: it overrides Method\.predict"):
        Own(device.network, device.method.parameters).inference()

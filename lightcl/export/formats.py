"""The files that a model is exported to: one writer and one runner per format.

Every file takes float32 images `[N, C, H, W]` in 0..1, N free, and answers with the softmax over all classes,
`[N, classes]`. The normalization is inside. The label names and everything else that a program needs to know stand in
the file as JSON under the key `lightcl` (`metadata`). A safetensors file has no graph: its tensors are the network's,
under torchvision's names for a ResNet.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightcl.errors import RequestError, required
from lightcl.export.model import BATCH, Model

KEY = "lightcl"
"""The key of the metadata in every format."""
INPUT, OUTPUT = "images", "scores"
OPSET = 18
"""Of ONNX; TensorRT 10 reads up to 20."""
FORMAT_VERSION = 1

Run = Callable[[Tensor], Tensor]
"""Images `[N, C, H, W]` in 0..1 to scores `[N, classes]`, computed from a file."""


class Scores(nn.Module):
    """What is exported: the method's logits, and their softmax."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.inference = model.method.inference()

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.inference(images).softmax(1)
        return scores


@dataclass(frozen=True)
class Format:
    """`write(network, example, file, metadata)` makes the file; `open(file, network)` runs it, for the check."""

    suffix: str
    libraries: tuple[str, ...]
    write: Callable[[Scores, Tensor, Path, str], None]
    open: Callable[[Path, Scores], Run]


def metadata(model: Model) -> str:
    """What a program that uses the file needs to know, as JSON."""
    about, network = model.about, model.network
    values: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "classes": list(about.classes),
        "input": {
            "name": INPUT, "layout": "NCHW", "type": "float32", "range": [0.0, 1.0],
            "channels": "gray" if about.channels == 1 else "RGB", "height": about.height, "width": about.width,
            "resize": "bilinear", "normalization": "inside the network",
        },
        "output": {"name": OUTPUT, "meaning": "softmax over the classes"},
        "model": model.version_values,
        "scenario": about.scenario.name,
        "method": about.scenario.method.name,
        "network": {
            "name": about.scenario.network.name, "width": network.width, "stem": network.stem_kind,
            "pruned": bool(network.kept_channels),
        },
    }  # fmt: skip
    stem = getattr(network, "input_stem", None)
    if stem is not None:
        values["input"] |= {"mean": stem.mean.flatten().tolist(), "std": stem.std.flatten().tolist()}
    return json.dumps(values)


def find_format(name: str) -> Format:
    """The format of this name. Raises RequestError for an unknown one, MissingLibrary where its library is missing."""
    if name not in FORMATS:
        raise RequestError(f"--format is {name!r}; allowed: {', '.join(FORMATS)}")
    for library in FORMATS[name].libraries:
        required(library, "executorch" if library == "executorch" else "export", f"for --format {name}")
    return FORMATS[name]


def export_module(model: Model) -> Scores:
    """The module to export: a copy in evaluation mode, in PyTorch's default memory format."""
    network = copy.deepcopy(Scores(model)).to(memory_format=torch.contiguous_format)
    return network.eval().requires_grad_(False)


# -- ONNX ----------------------------------------------------------------------------------------------------------


def _write_onnx(network: Scores, example: Tensor, file: Path, about: str) -> None:
    with _quiet():
        program = torch.onnx.export(
            network, (example,), dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props[KEY] = about
    program.save(file, external_data=False)


def _open_onnx(file: Path, network: Scores) -> Run:
    runtime = required("onnxruntime", "export", "to check the exported file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    return run


# -- TorchScript ---------------------------------------------------------------------------------------------------


def _write_torchscript(network: Scores, example: Tensor, file: Path, about: str) -> None:
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, file, _extra_files={f"{KEY}.json": about})


def _open_torchscript(file: Path, network: Scores) -> Run:
    with _quiet():
        loaded: Run = torch.jit.load(file, map_location="cpu")  # type: ignore[no-untyped-call]
    return loaded


# -- safetensors ---------------------------------------------------------------------------------------------------


def _tensors_of(network: Scores) -> dict[str, Tensor]:
    """All tensors under short names: the network's own, without the names of its two stages."""
    names = network.inference.state_dict()
    return {name.removeprefix("prefix.").removeprefix("suffix."): tensor for name, tensor in names.items()}


def _write_safetensors(network: Scores, example: Tensor, file: Path, about: str) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in _tensors_of(network).items()}
    file.write_bytes(save(tensors, {KEY: about}))  # `save_file` leaves a file that only its owner may read


def _open_safetensors(file: Path, network: Scores) -> Run:
    """The network with the file's tensors in the place of its own, which are erased first."""
    fresh = copy.deepcopy(network)
    with safe_open(file, "pt") as stored, torch.no_grad():
        for name, tensor in _tensors_of(fresh).items():
            tensor.zero_()
            tensor.copy_(stored.get_tensor(name))
    return fresh


# -- ExecuTorch ----------------------------------------------------------------------------------------------------


def _write_executorch(network: Scores, example: Tensor, file: Path, about: str) -> None:
    exir = required("executorch.exir", "executorch", "for --format executorch")
    largest = example.new_zeros(BATCH, *example.shape[1:])  # memory is planned for the batch of the example
    with _quiet():
        batch = torch.export.Dim("batch", max=BATCH)
        program = torch.export.export(network, (largest,), dynamic_shapes=({0: batch},))
        edge = exir.to_edge_transform_and_lower(program, constant_methods={KEY: about})
        file.write_bytes(edge.to_executorch().buffer)


def _open_executorch(file: Path, network: Scores) -> Run:
    runtime = required("executorch.runtime", "executorch", "to check the exported file")
    method = runtime.Runtime.get().load_program(file).load_method("forward")

    def run(images: Tensor) -> Tensor:
        scores: Tensor = method.execute([images])[0]
        return scores

    return run


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _open_onnx),
    "torchscript": Format(".pt", (), _write_torchscript, _open_torchscript),
    "safetensors": Format(".safetensors", (), _write_safetensors, _open_safetensors),
    "executorch": Format(".pte", ("executorch",), _write_executorch, _open_executorch),
}
"""All formats by name."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of PyTorch's exporters, which are for their developers; errors are raised all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

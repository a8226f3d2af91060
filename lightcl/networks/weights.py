"""Pre-trained weights: finding, checking, loading and writing them. safetensors only, never pickle."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightcl.errors import RequestError, required
from lightcl.networks.staged import Backbone, Stage

DISTRIBUTION = "lightcl-fleet"
BUILTIN = "resnet18-w20-tiny-imagenet-32.safetensors"
OTHER_NETWORK = (
    "the weights are for another network; name a file of weights for this one, or set network.weights=none to train "
    "from scratch"
)


def find_builtin() -> Path:
    """The weights that ship with the package.

    Flower unpacks an app's code without its binary files and puts it before the installed package on the path. So this
    looks beside this module first, and then where the installed distribution's metadata says. Raises RequestError if
    the file is in neither place.
    """
    inside = Path("lightcl", "networks", "weights", BUILTIN)
    candidates = [Path(__file__).parent / "weights" / BUILTIN]
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        candidates.append(Path(str(distribution.locate_file(str(inside)))))
        origin = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
        if origin.startswith("file:"):  # an editable install: the files stay in the checkout
            candidates.append(Path(url2pathname(urlparse(origin).path)) / inside)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise RequestError(
        f"network.weights: the built-in weights {BUILTIN} were not found (looked in "
        f"{', '.join(str(c) for c in candidates)}); install the package ('pip install .') or name a file"
    )


def load_weights(network: Backbone, file: Path, *, head: bool) -> None:
    """Loads a safetensors file into `network`, with or without the file's head, whose classes are those of its data.

    A network with one input channel loads three-channel weights summed over colors: on a gray image that is the same
    function except for the normalization, which is then the mean over colors. Raises RequestError naming the tensor
    for a file that does not fit.
    """
    load_tensors(network, read_weights(file), str(file), head=head)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises RequestError where it is missing or not safetensors."""
    if not file.is_file():
        raise RequestError(f"network.weights: no such file: {file}")
    try:
        return load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise RequestError(f"{file}: not a safetensors file ({error})") from error


def read_torchvision() -> dict[str, Tensor]:
    """torchvision's ImageNet weights of ResNet-18 (downloaded on first use): width 64 and the ImageNet stem."""
    models = required("torchvision.models", "data", "for network.weights 'imagenet'")
    try:
        stored = models.ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise RequestError(
            f"network.weights 'imagenet': the download failed ({error}); save them as safetensors and name that file"
        ) from error
    return dict(stored)


def load_tensors(network: Backbone, stored: Mapping[str, Tensor], origin: str, *, head: bool) -> None:
    """Copies `stored` into the network by name; `origin` is named in errors."""
    wanted = network.state_dict()
    skipped = set() if head else {f"{network.head_name}.weight", f"{network.head_name}.bias"}
    unknown = stored.keys() - wanted.keys()
    if unknown:
        name = min(unknown)
        raise RequestError(f"{origin}: tensor {name!r} is not in this network; {OTHER_NETWORK}")
    with torch.no_grad():
        for name, target in wanted.items():
            if name.endswith("num_batches_tracked") or name in skipped:
                continue
            source = stored.get(name)
            if source is None:
                raise RequestError(f"{origin}: tensor {name!r} is missing; {OTHER_NETWORK}")
            if not source.is_floating_point():
                raise RequestError(
                    f"{origin}: tensor {name!r} is {str(source.dtype).removeprefix('torch.')}; allowed: floating point"
                )
            if name == "conv1.weight" and source.ndim == 4 and source.shape[1] == 3 and target.shape[1] == 1:
                source = source.float().sum(1, keepdim=True)
            if source.shape != target.shape:
                advice = "; leave network.width and network.stem out to use the file's"
                raise RequestError(
                    f"{origin}: tensor {name!r} has shape {list(source.shape)}, this network "
                    f"(width {network.width}, stem {network.stem_kind!r}) needs {list(target.shape)}"
                    f"{advice if name == 'conv1.weight' else ''}"
                )
            if not source.float().isfinite().all():
                raise RequestError(f"{origin}: tensor {name!r} holds NaN or infinity; allowed: finite values")
            target.copy_(source)


def save_weights(network: Backbone, file: Path, metadata: Mapping[str, str]) -> None:
    """Writes the network as fp16 safetensors (half the size; the rounding is far below the noise of training)."""
    tensors = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata=dict(metadata))


def digest(stage: Stage) -> str:
    """Digest of a stage's parameters and buffers: equal on two devices exactly if their prefixes are equal."""
    return stage.derive("digest", lambda: _digest(stage))


def _digest(stage: Stage) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(stage.state_dict().items()):
        if tensor.is_floating_point():
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]

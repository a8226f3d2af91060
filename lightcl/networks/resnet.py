"""ResNet-18 cut into three stages: a frozen prefix, a trained suffix and a linear head.

Parameter and buffer names are those of torchvision's ResNet (`conv1`, `bn1`, `layer1.0.conv1`, `downsample`, `fc`), so
its ImageNet weights load into the variant with the ImageNet stem. He et al., "Deep Residual Learning", CVPR 2016.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightcl.errors import RequestError, nearest

Stem = Literal["cifar", "imagenet"]
FeatureMaps = dict[str, Tensor]

# Normalisation belongs to the network, not to the data: the frozen prefix expects the statistics it was trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InputStem(nn.Module):
    """The first convolution with its batch-norm; a block like any other to the stages.

    It holds no parameters of its own: `conv1` and `bn1` are registered on the network under torchvision's names.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, pool: bool) -> None:
        super().__init__()
        self.pool = pool
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        if channels == 1:
            mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, -1, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 images `[N, C, H, W]` in 0..255 (or floats in 0..1) to normalised floats of the same shape."""
        if images.dtype == torch.uint8:  # the copy is ours: no second one is made of it
            return images.float().div_(255).sub_(self.mean).div_(self.std)
        return (images - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut. The outputs of both, after ReLU, are its two feature maps."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor, both: bool = True) -> tuple[Tensor | None, Tensor]:
        """`[N, C_in, H, W]` -> (map after the first ReLU, map after the second), both `[N, C, H', W']`.

        Without `both` the first map is let go as soon as it is read: where no graph holds it, as in a frozen block,
        that is a quarter of the block's memory.
        """
        first: Tensor | None = F.relu(self.bn1(self.conv1(x)), inplace=True)
        shortcut = x if self.downsample is None else self.downsample(x)
        second = self.conv2(first)
        if not both:
            first = None
        return first, F.relu(self.bn2(second).add_(shortcut), inplace=True)


@dataclass(frozen=True)
class Stage:
    """A run of consecutive blocks of one network, addressed as a whole."""

    network: StagedResNet
    blocks: tuple[str, ...]

    def __call__(self, x: Tensor, maps: FeatureMaps | None = None) -> Tensor:
        """Runs `[N, C, H, W]` through the blocks; fills `maps` with every block's feature maps where given."""
        for name in self.blocks:
            x = self.network.run_block(name, x, maps)
        return x

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for name in self.blocks:
            yield from self.network.block_modules(name)

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, module in self.named_modules():
            yield from module.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers of this stage under the network's names; the tensors are the live ones."""
        return {
            f"{name}.{key}": tensor
            for name, module in self.named_modules()
            for key, tensor in module.state_dict(keep_vars=False).items()
        }

    def train(self, mode: bool) -> None:
        for _, module in self.named_modules():
            module.train(mode)

    @property
    def map_names(self) -> tuple[str, ...]:
        """Names of the feature maps, in order; the stem has none."""
        return tuple(f"{name}.relu{i}" for name in self.blocks if name != "stem" for i in (1, 2))


class StagedResNet(nn.Module):
    """ResNet of basic blocks: `head ∘ suffix ∘ prefix`.

    `forward` takes uint8 or [0, 1] float images `[N, in_channels, H, W]` and gives logits `[N, classes]`.
    The prefix (every block up to and including `freeze`) is frozen: no gradients, and batch-norm in evaluation mode
    unless `frozen_batch_norm="train"` (the paper's way, in which its running statistics drift).
    """

    def __init__(
        self,
        *,
        width: int = 64,
        classes: int = 10,
        in_channels: int = 3,
        stem: Stem = "cifar",
        freeze: str = "layer3",
        frozen_batch_norm: Literal["eval", "train"] = "eval",
        blocks_per_layer: tuple[int, ...] = (2, 2, 2, 2),
    ) -> None:
        super().__init__()
        self.width, self.classes, self.in_channels, self.stem_kind = width, classes, in_channels, stem
        self.frozen_batch_norm = frozen_batch_norm
        big = stem == "imagenet"
        self.conv1 = nn.Conv2d(in_channels, width, 7 if big else 3, 2 if big else 1, 3 if big else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.input_stem = InputStem(in_channels, pool=big)
        previous = width
        for index, count in enumerate(blocks_per_layer):
            channels = width * 2**index
            layer = nn.Sequential()
            for i in range(count):
                layer.append(BasicBlock(previous, channels, stride=2 if i == 0 and index > 0 else 1))
                previous = channels
            self.add_module(f"layer{index + 1}", layer)
        self.fc = nn.Linear(previous, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.layer_names = tuple(f"layer{i + 1}" for i in range(len(blocks_per_layer)))
        self.kept_channels: dict[str, Tensor] = {}
        """Original indices of the channels left, by channel set (lightcl/pruning.py); empty: all are there."""
        self.freeze(freeze)

    # -- stages ------------------------------------------------------------------------------------------------

    # A stage holds its network. Were it kept here, the two would hold each other, and every network that a process is
    # done with would stay in memory until Python's rare full collection.

    @property
    def prefix(self) -> Stage:
        return Stage(self, self._frozen)

    @property
    def suffix(self) -> Stage:
        return Stage(self, self._trained)

    @property
    def block_names(self) -> tuple[str, ...]:
        """Every block in order: stem, layer1.0, layer1.1, layer2.0 ..."""
        inner = [f"{layer}.{i}" for layer in self.layer_names for i in range(len(self.get_submodule(layer)))]  # type: ignore[arg-type]
        return ("stem", *inner)

    def freeze(self, point: str) -> None:
        """Cuts the network after block `point`: a block's name, a layer's (its last block) or "none".

        Raises RequestError where the network has no such block.
        """
        names = self.block_names
        boundaries = {"none": 0} | {name: i + 1 for i, name in enumerate(names)}
        for layer in self.layer_names:
            boundaries[layer] = max(i + 1 for i, name in enumerate(names) if name.rpartition(".")[0] == layer)
        if point not in boundaries:
            raise RequestError(
                f"network.freeze {point!r} is not a block of this network{nearest(point, boundaries)} "
                f"(allowed: {', '.join(boundaries)})"
            )
        cut = boundaries[point]
        self._frozen, self._trained = names[:cut], names[cut:]
        for parameter in self.prefix.parameters():
            parameter.requires_grad_(False)
        for parameter in self.suffix.parameters():
            parameter.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.prefix.train(mode and self.frozen_batch_norm == "train")
        return self

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def block_modules(self, name: str) -> tuple[tuple[str, nn.Module], ...]:
        """The modules with parameters that make up a block, under their names in the state dict."""
        if name == "stem":
            return (("conv1", self.conv1), ("bn1", self.bn1))
        return ((name, self.get_submodule(name)),)

    def map_channels(self, name: str) -> int:
        """Channels of a feature map, e.g. of `layer3.1.relu2`."""
        block, _, relu = name.rpartition(".relu")
        channels: int = getattr(self.get_submodule(block), f"bn{relu}").num_features
        return channels

    def run_block(self, name: str, x: Tensor, maps: FeatureMaps | None = None) -> Tensor:
        if name == "stem":
            x = F.relu(self.bn1(self.conv1(self.input_stem.normalise(x))), inplace=True)
            return F.max_pool2d(x, 3, 2, 1) if self.input_stem.pool else x
        first, second = self.get_submodule(name)(x, maps is not None)
        if maps is not None:
            maps[f"{name}.relu1"], maps[f"{name}.relu2"] = first, second
        result: Tensor = second
        return result

    # -- forward -----------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The frozen prefix's outputs `[N, C, H, W]`, without a graph."""
        if not self.prefix.blocks:
            return images
        with torch.no_grad():
            return self.prefix(images)

    def classify(self, features: Tensor, maps: FeatureMaps | None = None) -> Tensor:
        """Prefix outputs to logits `[N, classes]`; fills `maps` with the suffix's feature maps where given."""
        logits: Tensor = self.fc(self.suffix(features, maps).mean((2, 3)))
        return logits

"""ResNet-18 cut into three stages: a frozen prefix, a trained suffix and a linear head.

Parameter and buffer names are those of torchvision's ResNet (`conv1`, `bn1`, `layer1.0.conv1`, `downsample`, `fc`), so
its ImageNet weights load into the variant with the ImageNet stem. He et al., "Deep Residual Learning", CVPR 2016.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightcl.networks import register_backbone
from lightcl.networks.convolution import Conv3x3
from lightcl.networks.staged import Backbone, ChannelSet, OnMap
from lightcl.networks.unit import activated, fused, unit

Stem = Literal["cifar", "imagenet"]

MASKABLE = ("conv1.weight", "conv2.weight")

# Normalization belongs to the network, not to the data: the frozen prefix expects the statistics it was trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InputStem(nn.Module):
    """Normalization of the images, and the pooling of the ImageNet stem. It holds no parameters."""

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

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images `[N, C, H, W]` in 0..255 (or floats in 0..1) to normalized floats of the same shape."""
        if images.dtype == torch.uint8:  # the float copy is new, so it may be changed in place
            return images.float().div_(255).sub_(self.mean).div_(self.std)
        return (images - self.mean) / self.std


class StemBlock(nn.Module):
    """The first convolution and its batch-norm as a block.

    The modules belong to the network, which registers them under torchvision's names.
    """

    def __init__(self, stem: InputStem, convolution: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.input_stem, self.conv1, self.bn1 = stem, convolution, norm

    def forward(self, images: Tensor, on_map: OnMap | None = None) -> Tensor:
        x = unit(self.conv1, self.bn1, self.input_stem.normalize(images))
        return F.max_pool2d(x, 3, 2, 1) if self.input_stem.pool else x


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut. The outputs of both, after ReLU, are its two feature maps."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = Conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor, on_map: OnMap | None = None) -> Tensor:
        """`[N, C_in, H, W]` -> `[N, C, H', W']`, the map after the second ReLU; `on_map` gets both maps.

        Without `on_map` the first map is released right after its use: where no graph keeps it, as in a frozen block,
        that is a quarter of the block's memory.
        """
        first = unit(self.conv1, self.bn1, x)
        shortcut = x if self.downsample is None else self.downsample(x)
        second = fused(self.conv2, self.bn2, first, shortcut)
        if second is None:
            second = self.conv2(first)
            if on_map is None:
                del first
            second = activated(self.bn2, second, shortcut)
        if on_map is not None:
            del shortcut  # not needed while the maps are processed
            on_map("relu1", first)
            on_map("relu2", second)
        return second


@register_backbone("resnet18")
class StagedResNet(Backbone):
    """ResNet of basic blocks."""

    head_name = "fc"

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
        super().__init__(
            width=width, classes=classes, in_channels=in_channels, stem=stem, frozen_batch_norm=frozen_batch_norm
        )
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
        self.freeze(freeze)

    @property
    def block_names(self) -> tuple[str, ...]:
        """stem, layer1.0, layer1.1, layer2.0 ..."""
        inner = [f"{layer}.{i}" for layer in self.layer_names for i in range(len(self.get_submodule(layer)))]  # type: ignore[arg-type]
        return ("stem", *inner)

    def block(self, name: str) -> nn.Module:
        return StemBlock(self.input_stem, self.conv1, self.bn1) if name == "stem" else self.get_submodule(name)

    def block_modules(self, name: str) -> Mapping[str, nn.Module]:
        if name == "stem":
            return {"conv1": self.conv1, "bn1": self.bn1, "input_stem": self.input_stem}
        return {name: self.get_submodule(name)}

    def block_maps(self, name: str) -> tuple[str, ...]:
        """The outputs of both convolutions after ReLU; the stem has none."""
        return () if name == "stem" else (f"{name}.relu1", f"{name}.relu2")

    def block_channels(self, name: str) -> int:
        return self.conv1.out_channels if name == "stem" else self.basic_block(name).conv2.out_channels

    def map_channels(self, name: str) -> int:
        block, _, relu = name.rpartition(".relu")
        channels: int = getattr(self.basic_block(block), f"bn{relu}").num_features
        return channels

    def basic_block(self, name: str) -> BasicBlock:
        """A block other than the stem."""
        block = self.get_submodule(name)
        assert isinstance(block, BasicBlock)
        return block

    def channel_sets(self) -> tuple[ChannelSet, ...]:
        """For each layer its residual stream (`layer3`) and its blocks' inner maps (`layer3.0.conv1`).

        The residual stream of a layer is written by the second convolution of each of its blocks and by the shortcut's
        (in layer1, which has none, by the stem's). An inner map has one writer and one reader.

        The sets are listed by hand: a ResNet of basic blocks has only these two kinds, and a tracer would need more
        code and an example input.
        """
        sets = []
        for index, layer in enumerate(self.layer_names):
            names = [name for name in self.block_names if name.rpartition(".")[0] == layer]
            shortcuts = [name for name in names if self.basic_block(name).downsample is not None]
            writers = [f"{n}.downsample.0" for n in shortcuts] or ["conv1"]
            norms = [f"{n}.downsample.1" for n in shortcuts] or ["bn1"]
            readers = [f"{n}.conv1" for n in names if n not in shortcuts]
            if layer == self.layer_names[-1]:
                readers += ["fc"]
            else:  # the next layer begins with a shortcut: its stride is 2
                following = self.layer_names[index + 1]
                readers += [f"{following}.0.conv1", f"{following}.0.downsample.0"]
            writers += [f"{n}.conv2" for n in names]
            norms += [f"{n}.bn2" for n in names]
            sets.append(ChannelSet(layer, layer, tuple(writers), tuple(norms), tuple(readers)))
            sets += [ChannelSet(f"{n}.conv1", layer, (f"{n}.conv1",), (f"{n}.bn1",), (f"{n}.conv2",)) for n in names]
        return tuple(sets)

    def maskable_weights(self) -> dict[str, nn.Parameter]:
        """The 3x3 convolutions of the trained blocks; the stem and the shortcuts stay dense."""
        weights: dict[str, nn.Parameter] = {}
        for name in self.suffix.blocks:
            if name != "stem":
                block = self.basic_block(name)
                weights |= {f"{name}.{key}": w for key, w in block.named_parameters() if key in MASKABLE}
        return weights

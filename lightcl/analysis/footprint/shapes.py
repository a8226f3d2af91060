"""What every block of a network computes and produces, as read from its modules.

Nothing is derived from the width, so a pruned network, whose channels differ from convolution to convolution, is read
like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightcl.errors import RequestError
from lightcl.networks.convolution import Conv3x3, by_product
from lightcl.networks.native import NativeConv3x3
from lightcl.networks.resnet import StagedResNet
from lightcl.networks.staged import Backbone
from lightcl.networks.winograd import WinogradConv2d

Image = tuple[int, int, int]
"""Channels, height, width."""

MIB = 2**20


@dataclass(frozen=True)
class Convolution:
    """One convolution with its batch-norm; `inputs`, `outputs` and `macs` are per sample."""

    name: str
    inputs: int
    outputs: int
    weights: int
    macs: int
    norm: int
    """Affine parameters of the batch-norm."""
    kernel: int
    stride: int = 1
    tiles: int = 0
    """4x4 tiles a sample, where Winograd's algorithm computes it (lightcl/networks/winograd.py); 0: it does not."""
    native_tiles: int = 0
    """The same for winograd.c, which computes more of them (lightcl/networks/native/convolution.py)."""
    by_product: bool = False
    """Whether the weight gradient in bf16 is one matrix product on the CPU (lightcl/networks/convolution.py)."""
    native: bool = False
    """Whether a step in C has a module of its own for it (lightcl/networks/native/convolution.py)."""


@dataclass(frozen=True)
class Block:
    """A block in the order of `StagedResNet.block_names`; elements are counted per sample."""

    name: str
    frozen: bool
    first: Convolution
    second: Convolution | None = None
    """None in the stem, which is one convolution."""
    shortcut: Convolution | None = None
    pooled: int | None = None
    """Elements after the stem's max-pool, if it has one."""

    @property
    def layer(self) -> str:
        """The block's layer; the stem is a layer of its own."""
        return self.name.partition(".")[0]

    @property
    def convolutions(self) -> tuple[Convolution, ...]:
        return tuple(c for c in (self.first, self.shortcut, self.second) if c is not None)

    @property
    def outputs(self) -> int:
        last = (self.second or self.first).outputs
        return last if self.pooled is None else self.pooled

    @property
    def maps(self) -> int:
        """Elements of the block's feature maps; the stem has none."""
        return self.first.outputs + self.second.outputs if self.second else 0

    @property
    def parameters(self) -> int:
        return sum(c.weights + c.norm for c in self.convolutions)

    @property
    def macs(self) -> int:
        return sum(c.macs for c in self.convolutions)


@dataclass(frozen=True)
class NetworkShape:
    """All blocks, and the linear head after global average pooling."""

    image: Image
    blocks: tuple[Block, ...]
    pooled: int
    classes: int

    @property
    def frozen(self) -> tuple[Block, ...]:
        return tuple(b for b in self.blocks if b.frozen)

    @property
    def trained(self) -> tuple[Block, ...]:
        return tuple(b for b in self.blocks if not b.frozen)

    @property
    def head_parameters(self) -> int:
        return (self.pooled + 1) * self.classes

    @property
    def head_macs(self) -> int:
        return self.pooled * self.classes

    @property
    def parameters(self) -> int:
        return sum(b.parameters for b in self.blocks) + self.head_parameters

    @property
    def trained_parameters(self) -> int:
        return sum(b.parameters for b in self.trained) + self.head_parameters

    @property
    def macs(self) -> int:
        """MACs of one image's forward pass."""
        return sum(b.macs for b in self.blocks) + self.head_macs

    @property
    def features(self) -> int:
        """Elements that enter the trained part: the prefix's outputs, or the image if nothing is frozen."""
        channels, height, width = self.image
        return self.frozen[-1].outputs if self.frozen else channels * height * width


def shape_of(network: Backbone, image: Image) -> NetworkShape:
    """Walks the blocks with an image of this size; no tensor is computed.

    Raises RequestError for a network that is not a ResNet of basic blocks: the count knows no other kind of block.
    """
    if not isinstance(network, StagedResNet):
        raise RequestError(
            f"network.name: FLOPs and memory are counted for resnet18 only, not for {type(network).__name__}"
        )
    _, height, width = image
    blocks = []
    for name in network.block_names:
        frozen = name in network.prefix.blocks
        if name == "stem":
            first, (height, width) = _convolution("stem", network.conv1, network.bn1, height, width)
            pooled = None
            if network.input_stem.pool:  # 3x3, stride 2, padding 1
                height, width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
                pooled = network.conv1.out_channels * height * width
            blocks.append(Block(name, frozen, first, pooled=pooled))
            continue
        block = network.basic_block(name)
        first, size = _convolution(f"{name}.conv1", block.conv1, block.bn1, height, width)
        second, size = _convolution(f"{name}.conv2", block.conv2, block.bn2, *size)
        shortcut = None
        if block.downsample is not None:
            convolution, norm = block.downsample.children()
            shortcut, _ = _convolution(f"{name}.downsample", convolution, norm, height, width)
        height, width = size
        blocks.append(Block(name, frozen, first, second, shortcut))
    return NetworkShape(image, tuple(blocks), network.fc.in_features, network.fc.out_features)


def _convolution(
    name: str, layer: nn.Module, norm: nn.Module, height: int, width: int
) -> tuple[Convolution, tuple[int, int]]:
    """The convolution on inputs of this size, and the size of its outputs."""
    assert isinstance(layer, nn.Conv2d)
    sides = []
    for side, padding, kernel, stride in zip(
        (height, width), layer.padding, layer.kernel_size, layer.stride, strict=True
    ):
        assert isinstance(padding, int)
        sides.append((side + 2 * padding - kernel) // stride + 1)
    out = tuple(sides)
    positions, weights = out[0] * out[1], layer.weight.numel()
    native = NativeConv3x3.suits(layer)
    shape = Convolution(
        name,
        layer.in_channels * height * width,
        layer.out_channels * positions,
        weights,
        weights * positions,
        sum(p.numel() for p in norm.parameters()),
        layer.kernel_size[0],
        layer.stride[0],
        WinogradConv2d.tiles(height, width) if WinogradConv2d.suits(layer) else 0,
        NativeConv3x3.tiles(height, width, layer.stride[0]) if native else 0,
        isinstance(layer, Conv3x3) and by_product(positions, layer.stride[0]),
        native,
    )
    return shape, (out[0], out[1])

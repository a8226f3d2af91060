"""The backbone protocol: what a network must offer so that methods, analysis, pruning and footprints can work with it.

A backbone is a sequence of named blocks, followed by global average pooling and a linear head. It is cut at a block
boundary, the freeze point, into a frozen prefix and a trained suffix: `head ∘ suffix ∘ prefix`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from lightcl.errors import RequestError, nearest
from lightcl.networks.pooling import global_average

FeatureMaps = dict[str, Tensor]
Derived = TypeVar("Derived")
OnMap = Callable[[str, Tensor], None]
"""Called with the name and the value `[N, C, H, W]` of each feature map, block by block, in the order of the forward
pass. `maps.__setitem__` of a dictionary collects them."""


@dataclass(frozen=True)
class ChannelSet:
    """Channels that are kept or removed together, and the names of the modules that write and read them.

    The `writers` are convolutions, each followed by the batch-norm of the same place in `norms`; the `readers` are the
    convolutions (or the head) that take the channels as inputs.
    """

    name: str
    layer: str
    writers: tuple[str, ...]
    norms: tuple[str, ...]
    readers: tuple[str, ...]


class Stage(nn.Module):
    """A run of consecutive blocks of a backbone. The modules are the backbone's own, under the backbone's names.

    `blocks` maps block names to modules that are called as `block(x, on_map)` and that name their maps themselves
    (`relu1`); `modules` are the modules with parameters and buffers, under their names in the backbone's state dict. A
    stage does not refer to its backbone, so a backbone may keep its stages without a reference cycle.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], modules: Mapping[str, nn.Module], map_names: tuple[str, ...]):
        super().__init__()
        self.blocks = tuple(blocks)
        self.map_names = map_names
        """Names of the feature maps, in order."""
        self.derived: dict[str, Any] | None = None
        """Where many networks share this stage and nobody changes it: what was computed from it. None: nothing is
        kept."""
        self._run = tuple(blocks.values())  # a tuple is not registered: `modules` gives the names
        for name, module in modules.items():
            *path, last = name.split(".")
            parent: nn.Module = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, module)
        self.batch_norms = tuple(module for module in self.modules() if isinstance(module, nn.BatchNorm2d))
        """All of them, in order. A step asks for them, and to walk through all modules takes a percent of it."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy derives for itself: what was derived may be large, or hold open files, which a copy would close."""
        return self.__dict__ | {"derived": None}

    @property
    def block_modules(self) -> tuple[nn.Module, ...]:
        """The modules of `blocks`, in order."""
        return self._run

    def derive(self, name: str, compute: Callable[[], Derived]) -> Derived:
        """`compute()`, once for all networks that share this stage where `derived` is a dictionary."""
        if self.derived is None:
            return compute()
        if name not in self.derived:
            self.derived[name] = compute()
        value: Derived = self.derived[name]
        return value

    def forward(self, x: Tensor, on_map: OnMap | None = None) -> Tensor:
        """Runs `[N, C, H, W]` through the blocks; calls `on_map` with every feature map where it is given."""
        for name, block in zip(self.blocks, self._run, strict=True):
            x = block(x, _prefixed(name, on_map))
        return x


class Backbone(nn.Module, ABC):
    """Base class of all networks. Subclasses register their modules, then call `freeze`.

    `forward` takes uint8 or [0, 1] float images `[N, in_channels, H, W]` and returns logits `[N, classes]`.
    The prefix (every block up to and including the freeze point) is frozen: no gradients, and batch-norm in evaluation
    mode unless `frozen_batch_norm` is "train" (as in the paper's code; its running statistics then drift).
    """

    head_name: str
    """Name of the linear head in the state dict."""
    layer_names: tuple[str, ...]
    """Names of the layers; a layer is a group of blocks, and freezing it freezes all blocks up to its last one."""

    def __init__(
        self, *, width: int, classes: int, in_channels: int, stem: str, frozen_batch_norm: Literal["eval", "train"]
    ) -> None:
        super().__init__()
        self.width, self.classes, self.in_channels, self.stem_kind = width, classes, in_channels, stem
        self.frozen_batch_norm = frozen_batch_norm
        self.kept_channels: dict[str, Tensor] = {}
        """Original indices of the kept channels, by channel set (lightcl/networks/pruning.py); empty: not pruned."""

    # -- what a backbone must offer ----------------------------------------------------------------------------

    @property
    @abstractmethod
    def block_names(self) -> tuple[str, ...]:
        """Every block, in the order of the forward pass."""

    @abstractmethod
    def block(self, name: str) -> nn.Module:
        """The block as a module that is called as `block(x, on_map)` and returns the next block's input."""

    @abstractmethod
    def block_modules(self, name: str) -> Mapping[str, nn.Module]:
        """The modules with parameters and buffers that make up a block, under their names in the state dict."""

    @abstractmethod
    def block_maps(self, name: str) -> tuple[str, ...]:
        """Names of a block's feature maps, in order, for example `layer3.1.relu2`."""

    @abstractmethod
    def block_channels(self, name: str) -> int:
        """Channels of a block's output."""

    @abstractmethod
    def map_channels(self, name: str) -> int:
        """Channels of a feature map."""

    @abstractmethod
    def channel_sets(self) -> tuple[ChannelSet, ...]:
        """All sets of channels that pruning keeps or removes together, in order."""

    @abstractmethod
    def maskable_weights(self) -> dict[str, nn.Parameter]:
        """The weights of the trained blocks that dynamic masks may set to zero, by name."""

    @property
    def head(self) -> nn.Linear:
        head = self.get_submodule(self.head_name)
        assert isinstance(head, nn.Linear)
        return head

    # -- stages ------------------------------------------------------------------------------------------------

    @property
    def prefix(self) -> Stage:
        """The frozen blocks."""
        return self._stages[0]

    @property
    def suffix(self) -> Stage:
        """The trained blocks."""
        return self._stages[1]

    @property
    def boundaries(self) -> dict[str, int]:
        """Every freeze point and the number of blocks that it freezes."""
        names = self.block_names
        found = {"none": 0} | {name: i + 1 for i, name in enumerate(names)}
        for layer in self.layer_names:
            found[layer] = max(i + 1 for i, name in enumerate(names) if name.rpartition(".")[0] == layer)
        return found

    def freeze(self, point: str) -> None:
        """Cuts the network after block `point`: a block's name, a layer's (its last block) or "none".

        Raises RequestError where the network has no such block.
        """
        boundaries = self.boundaries
        if point not in boundaries:
            raise RequestError(
                f"network.freeze {point!r} is not a block of this network{nearest(point, boundaries)} "
                f"(allowed: {', '.join(boundaries)})"
            )
        cut, names = boundaries[point], self.block_names
        self._stages = (self._stage(names[:cut]), self._stage(names[cut:]))  # a tuple is not registered
        for parameter in self.prefix.parameters():
            parameter.requires_grad_(False)
        for parameter in self.suffix.parameters():
            parameter.requires_grad_(True)
        self.train(self.training)

    def _stage(self, names: tuple[str, ...]) -> Stage:
        modules = {key: module for name in names for key, module in self.block_modules(name).items()}
        maps = tuple(key for name in names for key in self.block_maps(name))
        return Stage({name: self.block(name) for name in names}, modules, maps)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.suffix.train(mode)
        self.prefix.train(mode and self.frozen_batch_norm == "train")
        return self

    # -- forward -----------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.features(images))

    def features(self, images: Tensor, on_map: OnMap | None = None) -> Tensor:
        """The frozen prefix's outputs `[N, C, H, W]`, without a graph; the images themselves where nothing is frozen.

        Methods do not call this: they ask their `features_of` (lightcl/methods/base.py).
        """
        if not self.prefix.blocks:
            return images
        with torch.no_grad():
            features: Tensor = self.prefix(images, on_map)
            return features

    def classify(self, features: Tensor, on_map: OnMap | None = None) -> Tensor:
        """Prefix outputs to logits `[N, classes]`; calls `on_map` with the suffix's feature maps where it is given."""
        logits: Tensor = self.head(global_average(self.suffix(features, on_map)))
        return logits

    def run_block(self, name: str, x: Tensor, on_map: OnMap | None = None) -> Tensor:
        """One block alone."""
        result: Tensor = self.block(name)(x, _prefixed(name, on_map))
        return result


def _prefixed(block: str, on_map: OnMap | None) -> OnMap | None:
    """A block names its maps itself (`relu1`); the network's name of the map is `layer4.0.relu1`."""
    return None if on_map is None else lambda name, feature_map: on_map(f"{block}.{name}", feature_map)

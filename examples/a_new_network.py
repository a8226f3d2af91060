"""A network in one file: a small CNN that can be frozen after any of its blocks.

Train one device on it:

    python examples/a_new_network.py

Or use the same file as a plugin of the command line:

    lightcl train quickstart --plugin examples/a_new_network.py --set network.name=small-cnn \\
        --set network.width=16 --set network.weights=none --set method.name=er

A backbone names its blocks in the order of the forward pass. The base class builds the frozen prefix, the trained
suffix and the head from them (lightcl/networks/staged.py).
"""

import argparse
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

import lightcl
from lightcl.networks.staged import ChannelSet, OnMap


class ConvBlock(nn.Module):
    """Convolution, batch-norm, ReLU, pooling: `[N, C, H, W]` to `[N, C', H/2, W/2]`. Scales uint8 images to [0, 1]."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, on_map: OnMap | None = None) -> Tensor:
        if not x.is_floating_point():
            x = x.float() / 255
        feature_map = F.relu(self.norm(self.conv(x)))
        if on_map is not None:
            on_map("relu", feature_map)
        return F.max_pool2d(feature_map, 2)


@lightcl.register_backbone("small-cnn")
class SmallCNN(lightcl.Backbone):
    """Three blocks of `width`, 2 x `width` and 4 x `width` channels, global average pooling and a linear head."""

    head_name = "fc"
    layer_names = ()  # no groups of blocks: each is frozen by its own name

    def __init__(self, *, width: int, classes: int, in_channels: int, freeze: str, **others: Any) -> None:
        super().__init__(width=width, classes=classes, in_channels=in_channels, **others)
        self.block1 = ConvBlock(in_channels, width)
        self.block2 = ConvBlock(width, 2 * width)
        self.block3 = ConvBlock(2 * width, 4 * width)
        self.fc = nn.Linear(4 * width, classes)
        self.freeze(freeze)

    @property
    def block_names(self) -> tuple[str, ...]:
        return ("block1", "block2", "block3")

    def block(self, name: str) -> nn.Module:
        return self.get_submodule(name)

    def block_modules(self, name: str) -> Mapping[str, nn.Module]:
        return {name: self.get_submodule(name)}

    def block_maps(self, name: str) -> tuple[str, ...]:
        return (f"{name}.relu",)

    def block_channels(self, name: str) -> int:
        convolution = self.get_submodule(f"{name}.conv")
        assert isinstance(convolution, nn.Conv2d)
        return convolution.out_channels

    def map_channels(self, name: str) -> int:
        return self.block_channels(name.removesuffix(".relu"))

    def channel_sets(self) -> tuple[ChannelSet, ...]:
        """Each block's channels are written by its convolution and read by the next one, the last by the head."""
        readers = ("block2.conv", "block3.conv", "fc")
        return tuple(
            ChannelSet(name, name, (f"{name}.conv",), (f"{name}.norm",), (reader,))
            for name, reader in zip(self.block_names, readers, strict=True)
        )

    def maskable_weights(self) -> dict[str, nn.Parameter]:
        names = [f"{name}.conv.weight" for name in self.suffix.blocks]
        return {name: self.get_parameter(name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, default=5, help="tasks of two digits each (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs per task (default: %(default)s)")
    args = parser.parse_args()

    scenario = lightcl.load_scenario(
        "quickstart",
        {"stream.tasks": args.tasks, "training.epochs": args.epochs},
        network={"name": "small-cnn", "width": 16, "weights": "none"},
        method={"name": "er"},  # freezes nothing by default: these weights are not pre-trained
    )
    with lightcl.open_device(scenario) as device:
        for task in device.tasks:
            device.learn(task)
            accuracies = [round(accuracy, 2) for accuracy in device.evaluate().til]
            print(f"after task {task.id}: accuracy per task {accuracies}")


if __name__ == "__main__":
    main()

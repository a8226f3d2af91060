"""A network as it answers: images in, logits out, in evaluation mode and without anything that only training needs."""

from __future__ import annotations

from torch import Tensor, nn

from lightcl.networks.staged import Backbone


class Inference(nn.Module):
    """`head ∘ suffix ∘ prefix` of a network. The modules are the network's own; nothing is copied.

    `forward` takes float32 images `[N, in_channels, H, W]` in 0..1 and returns logits `[N, classes]`. The network
    normalizes the images itself, so the normalization is part of what is exported.
    """

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.prefix, self.suffix, self.head = network.prefix, network.suffix, network.head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.suffix(self.prefix(images)).mean((2, 3)))
        return logits

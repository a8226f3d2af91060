"""Networks: the backbone protocol (staged), one file per backbone, pruning, and weights.

A backbone is one file: a subclass of `Backbone` with the decorator `register_backbone`. `network.name` selects it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightcl.registry import Registry

BACKBONES: Registry[Callable[..., Any]] = Registry("network", "network.name", __name__)
"""Backbones by name. Each is called with the keywords width, classes, in_channels, stem, freeze and frozen_batch_norm,
and returns a `Backbone`."""

register_backbone = BACKBONES.registering

__all__ = ["BACKBONES", "register_backbone"]

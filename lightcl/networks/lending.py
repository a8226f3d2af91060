"""A few network objects for many devices, one after another.

A process that simulates devices opens one for nearly every message. Copying a network for each of them takes several
milliseconds, setting its tensors back a fraction of one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightcl.networks.staged import Backbone


class NetworkLender:
    """Lends networks that are equal to `template`, which nobody may change.

    They share the modules of the template's frozen prefix, unless its running statistics change (`frozen_batch_norm`).
    With `again` a network is lent again once it is back; otherwise every loan is a new copy. What was changed beyond
    the values of tensors (pruned channels, modules of another class, hooks) is not undone: such a network is not lent
    again.
    """

    def __init__(self, template: Backbone, *, again: bool) -> None:
        self._template, self._again = template, again
        self._shared = set(template.prefix.modules()) if template.frozen_batch_norm == "eval" else set[nn.Module]()
        self._start = self._tensors(self._modules(template))
        self._back: list[tuple[Backbone, Any]] = []  # with the form that each had at first

    @contextmanager
    def lent(self) -> Iterator[Backbone]:
        """A network for the time inside a `with`; afterwards nobody may use it. After an exception it stays away."""
        if not self._back:
            network = copy.deepcopy(self._template, {id(module): module for module in self._shared})
            form = self._form(network) if self._again else None
        else:
            network, form = self._back.pop()
            self._set_back_(network)
        yield network
        if self._again and self._form(network) == form:
            self._back.append((network, form))

    def _set_back_(self, network: Backbone) -> None:
        with torch.no_grad():
            for tensor, start in zip(self._tensors(self._modules(network)), self._start, strict=True):
                tensor.copy_(start)
        if network.training != self._template.training:
            network.train(self._template.training)

    @staticmethod
    def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
        found = (tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values()))
        return [tensor for tensor in found if tensor is not None]

    def _modules(self, network: Backbone) -> list[nn.Module]:
        """The network's own modules, also those that only its blocks know, each once."""
        parts = (network, network.suffix, *network.suffix.block_modules)
        found = dict.fromkeys(module for part in parts for module in part.modules())
        return [module for module in found if module not in self._shared]

    def _form(self, network: Backbone) -> Any:
        """Everything about the network but the values of its tensors and its mode; equal where nothing has changed."""
        modules = self._modules(network)
        settings = [(type(module), _settings(module)) for module in modules]
        tensors = [(t.shape, t.stride(), t.dtype, t.requires_grad, _watched(t)) for t in self._tensors(modules)]
        return settings, tensors, list(network.kept_channels)


def _settings(module: nn.Module) -> dict[str, Any]:
    """Its attributes: their values, such as a stride, or how many entries they have, such as hooks."""
    return {
        name: len(value) if isinstance(value, dict | list | set) else value if isinstance(value, _PLAIN) else ""
        for name, value in module.__dict__.items()
        if name != "training"
    }


_PLAIN = (int, float, str, tuple, type(None))


def _watched(tensor: Tensor) -> bool:
    """Whether a gradient is left, or a hook that waits for one."""
    return tensor.grad is not None or bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)

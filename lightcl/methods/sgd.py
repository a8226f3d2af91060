"""SGD: plain fine-tuning, without any measure against forgetting. A lower bound."""

from __future__ import annotations

from typing import Literal

from lightcl.methods.base import Method, MethodParameters, register


class SGDParameters(MethodParameters):
    """`sgd`: trains the entire network unless `network.freeze` says otherwise."""

    order = 2
    name: Literal["sgd"] = "sgd"


@register(SGDParameters)
class SGD(Method):
    """loss = CE(h(x), y)."""

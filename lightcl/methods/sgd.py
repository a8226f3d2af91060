"""Plain fine-tuning: every task is learned by SGD and nothing is done against forgetting. The lower bound."""

from __future__ import annotations

from typing import Literal

from lightcl.methods.base import Method, MethodParameters
from lightcl.networks.resnet import StagedResNet


class SGDParameters(MethodParameters):
    """`sgd`: trains the whole network unless `network.freeze` says otherwise."""

    name: Literal["sgd"] = "sgd"

    def build(self, network: StagedResNet) -> Method:
        return Method(network, self)

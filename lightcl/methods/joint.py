"""Joint training: all tasks are learned together, as one. The upper bound, and no continual learning at all.

The stream has a single task to learn, which holds every task's samples; it is tested on each of them, as after the last
task of any other stream. It has nothing to forget.
"""

from __future__ import annotations

from typing import Literal

from lightcl.methods.base import Method, MethodParameters
from lightcl.networks.resnet import StagedResNet


class JointParameters(MethodParameters):
    """`joint`: plain SGD on all tasks at once; trains the whole network unless `network.freeze` says otherwise."""

    name: Literal["joint"] = "joint"

    @property
    def joint(self) -> bool:
        return True

    def build(self, network: StagedResNet) -> Method:
        return Method(network, self)

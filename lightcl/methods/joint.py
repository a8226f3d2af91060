"""Joint training: all tasks are learned together, as one. The upper bound, and not continual learning.

The stream has a single task to learn, which has every task's samples; it is tested on each of them, as after the last
task of any other stream. It has nothing to forget.
"""

from __future__ import annotations

from typing import Literal

from lightcl.methods.base import Method, MethodParameters, register


class JointParameters(MethodParameters):
    """`joint`: plain SGD on all tasks at once; trains the entire network unless `network.freeze` says otherwise."""

    order = 1
    joint = True
    name: Literal["joint"] = "joint"


@register(JointParameters)
class Joint(Method):
    """loss = CE(h(x), y), (x, y) from all tasks."""

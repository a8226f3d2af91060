"""Joint training: all tasks are learned together, as one. An upper bound, not continual learning.

The stream has a single task to learn, with the samples of all tasks; the tasks are tested one by one, as after the last
task of any other stream. Nothing can be forgotten.
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

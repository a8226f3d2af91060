"""Everything that determines how a device's images become tasks."""

from __future__ import annotations

from dataclasses import dataclass

from lightcl.data.section import Data, Fleet, Stream

OWN_CLASSES = ("pathological", "distribution")
"""Partitions that give each device a few classes; `stream.cut: auto` then cuts tasks from these."""


@dataclass(frozen=True)
class StreamPlan:
    """The sections and the seed that determine a stream.

    `joint`: all tasks are learned together, as one.
    """

    data: Data
    stream: Stream
    fleet: Fleet
    seed: int
    joint: bool = False

    @property
    def own_classes(self) -> bool:
        """Whether tasks are cut from the classes that a device holds; `stream.cut`, with auto resolved."""
        if self.stream.cut == "auto":
            return self.fleet.partition in OWN_CLASSES
        return self.stream.cut == "own"

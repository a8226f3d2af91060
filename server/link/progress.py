"""How far a run is, from its folder. Reads the files itself: `lightcl.records` loads PyTorch, 500 MB of memory that the
server would hold for months."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Say = Callable[[str], None]


@dataclass(frozen=True)
class Progress:
    """A run folder (lightcl/records/folder.py), as far as a server must know it."""

    path: Path

    @property
    def begun(self) -> bool:
        return (self.path / "run.json").exists()

    @property
    def complete(self) -> bool:
        return (self.path / "results.json").exists()

    @property
    def rounds(self) -> int:
        """Finished rounds; a line that was cut short by a kill is none."""
        with suppress(OSError):
            return (self.path / "rounds.jsonl").read_bytes().count(b"\n")
        return 0

    def results(self) -> dict[str, Any]:
        """results.json; empty where it cannot be read."""
        return _object(self.path / "results.json")

    def failure(self) -> str:
        """Why the last start failed; empty where it did not say so."""
        return str(_object(self.path / "failure.json").get("reason", ""))


def _object(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


class EventWatch:
    """Shows what happens in a run, from its event log; what happened before it began to watch is not shown again."""

    def __init__(self, number: int, out: Path, say: Say) -> None:
        self.run, self.say = number, say
        self._file = out / "events.jsonl"
        self._at = 0
        with suppress(OSError):
            self._at = self._file.stat().st_size

    def show(self) -> None:
        for line in self._new_lines():
            with suppress(ValueError, KeyError, TypeError):
                if text := _event_text(json.loads(line)):
                    self.say(f"run {self.run}: {text}")

    def _new_lines(self) -> Iterator[str]:
        with suppress(OSError), self._file.open("rb") as file:
            if self._file.stat().st_size < self._at:  # the run began anew
                self._at = 0
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._at += len(line)
                yield line.decode(errors="replace")


def _event_text(event: dict[str, Any]) -> str:
    """An event in words (server/listeners.py); empty for those that are not shown."""
    name = event["event"]
    if name == "connected":
        return f"{event['devices']} of {event['wanted']} devices connected"
    if name == "round_started":
        return f"round {event['round']}: {event['devices']} devices, about {event['rounds_left']} rounds left"
    if name == "refused":
        return f"device {event['device']}: {event['reason']}"
    if name == "warned":
        return f"warning: {event['text']}"
    if name == "round_finished":
        means = [f"{one.upper()} {100 * event[one]['mean']:.1f} %" for one in ("til", "cil") if event.get(one)]
        return f"round {event['round']} finished" + (f": {', '.join(means)}" if means else "")
    return ""

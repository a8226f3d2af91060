"""What a board's node is doing, as a small file in its state folder that `lightcl device status` reads."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightcl.storage.files import write_atomically

if TYPE_CHECKING:
    from flwr.app import Message

FILE = "status.json"
CONTACT_SECONDS = 60.0
"""How often an idle node writes that the server still answers: seldom, for the sake of an SD card."""


class Status:
    """The node's side: writes the file when something happens, and a line to the log. A full disk stops nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = {"pid": os.getpid(), "started": time.time(), "connected": False}
        self._write()

    def connected(self, node_id: int, server: str) -> None:
        self._write(connected=True, connected_since=time.time(), contact=time.time(), node_id=str(node_id))
        self.note(f"connected to {server} as node {node_id}")

    def contact(self) -> None:
        """The server has answered."""
        if time.time() - self.values["contact"] > CONTACT_SECONDS:
            self._write(contact=time.time())

    def disconnected(self, reason: str) -> None:
        self._write(connected=False, busy=None)
        self.note(reason)

    def working(self, message: Message) -> None:
        """A message has come and is being answered."""
        from lightcl.exchange.messages import INSTRUCTION

        asked: Mapping[str, Any] = (
            (message.content.config_records.get(INSTRUCTION) or {}) if message.has_content() else {}
        )
        about = {key: asked.get(key) for key in ("run", "round", "device", "task", "until_epoch")}
        self._write(busy={"type": message.metadata.message_type, "since": time.time(), **about})

    def answered(self, reply: Message, seconds: float) -> None:
        """The message has been answered after `seconds`; the reason of a refusal, or of a wait, is kept."""
        from lightcl.exchange.messages import REPLY

        busy = self.values.get("busy") or {}
        content: Mapping[str, Any] = (reply.content.config_records.get(REPLY) or {}) if reply.has_content() else {}
        problem = content.get("reason") or (reply.error.reason if reply.has_error() else None)
        waits = "retry_after" in content
        last = {**busy, "ended": time.time(), "seconds": round(seconds, 2), "problem": problem, "waits": waits}
        self._write(busy=None, last=last, contact=time.time())
        said = f" ({'waits' if waits else 'refused'}: {problem})" if problem else ""
        self.note(
            f"{last.get('type')} round {last.get('round')} task {last.get('task')}: answered in {seconds:.1f} s{said}"
        )

    def note(self, text: str) -> None:
        """A line for the log."""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def _write(self, **changes: Any) -> None:
        self.values |= changes
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / FILE, json.dumps(self.values), durable=False)


def read_status(folder: Path) -> dict[str, Any]:
    """What the node wrote last; empty where there is nothing that can be read."""
    try:
        values = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}

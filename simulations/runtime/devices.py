"""The ClientApp of a simulated device: the project's own, with states that need not survive a power cut."""

from __future__ import annotations

from pathlib import Path

from flwr.clientapp import ClientApp

from client.app import make_app as make_device_app
from server.arrays import plain_record


def make_app(state: Path) -> ClientApp:
    """The app of a simulation's workers; devices keep their states in folders of `state`.

    Saves are not synced to disk. A killed process loses nothing; a power cut may leave older or damaged states, and
    damaged ones are refused: start such a run over with --overwrite.
    """
    # Tensors reach the server through shared memory, so nobody needs to encode and decode them.
    return make_device_app(state, durable=False, pack=plain_record)

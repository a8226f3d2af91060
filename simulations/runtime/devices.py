"""The ClientApp of a simulated device: the project's own, with states that need not survive a power cut."""

from __future__ import annotations

from pathlib import Path

from flwr.clientapp import ClientApp

from client.app import make_app as make_device_app


def make_app(state: Path) -> ClientApp:
    """The app of a simulation's workers; devices keep their states in folders of `state`.

    A save waits for no disk. A killed process loses nothing. After a power cut a state may be an older one, or damaged
    and then refused: start such a run over with --overwrite.
    """
    return make_device_app(state, durable=False)

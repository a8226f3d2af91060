"""The ClientApp of a simulated device: the project's own, with states that need not survive a power cut."""

from __future__ import annotations

from pathlib import Path

from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp

from client.app import make_app as make_device_app
from client.app import outgoing
from lightcl.device.device import EdgeDevice
from server.arrays import plain_record, saved_record


def make_app(state: Path) -> ClientApp:
    """The app of workers that may be on other machines than the server; devices' states are in folders of `state`.

    Saves are not synced to disk. A killed process loses nothing; a power cut may leave older or damaged states, and
    damaged ones are refused: start such a run over with --overwrite.
    """
    return make_device_app(state, durable=False, pack=in_memory)


def make_local_app(state: Path) -> ClientApp:
    """The same for workers on the server's machine."""
    return make_device_app(state, durable=False, pack=on_disk)


def in_memory(device: EdgeDevice) -> ArrayRecord:
    """Ray takes tensors to the server, so nobody needs to encode and decode them."""
    return plain_record(outgoing(device))


def on_disk(device: EdgeDevice) -> ArrayRecord:
    """The server reads tensors where the device has saved them a moment ago; only statistics come with the reply.

    It has read them before the device, which is to be tested next, saves again. To copy them into Ray's object store
    and to account for them there would take some 8 % of a simulation's time.
    """
    saved = device.saved_outgoing()
    if not saved or device.scenario.server.compression != "none":
        return in_memory(device)
    return saved_record(saved, device.outgoing_statistics())

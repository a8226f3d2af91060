"""The worker process of a simulation: it keeps one ClientApp and hands it one message at a time.

Imports stay inside the methods: Ray loads this module first, and `OMP_NUM_THREADS` only takes effect if it is set
before PyTorch is imported.
"""

from __future__ import annotations

import gc
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Message
    from flwr.clientapp import ClientApp

SHARED_RECORDS = 4
"""Shared records that a worker keeps decoded. One or two versions are in use at a time."""


@dataclass(frozen=True)
class Parcel:
    """A message on its way to a worker; its arrays stay in Ray's object store."""

    message: Message
    """Without its ArrayRecords."""
    arrays: Mapping[str, Any]
    """By record name: the ObjectRef of an ArrayRecord."""
    node: int
    node_config: Mapping[str, int]


@dataclass(frozen=True)
class Greeting:
    """What a worker reports about itself when it has started."""

    host: str
    pid: int
    sees_state: bool
    """Whether the marker file in the folder for states is visible on the worker's machine."""
    code: str
    """Digest of the project's source files on the worker's machine."""
    folder: str
    """Where these files are."""


class DeviceWorker:
    """One Ray actor. `make_app(state)` is called once; decoded images and weights stay in the process."""

    def __init__(
        self, make_app: Callable[[Path], ClientApp], state: Path, marker: str, environment: Mapping[str, str]
    ) -> None:
        os.environ.update(environment)
        from simulations.runtime.identity import assume_identity

        assume_identity()
        self._app = make_app(state)
        self._marker = state / marker
        self._shared: OrderedDict[str, ArrayRecord] = OrderedDict()
        self._settled = False

    def greet(self) -> Greeting:
        import socket

        from simulations.runtime.identity import code_digest, code_folder

        return Greeting(socket.gethostname(), os.getpid(), self._marker.exists(), code_digest(), code_folder())

    def handle(self, parcel: Parcel) -> Message:
        """The app's reply, or an error reply with the app's exception."""
        from flwr.app import Context, Error, Message, RecordDict
        from flwr.common.constant import ErrorCode

        message = parcel.message
        try:
            for name, reference in parcel.arrays.items():
                message.content[name] = self._record(reference)
            context = Context(1, parcel.node, dict(parcel.node_config), RecordDict(), {})
            reply = self._app(message, context)
            self._settle()
            return reply
        except Exception as error:
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

    def _settle(self) -> None:
        """After the first message Python's collector leaves alone what is there by then: libraries, scenario, images.

        It would look at these objects, some hundred thousand, again and again.
        """
        if not self._settled:
            self._settled = True
            gc.collect()
            gc.freeze()

    def _record(self, reference: Any) -> ArrayRecord:
        """A record from the object store, fetched and decoded once per worker; a copy, so that an app may change its
        entries."""
        import ray
        from flwr.app import ArrayRecord

        from server.arrays import plain_record

        key = reference.hex()
        if key not in self._shared:
            encoded = ray.get(reference)
            self._shared[key] = plain_record({name: array.numpy() for name, array in encoded.items()})
            if len(self._shared) > SHARED_RECORDS:
                self._shared.popitem(last=False)
        self._shared.move_to_end(key)
        record = ArrayRecord()
        record.update(self._shared[key])  # Flower's constructor would copy the arrays
        return record

"""A Flower `Grid` on Ray actors.

Why not Flower's simulation engine: it scans nodes x messages continually in the server's process, never replaces a
worker that dies, and serializes the shared tensors once per message. This grid's work is proportional to the messages.

Nodes are addresses, not processes: node p of P hosts the devices d with d % P == p (see `Greeting` in
lightcl/exchange/messages.py), any worker serves any node, and several messages to one node run at the same time. A few
dozen nodes are enough for any number of devices, so that greeting them costs nothing. `Context.state` is empty at every
message: a ClientApp keeps its state on disk.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from copy import copy
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from lightcl.exchange.messages import INSTRUCTION
from server.arrays import without_arrays
from server.mailbox import RunStopped, WorkerDied
from simulations.runtime.pool import Job, PoolBroken, WorkerPool
from simulations.runtime.worker import SHARED_RECORDS, Parcel

FIRST_NODE = 1001
"""Node ids follow from here; 0 and 1 mean "nobody" and "the server" in Flower."""


class RayGrid(Grid):
    """The grid of one run: `nodes` nodes, served by the pool that `make_pool(on_broken)` returns.

    `put(record)` stores an ArrayRecord for all workers and returns its ObjectRef. Methods may be called from any
    thread; after `close` they raise RunStopped, and WorkerDied if no worker can run any more.
    """

    simulated = True
    """For the server's mailbox: the nodes are this run's own."""

    def __init__(
        self,
        nodes: int,
        make_pool: Callable[[Callable[[PoolBroken], None]], WorkerPool],
        put: Callable[[ArrayRecord], Any],
    ) -> None:
        self._nodes = {FIRST_NODE + i: {"partition-id": i, "num-partitions": nodes} for i in range(nodes)}
        self._put = put
        self._shared: OrderedDict[tuple[Any, ...], tuple[ArrayRecord, Any]] = OrderedDict()
        self._replies: dict[str, tuple[Message, float]] = {}
        self._expected: dict[str, float] = {}
        self._change = threading.Condition()
        self._arrived = False  # a reply, since the last call of pull_messages
        self._end: Exception | None = None
        self._run: Any = None
        self.failure = ""
        """Why no worker can run any more; empty while they can."""
        self.stored = 0
        """ArrayRecords put into the object store so far."""
        self._pool = make_pool(self._break)

    # -- Flower's interface ------------------------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        """What `set_run` was given; None in a simulation."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Deprecated in Flower; use `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        self._check()
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Submit messages; a message to an unknown node gets an empty id, as in Flower."""
        ids = []
        for message in messages:
            self._check()
            node = message.metadata.dst_node_id
            if node not in self._nodes:
                ids.append("")
                continue
            message_id = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = message_id  # as Flower's own grids do
            expires = message.metadata.created_at + message.metadata.ttl
            with self._change:
                self._expected[message_id] = expires
            deliver = partial(self._deliver, message_id, without_arrays(message))
            self._pool.submit(Job(self._parcel(message, node), deliver, expires, _device_of(message)))
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Take the replies to these messages that have arrived. Does not wait."""
        self._check()
        with self._change:
            self._arrived = False
            return [self._replies.pop(i)[0] for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then wait for all replies, at most `timeout` seconds."""
        deadline = time.monotonic() + timeout if timeout is not None else None
        waiting = {i for i in self.push_messages(messages) if i}
        replies: list[Message] = []
        while waiting:
            left = 1.0 if deadline is None else deadline - time.monotonic()
            if left <= 0:
                break
            self.wait_for_replies(min(left, 1.0))
            pulled = self.pull_messages(list(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in pulled}
            replies += pulled
        return replies

    # -- beyond Flower's interface ---------------------------------------------------------------------------------

    def wait_for_replies(self, timeout: float) -> bool:
        """Block until a reply has arrived since the last `pull_messages`, at most `timeout` seconds.

        Returns whether one has arrived. Uses no processor time while it waits.
        """
        with self._change:
            self._change.wait_for(lambda: self._arrived or self._end is not None, timeout)
            arrived = self._arrived
        self._check()
        return arrived

    @property
    def workers_replaced(self) -> int:
        return self._pool.replaced

    def close(self) -> None:
        """End the run from another thread: every further call raises RunStopped."""
        self._finish(RunStopped())
        self._pool.close()

    # -- inside ------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._end is not None:
            raise self._end

    def fail(self, reason: str) -> None:
        """End the run from another thread with a reason: every further call raises WorkerDied."""
        self.failure = self.failure or reason
        self._finish(WorkerDied(f"{reason}; continue with --resume"))

    def _break(self, error: PoolBroken) -> None:
        self.fail(str(error))

    def _finish(self, end: Exception) -> None:
        with self._change:
            self._end = self._end or end
            self._change.notify_all()

    def _parcel(self, message: Message, node: int) -> Parcel:
        arrays = {name: self._reference(record) for name, record in message.content.array_records.items()}
        return Parcel(without_arrays(message), arrays, node, self._nodes[node])

    def _reference(self, record: ArrayRecord) -> Any:
        """The record in the object store; records that share the same bytes objects are put there once.

        The key is the identity of the bytes objects: they cannot change, and they are kept alive here, so that their
        ids are not reused.
        """
        key = tuple((name, array.dtype, tuple(array.shape), id(array.data)) for name, array in record.items())
        if key not in self._shared:
            self._shared[key] = (ArrayRecord({n: copy(a) for n, a in record.items()}), self._put(record))
            self.stored += 1
            if len(self._shared) > SHARED_RECORDS:
                self._shared.popitem(last=False)
        self._shared.move_to_end(key)
        return self._shared[key][1]

    def _deliver(self, message_id: str, message: Message, result: Any) -> None:
        """Called by the pool's thread: a reply, an exception from Ray, or None if every worker that tried died."""
        if result is None:
            text = "two Ray workers died while handling this message (out of memory?)"
            result = Message(Error(ErrorCode.CLIENT_APP_CRASHED, text), reply_to=message)
        elif not isinstance(result, Message):
            text = f"{type(result)}:<'{result}'>"
            result = Message(Error(ErrorCode.UNKNOWN, text), reply_to=message)
        with self._change:
            self._replies[message_id] = (result, self._expected.pop(message_id))
            self._arrived = True
            self._forget_expired()
            self._change.notify_all()

    def _forget_expired(self) -> None:
        """Drops replies that were not collected in time; they are stored in order of arrival."""
        now = time.time()
        while self._replies:
            oldest = next(iter(self._replies))
            if self._replies[oldest][1] + 60 > now:
                return
            del self._replies[oldest]


def _device_of(message: Message) -> Any:
    """The device that a message is for (a greeting says 0); None in a message that is no instruction."""
    record = message.content.config_records.get(INSTRUCTION)
    return record.get("device") if record else None

"""Messages over Flower's grid: send, wait, and decode the replies."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from httpx import HTTPError

from lightcl.errors import Failure, Stopped
from lightcl.exchange.messages import ARRAYS, REPLY
from lightcl.exchange.tensors import Arrays
from lightcl.exchange.wire import decoded

PULL_SECONDS = 0.05
"""Between two looks at a grid that cannot say when a reply arrives: Flower's."""
LATE_SECONDS = 60.0
"""A message expires this long after the server has given up waiting for its reply: Flower fails when it is asked for
the reply to one that has expired."""
STOP_SECONDS = 0.25
"""The longest wait in which a request to stop is not noticed."""
DEAD_WORKER = re.compile(r"<class 'ray\.exceptions\.(ActorDiedError|ActorUnavailableError|OutOfMemoryError)'>")
"""The words of Flower's simulation runtime. Not torch's OutOfMemoryError, nor what a ClientApp raised: those are one
device's failure and stand later in the text. Only a simulation's grid is believed: a board could send these words."""


AGAIN_SECONDS = 1.0
"""Between two looks for a node that has left."""


class RunStopped(Stopped):
    """The user asked the run to stop; it can be resumed."""


class WorkerDied(Exception):
    """A worker of the simulation is gone. Flower continues to give it messages, which all fail at once."""


ENDS_THE_RUN = (Stopped, Failure, WorkerDied)
"""What no guard around a device's reply may take for a fault of the reply."""


class Mailbox:
    """Sends messages to nodes and collects their replies; `stop` ends every wait."""

    def __init__(self, grid: Grid, stop: threading.Event) -> None:
        self.grid, self._stop = grid, stop
        self.simulated = bool(getattr(grid, "simulated", type(grid).__name__ == "InMemoryGrid"))
        """Whether the devices are simulated by this run itself, with Ray (`RayGrid.simulated`) or with Flower's engine:
        they are all there, however long they take to answer, and their grid says so when a worker dies."""
        self._one_by_one = False

    def connected_nodes(self) -> set[int]:
        return set(self.grid.get_node_ids())

    def push(self, message: Message) -> str:
        """Sends; returns the message's id, empty for a node that has just left."""
        return next(iter(self.grid.push_messages([message])), "") or ""

    def pull(self, sent: Mapping[str, Message]) -> Iterator[Message]:
        """The replies that have arrived to the messages `sent`, by id. Raises WorkerDied.

        A reply that Flower cannot read is given as one with an error.
        """
        for reply in self._read(sent) if sent else ():
            if self.simulated and reply.has_error() and DEAD_WORKER.match(reply.error.reason or ""):
                raise WorkerDied(
                    "a Ray worker died (out of memory?): set fewer simulation.workers, then continue with --resume"
                )
            if reply.metadata.reply_to_message_id in sent:
                yield reply

    def _read(self, sent: Mapping[str, Message]) -> list[Message]:
        """Flower decodes the replies that it is asked for together, and one made of garbage takes the others with it:
        after the first such reply they are asked for one by one."""
        if not self._one_by_one:
            try:
                return list(self.grid.pull_messages(list(sent)))
            except (*ENDS_THE_RUN, OSError, HTTPError):  # the grid's own trouble
                raise
            except Exception:
                self._one_by_one = True
        replies: list[Message] = []
        for message_id, message in sent.items():
            try:
                replies += self.grid.pull_messages([message_id])
            except (*ENDS_THE_RUN, OSError, HTTPError):
                raise
            except Exception as error:
                text = f"the reply cannot be read ({type(error).__name__}: {error})"
                replies.append(Message(Error(ErrorCode.UNKNOWN, text), reply_to=message))
        return replies

    def send_and_wait(
        self,
        messages: Mapping[int, Message],
        timeout: float,
        done: Callable[[int, Message], Message] = lambda _, reply: reply,
        postponed: Callable[[int, Message], float | None] = lambda *_: None,
        again: Callable[[int], Message | float | None] = lambda _: None,
        enough: Callable[[Collection[int]], bool] = lambda _: False,
        absent: Iterable[int] = (),
    ) -> dict[int, Message]:
        """Replies by the keys of `messages`; those that did not arrive within `timeout` seconds are missing.

        `done` is called for each as it arrives, and returns what is kept of it. `postponed` gives the seconds after
        which a key is to be asked again because of its reply, or None; then `again` makes the message for it, or says
        after how many seconds to look again, or None, and the key is missing. Keys in `absent` begin with `again`.
        Where only such keys are left, `enough` is asked whether to leave them: they are missing then. Raises RunStopped
        and WorkerDied.
        """
        keys: dict[str, int] = {}
        waiting: dict[str, Message] = {}
        due = dict.fromkeys(absent, 0.0)
        replies: dict[int, Message] = {}

        def send(key: int, message: Message) -> bool:
            message_id = self.push(message)
            if message_id:
                keys[message_id], waiting[message_id] = key, message
            return bool(message_id)

        for key, message in messages.items():
            send(key, message)
        deadline = time.monotonic() + timeout
        while (waiting or due) and time.monotonic() < deadline:
            if not waiting and enough(due):
                break
            for key in [key for key, at in due.items() if at <= time.monotonic()]:
                del due[key]
                found = again(key)
                if isinstance(found, Message) and not send(key, found):
                    found = AGAIN_SECONDS  # the node has just left
                if isinstance(found, float):
                    due[key] = time.monotonic() + found
            self._wait_for_replies(min([deadline, *due.values()]))
            pulled = deque(self.pull(waiting))
            while pulled:
                reply = pulled.popleft()  # nothing else keeps it
                message_id = reply.metadata.reply_to_message_id
                if waiting.pop(message_id, None) is None:  # the second reply to one message
                    continue
                key = keys[message_id]
                seconds = postponed(key, reply)
                if seconds is None:
                    begun = time.monotonic()
                    replies[key] = done(key, reply)
                    deadline += time.monotonic() - begun  # which is no device's time
                else:
                    due[key] = time.monotonic() + seconds
        return replies

    def _wait_for_replies(self, deadline: float) -> None:
        """Until the grid has a reply, where it can say so; otherwise a moment. Raises RunStopped."""
        wait = getattr(self.grid, "wait_for_replies", None)
        if wait is None:
            self.pause(PULL_SECONDS)
            return
        self.pause(0)
        wait(max(0.0, min(deadline - time.monotonic(), STOP_SECONDS)))

    def pause(self, seconds: float) -> None:
        """Waits. Raises RunStopped as soon as the user wants the run to end."""
        if self._stop.wait(seconds):
            raise RunStopped


def record_of(reply: Message, name: str = REPLY) -> Any:
    """The record of a reply; empty where it has none."""
    return (reply.content.config_records.get(name) or {}) if reply.has_content() else {}


def arrays_of(reply: Message) -> Arrays:
    """The tensors of a reply. Raises ExchangeError."""
    return decoded(reply.content.array_records.get(ARRAYS) or {})

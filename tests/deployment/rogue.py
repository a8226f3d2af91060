"""A board with a valid key that means harm: the node of the kit, with replies that are changed before they are sent.

    python -m tests.deployment.rogue CONFIG LOG

It learns as any board. In each round in which it is asked to train, the next attack of the list is its answer; behind
the last one, updates that are left out. LOG gets one line per answer.
"""

from __future__ import annotations

import base64
import json
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from benchmarks.gauntlet import Arrays, Change, float64, moved, noise, sums, variance
from client.app import make_app
from client.board.config import BoardConfig, read_config
from client.board.link import Forgotten, Refused, joined
from client.board.network import split_address
from client.board.node import answer_all
from client.board.setup import private_key
from client.board.status import Status
from lightcl.exchange.messages import ARRAYS, INSTRUCTION, REPLY, TELEMETRY, BackOff, Refusal, Telemetry
from tests.inprocess import unpack_

REPLY_LIMIT = 4 << 20
"""Bytes of a reply that the server of the test takes."""
FLOOD = 1500
"""Requests, of which the gateway takes 1,000 at once and the others at 50 per second."""


@dataclass
class Turn:
    """A message of the server to train, the honest reply to it, and the last model."""

    message: Message
    reply: Message
    model: Arrays
    draw: np.random.Generator
    board: Board
    seen: dict[str, Any]
    """What the attack itself saw, for the log."""

    def changed(self, change: Change, **record: Any) -> Message:
        """The reply with other tensors, and with other words."""
        arrays = {name: array.numpy().copy() for name, array in self.reply.content.array_records[ARRAYS].items()}
        model = {name: self.model.get(name, array) for name, array in arrays.items()}
        self.reply.content[ARRAYS] = ArrayRecord({n: Array(a) for n, a in change(arrays, model, self.draw).items()})
        return self.said(**record)

    def said(self, **record: Any) -> Message:
        self.reply.content[REPLY] = ConfigRecord({**self.reply.content.config_records[REPLY], **record})
        return self.reply

    def bytes_for_a_tensor(self, data: bytes) -> Message:
        """The first tensor is sent as these bytes."""
        arrays = dict(self.reply.content.array_records[ARRAYS].items())
        name, array = next(iter(arrays.items()))
        arrays[name] = Array(array.dtype, array.shape, array.stype, data)
        self.reply.content[ARRAYS] = ArrayRecord(arrays)
        return self.reply

    def instead(self, record: dict[str, Any]) -> Message:
        return Message(RecordDict({REPLY: ConfigRecord(record)}), reply_to=self.message)

    def error(self, reason: str) -> Message:
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=self.message)


@dataclass(frozen=True)
class Attack:
    """`answer` and `words` are what the server must do: refuse the reply, or use it no further than the words say."""

    act: Callable[[Turn], Message]
    answer: Literal["refused", "limited"]
    words: str
    """A regular expression."""


def of(change: Change, answer: Literal["refused", "limited"], words: str, **record: Any) -> Attack:
    return Attack(lambda turn: turn.changed(change, **record), answer, words)


def header(text: str) -> bytes:
    """The first bytes of an array as NumPy writes it, with nothing behind them."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def too_long(turn: Turn) -> Message:
    """A tensor beside the others that is longer than the gateway allows."""
    arrays = dict(turn.reply.content.array_records[ARRAYS].items())
    turn.reply.content[ARRAYS] = ArrayRecord({**arrays, "long": Array(turn.draw.normal(size=REPLY_LIMIT // 4))})
    return turn.reply


def hot(turn: Turn) -> Message:
    """What no sensor says."""
    reply = far(turn)
    reply.content[TELEMETRY] = ConfigRecord(Telemetry(temperature_c=1e9).to_record())
    return reply


def flood(turn: Turn) -> Message:
    """More requests than a board may send, several at a time."""
    url = f"https://{turn.board.config.server}/v1/fleet/pull-messages"
    headers = {"flwr-public-key": turn.board.public_key, "content-type": "application/protobuf"}
    context = ssl.create_default_context(cafile=turn.board.config.certificate)
    begun = time.monotonic()
    with ThreadPoolExecutor(16) as pool, httpx.Client(verify=context, timeout=60) as client:
        ask = lambda _: client.post(url, content=b"", headers=headers).status_code  # noqa: E731
        found = Counter(pool.map(ask, range(FLOOD)))
    turn.seen["statuses"] = {str(status): count for status, count in found.items()}
    turn.seen["seconds"] = time.monotonic() - begun
    return far(turn)


def not_a_supernode(turn: Turn) -> Message:
    """Requests that no SuperNode sends, some of them in the name of another board, one of them cut in its middle."""
    config, key = turn.board.config, turn.board.public_key
    base, found = f"https://{config.server}/v1/", {}
    context = ssl.create_default_context(cafile=config.certificate)
    headers = {
        "flwr-public-key": key, "flwr-signature": base64.b64encode(b"x" * 100).decode(),
        "content-type": "application/protobuf",
    }  # fmt: skip
    with httpx.Client(verify=context, timeout=60) as client:
        for path in ("control/start-run", "control/list-nodes", "runtime/pull-pending-tasks", "fleet/../control/x"):
            found[path] = client.post(base + path, content=b"", headers=headers).status_code
        for path in ("push-messages", "push-object", "confirm-message-received", "deactivate-node", "activate-node"):
            found[path] = client.post(f"{base}fleet/{path}", content=b"\xff" * 1000, headers=headers).status_code
        found["GET"] = client.get(base + "fleet/pull-messages", headers=headers).status_code
        found["no key"] = client.post(base + "fleet/pull-messages", content=b"").status_code
    turn.seen["statuses"] = found
    head = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nflwr-public-key: {key}\r\nContent-Length: 100000\r\n\r\n"
    for half in (head.encode() + b"x" * 50_000, b"\x00" * 1000, b"POST /v1/fleet/push-object HTTP/1.1\r\nContent-Le"):
        with closing(socket.create_connection(split_address(config.server))) as plain:
            context.wrap_socket(plain, server_hostname=split_address(config.server)[0]).sendall(half)
    return far(turn)


def far(turn: Turn) -> Message:
    """An update so long that it is left out: the device gets on, and nothing of it is in the model."""
    return turn.changed(moved(1e6))


def task_0(turn: Turn) -> Message:
    return turn.instead(Refusal(0, 0, 0, "StateError: everything is lost").to_record())


LEFT_OUT = "server.guard: .*device 2: .*left out"
OF_WEIGHTS: dict[str, Attack] = {
    "a variance of 1e30": of(variance(1e30), "limited", r"device 2: .*running_var is 1e\+30"),
    "an update 10 times too large": of(moved(10), "limited", "server.guard: .*device 2: .*clipped"),
    "an update 100 times too large": of(moved(100), "limited", LEFT_OUT),
    "values of 3e38": of(float64(3e38), "limited", LEFT_OUT),
    "a sign flip": of(moved(-1), "limited", LEFT_OUT),
    "a sensor of 1e9 degrees": Attack(hot, "limited", "device 2: its telemetry is dropped"),
    "too many requests": Attack(flood, "limited", LEFT_OUT),
    "requests of no SuperNode": Attack(not_a_supernode, "limited", LEFT_OUT),
    "a sign flip, 10 times too large": of(moved(-10), "limited", LEFT_OUT),
    "nothing but a long update": Attack(far, "limited", LEFT_OUT),
    "noise 10^6 times too large": of(noise(1e6), "limited", LEFT_OUT),
    "noise of the usual norm": of(noise(1), "limited", LEFT_OUT),
    "10^12 examples": of(moved(-1), "limited", r"device 2: 1e\+12 examples count as", examples=10**12),
    "fp64 values of 1e300": of(float64(1e300), "refused", r"beyond 3.4e\+38, the range of fp32"),
    "fp64 values of 1e39": of(float64(1e39), "refused", r"beyond 3.4e\+38, the range of fp32"),
    "values of -3e38": of(float64(-3e38), "refused", "negative variance"),
    "bytes that are no array": Attack(
        lambda turn: turn.bytes_for_a_tensor(b"no array"), "refused", "cannot be decoded"
    ),
    "a header of 4 PB": Attack(
        lambda turn: turn.bytes_for_a_tensor(
            header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,)}\n")
        ),
        "refused",
        "cannot be decoded",
    ),
    "a header nested too deeply": Attack(
        lambda turn: turn.bytes_for_a_tensor(header("(" * 5000 + "\n")), "refused", "cannot be decoded"
    ),
    "no content": Attack(
        lambda turn: Message(RecordDict(), reply_to=turn.message), "refused", "Trained.device is None"
    ),
    "a report of another task": Attack(lambda turn: turn.said(task=99), "refused", "reply is for"),
    "a loss of NaN": Attack(lambda turn: turn.said(loss=float("nan")), "refused", "with a loss of nan"),
    "a text of 0.9 MB": Attack(
        lambda turn: turn.instead(Refusal(-1, -1, -1, "x" * 900_000).to_record()), "refused", "^x{100,}"
    ),
    "a dead Ray worker": Attack(
        lambda turn: turn.error("<class 'ray.exceptions.ActorDiedError'>: the actor died"), "refused", "Flower error 2"
    ),
    "a wish to be asked at the end of time": Attack(
        lambda turn: turn.instead(BackOff(0, 0, 0, "tired", 1e30).to_record()), "refused", "backed off for"
    ),
    "a reply longer than the gateway allows": Attack(too_long, "refused", "Flower error"),
    "an envelope longer than the gateway allows": Attack(
        lambda turn: turn.error("x" * 2 * REPLY_LIMIT), "refused", "Flower error"
    ),
    "it says that it has lost everything": Attack(task_0, "refused", "StateError: everything is lost"),
}
"""Those that are refused come last: from then on the board is behind the others. The last one makes the server ask
for the first task again, which this board refuses until it is dropped."""
OF_SUMS: dict[str, Attack] = {
    "sums of 1e308": of(sums(1e308), "refused", "statistics/"),
    "permuted labels": of(sums(1, permuted=True), "refused", "looks like the fleet's class|over .* samples of class"),
    "permuted labels, sums 10^6 times too large": of(sums(1e6, permuted=True, counts=True), "refused", "samples"),
    "features 10^6 times too large": of(sums(1e6), "refused", "mean squared norm"),
    "more samples than it has": of(sums(2, counts=True), "refused", "samples"),
}


class Board:
    """The app of a board, which changes what it says. `log` gets what it did."""

    def __init__(self, config: BoardConfig, log: Path) -> None:
        self.config, self._log = config, log
        public = private_key(Path(config.key)).public_key()
        self.public_key = base64.b64encode(
            public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        ).decode()
        self._app, self._draw = make_app(), np.random.default_rng(0)
        self._model: Arrays = {}
        self._round, self._attack = 0, ""
        self._left: dict[str, Iterator[str]] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        unpack_(message)
        reply = self._app(message=message, context=context)
        unpack_(reply)
        if ARRAYS in message.content.array_records:
            self._model = {name: array.numpy() for name, array in message.content.array_records[ARRAYS].items()}
        if message.metadata.message_type != "train" or "reason" in reply.content.config_records[REPLY]:
            return reply
        return self._attacked(message, reply)

    def _attacked(self, message: Message, reply: Message) -> Message:
        told = message.content.config_records[INSTRUCTION]
        of_sums = any(name.startswith("statistics/") for name in reply.content.array_records[ARRAYS])
        attacks = OF_SUMS if of_sums else OF_WEIGHTS
        run = str(told["run"])
        if told["round"] != self._round:  # not where the server asks again in the same round
            self._attack = next(self._left.setdefault(run, iter(attacks)), "")
        self._round = int(told["round"])
        turn = Turn(message, reply, self._model, self._draw, self, {})
        changed = attacks[self._attack].act(turn) if self._attack else far(turn)
        self._note(run=run, round=self._round, attack=self._attack, **turn.seen)
        return changed

    def _note(self, **values: Any) -> None:
        with self._log.open("a") as log:
            log.write(json.dumps(values) + "\n")


def main() -> None:
    config, log = read_config(Path(sys.argv[1])), Path(sys.argv[2])
    board, status = Board(config, log), Status(config.board_folder)
    while True:  # as `lightcl device run`, which connects again
        try:
            with joined(config, config.board_folder) as link:
                status.connected(link.node_id, config.server)
                answer_all(link, config, status, lambda: board, None)
        except (Forgotten, Refused, KeyboardInterrupt, httpx.HTTPError) as error:
            sys.stderr.write(f"{error!r}\n")
        time.sleep(1)


if __name__ == "__main__":
    main()

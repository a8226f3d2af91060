"""A ClientApp that echoes its message, or raises, sleeps or dies as the message says. Runs in real workers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp


def ask(node: int, ttl: float = 300.0, **orders: str | int | float) -> Message:
    """A train message for `node`; orders: number, sleep, error, die (`once`, `always`), and
    meets: the number of another message, whose work must begin before this one's ends."""
    return Message(
        RecordDict({"orders": ConfigRecord(orders)}), dst_node_id=node, message_type=MessageType.TRAIN, ttl=ttl
    )


def answer(reply: Message) -> ConfigRecord:
    return reply.content.config_records["answer"]


def make_client(state: Path) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        orders = message.content.config_records["orders"]
        number = int(orders.get("number", 0))
        with (state / f"started-{number}").open("a") as started:
            started.write(f"{os.getpid()}\n")
        if orders.get("die") == "always" or (orders.get("die") == "once" and _first_time(state, number)):
            os.kill(os.getpid(), signal.SIGKILL)
        if "error" in orders:
            raise ValueError(str(orders["error"]))
        time.sleep(float(orders.get("sleep", 0)))
        end = time.monotonic() + 60
        while "meets" in orders and not (state / f"started-{orders['meets']}").exists():
            if time.monotonic() > end:
                raise TimeoutError("the other message waits for this one")
            time.sleep(0.01)
        sums = {
            name: float(array.numpy().sum())
            for record in message.content.array_records.values()
            for name, array in record.items()
        }
        content = {"number": number, "pid": os.getpid(), **context.node_config, **sums}
        return Message(RecordDict({"answer": ConfigRecord(content)}), reply_to=message)

    return app


def make_client_that_dies(state: Path) -> ClientApp:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _first_time(state: Path, number: int) -> bool:
    return len((state / f"started-{number}").read_text().split()) == 1

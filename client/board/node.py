"""A board's node: one process that asks the server for messages and answers them with `client.app`.

It takes the place of `flower-supernode` and of the process that this starts for each message. PyTorch, the network and
the images stay loaded, no port is opened, and the message on the wire is Flower's. The bundle of Python files that
`flwr run` sends is never fetched: the board executes what is installed on it and nothing else.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.board.config import BoardConfig, read_config
from client.board.setup import private_key
from client.board.status import Status
from lightcl.errors import Failure, RequestError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.app import Message
    from flwr.clientapp import ClientApp

REFUSED = 75
"""Exit code where the server refuses the board, or does not know it any longer: to be tried again later."""

_REFUSED = (
    "the server refused this board. A board that was not shut down cleanly is refused for about a minute; if it goes "
    "on, add the board on the server (`lightcl server add-device`) and check `lightcl device doctor`"
)

SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 3.0


@dataclass(frozen=True)
class Connection:
    """Flower's connection of a node to a SuperLink, with names for its callbacks."""

    node_id: int
    receive: Callable[[], Any]
    send: Callable[..., Any]
    pull_object: Callable[[int, str], bytes]
    push_object: Callable[[int, str, str, bytes], None]
    confirm: Callable[[int, str], None]


class ConnectionLost(Failure):
    """The connection ended with an error."""


@contextmanager
def connection(config: BoardConfig) -> Iterator[Connection]:
    """Registers the board's node at the server; at the end the node leaves. Raises SystemExit where it is refused."""
    from flwr.supernode.fleet_http_connection import http_request_response

    with http_request_response(
        config.server,
        config.insecure,
        None if config.insecure or not config.certificate else str(Path(config.certificate)),
        _keys(Path(config.key)) if config.key else None,
    ) as (node_id, receive, send, _, _, pull_object, push_object, confirm):
        yield Connection(node_id, receive, send, pull_object, push_object, confirm)


def _keys(file: Path) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]:
    key = private_key(file)
    return key, key.public_key()


def answer_all(link: Connection, config: BoardConfig, status: Status, app: Callable[[], ClientApp]) -> None:
    """Asks for messages and answers them, one at a time, without end. `app` is called at the first message.

    Raises what the connection raises.
    """
    from flwr.supercore.run import RunNotRunningException

    quiet_since = time.monotonic()
    while True:
        try:
            received = link.receive()
            if received is not None:
                _answer(link, config, status, app, *received)
                quiet_since = time.monotonic()
                continue
            status.contact()
        except RunNotRunningException:
            status.note("the run has ended on the server; its message is dropped")
        time.sleep(pause(time.monotonic() - quiet_since))


def pause(quiet: float) -> float:
    """Seconds until the server is asked again, `quiet` seconds after the last message.

    Within a round the next message comes soon and waits at most a quarter longer; an idle board asks every 3 seconds.
    """
    return min(max(SHORTEST_PAUSE, quiet / 4), LONGEST_PAUSE)


def _answer(
    link: Connection, config: BoardConfig, status: Status, app: Callable[[], ClientApp], envelope: Message, tree: Any
) -> None:
    from flwr.app import Context, Error, Message, RecordDict
    from flwr.common.constant import ErrorCode
    from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree

    run_id = envelope.metadata.run_id
    stopped: SystemExit | None = None
    begun = time.monotonic()
    try:
        message = pull_and_inflate_object_from_tree(
            tree, partial(link.pull_object, run_id), partial(link.confirm, run_id), return_type=Message
        )
        message.metadata.__dict__["_message_id"] = tree.object_id  # the content is sent without it
        status.working(message)
        reply = app()(message=message, context=Context(run_id, link.node_id, config.node_config(), RecordDict(), {}))
    except SystemExit as error:  # SIGTERM: the server asks again as soon as it hears of it, and need not wait
        stopped, reply = error, Message(Error(ErrorCode.UNKNOWN, "the board was stopped"), reply_to=envelope)
    except Exception as error:  # a programming error or a damaged message; what can go wrong with a device is a reply
        reason = f"{type(error).__name__}: {error}"
        reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=envelope)
    seconds = time.monotonic() - begun
    _send(link, reply, seconds)
    status.answered(reply, seconds)
    if stopped is not None:
        raise stopped


def _send(link: Connection, reply: Message, seconds: float) -> None:
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_utils import push_objects

    run_id = reply.metadata.run_id
    reply.metadata.__dict__["_message_id"] = reply.object_id
    with no_object_id_recompute():
        wanted, session = link.send(reply, get_object_tree(reply), seconds)
        push_objects(
            get_all_nested_objects(reply), partial(link.push_object, run_id, session), object_ids_to_push=wanted
        )


def installed_app() -> ClientApp:
    """The ClientApp of the installed package; PyTorch is loaded here."""
    from client.app import app

    return app


def wait_for_server(address: str, status: Status) -> None:
    """Returns when something listens at HOST:PORT, and says once a minute that it does not."""
    from client.board.network import reach

    pause, told = 1.0, 0.0
    while problem := reach(address):
        if not told or time.monotonic() - told > 60:
            status.note(f"waiting for the server: {problem}")
            told = time.monotonic()
        time.sleep(pause)
        pause = min(pause * 1.5, 10.0)


def serve(config: BoardConfig, status: Status) -> None:
    """Connects and answers until SIGTERM (SystemExit 0). Raises ConnectionLost, and SystemExit where it is refused."""
    wait_for_server(config.server, status)
    joined = False
    failure: BaseException | None = None
    try:
        with connection(config) as link:
            joined = True
            status.connected(link.node_id, config.server)
            try:
                answer_all(link, config, status, installed_app)
            except Exception as error:  # Flower's connection logs it and ends the `with` as if nothing had happened
                failure = error
    except KeyboardInterrupt as error:  # how Flower's heartbeat says that the server does not know the node any longer
        failure = error
    except SystemExit as error:
        if joined or not error.code:
            raise
        status.disconnected(_REFUSED)
        raise SystemExit(REFUSED) from error
    reason = f"{type(failure).__name__}: {failure}" if isinstance(failure, Exception) else "the server forgot the node"
    status.disconnected(f"the connection was lost ({reason})")
    raise ConnectionLost(reason)


def probe(config: BoardConfig) -> None:
    """Joins and leaves at once. Raises Failure where the server refuses the board."""
    try:
        with connection(config):
            pass
    except SystemExit as error:
        raise Failure(_REFUSED) from error


def main() -> None:
    """`python -m client.board.node CONFIG [--probe]`, started by `lightcl device run` and `doctor`.

    It ends with its standard input. `--probe` joins and leaves at once instead.
    """
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = read_config(Path(sys.argv[1]))
    try:
        if "--probe" in sys.argv[2:]:
            probe(config)
        else:
            _end_with_parent()
            serve(config, Status(config.board_folder))
    except (Failure, RequestError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        sys.exit(REFUSED if isinstance(error, Failure) else 2)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(0)


def _end_with_parent() -> None:
    """Sends SIGTERM to this process when its standard input ends, which is a pipe from the parent."""
    from threading import Thread

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()

"""A board's node: one process that asks the server for messages and answers them with `client.app`.

It takes the place of `flower-supernode` and of the process that this starts for each message. PyTorch, the network and
the images stay loaded, no port is opened, and the message on the wire is Flower's. The bundle of Python files that
`flwr run` sends is never fetched: the board executes what is installed on it and nothing else.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from client.board.config import BoardConfig, read_config
from client.board.status import Status
from lightcl.errors import Failure, RequestError

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

    from client.board.journal import Parcel
    from client.board.link import Link

REFUSED = 75
"""Exit code where the server refuses the board, or does not know it any longer: to be tried again later."""

_REFUSED = (
    "the server refused this board. A board that was not shut down cleanly is refused for about a minute; if it goes "
    "on, add the board on the server (`lightcl server add-device`) and check `lightcl device doctor`"
)

MOST_KILLS = 5
"""A message is given up after so many nodes were killed over it: one that needs more memory than there is."""

SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 3.0


class ConnectionLost(Failure):
    """The connection ended with an error."""


def answer_all(
    link: Link,
    config: BoardConfig,
    status: Status,
    app: Callable[[], ClientApp],
    message: Parcel | None,
) -> None:
    """Asks for messages and answers them, one at a time, without end. `app` is called at the first message.

    It begins with the `message` that a killed predecessor left. Raises what the connection raises.
    """
    from flwr.supercore.run import RunNotRunningException

    quiet_since = time.monotonic()
    while True:
        try:
            if message := message or link.receive():
                _answer(link, config, status, app, message)
                link.done()
                message = None
                quiet_since = time.monotonic()
                continue
            status.contact()
            if _is_idle(config, time.monotonic() - quiet_since):
                _start_anew(status)
        except RunNotRunningException:
            status.note("the run has ended on the server; its message is dropped")
            link.done()
            message = None
        time.sleep(pause(time.monotonic() - quiet_since))


def _left_over(link: Link, status: Status) -> Parcel | None:
    """The message that a killed predecessor did not answer. A reply of its own is sent."""
    from flwr.app import Error, Message
    from flwr.common.constant import ErrorCode
    from flwr.supercore.run import RunNotRunningException

    from client.board.link import closed, envelope

    found = link.unfinished()
    if found.message is None and found.reply is None:
        return None
    if found.message and not found.reply and found.kills <= MOST_KILLS:
        status.note("continuing with the message of the node that was killed")
        return found.message
    try:
        if found.reply and found.session:
            link.send_rest(found.reply, found.session)
        elif found.reply:
            link.send(found.reply)
        elif found.message:
            reason = f"the board's node was killed {found.kills} times while it worked on this (out of memory?)"
            error = Message(Error(ErrorCode.CLIENT_APP_CRASHED, reason), reply_to=envelope(found.message))
            link.send(closed(error))
            status.note(reason)
    except RunNotRunningException:
        pass
    else:
        status.note("sent the reply of the node that was killed")
    link.done()
    return None


def _is_idle(config: BoardConfig, quiet: float) -> bool:
    """Whether PyTorch is loaded, and has had nothing to do for `idle_minutes`."""
    return 0 < config.idle_minutes * 60 < quiet and "torch" in sys.modules


def _start_anew(status: Status) -> NoReturn:
    """Replaces this process by a fresh one, which goes on as the same node with a sixth of the memory."""
    status.note("idle: the memory of PyTorch and of the images is given back until the next message")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def pause(quiet: float) -> float:
    """Seconds until the server is asked again, `quiet` seconds after the last message.

    Within a round the next message comes soon and waits at most a quarter longer; an idle board asks every 3 seconds.
    """
    return min(max(SHORTEST_PAUSE, quiet / 4), LONGEST_PAUSE)


def _answer(link: Link, config: BoardConfig, status: Status, app: Callable[[], ClientApp], parcel: Parcel) -> None:
    from flwr.app import Context, Error, Message, RecordDict
    from flwr.common.constant import ErrorCode

    from client.board.link import closed, envelope, opened

    asked = envelope(parcel)
    stopped: SystemExit | None = None
    begun = time.monotonic()
    try:
        message = opened(parcel)
        status.working(message)
        context = Context(asked.metadata.run_id, link.node_id, config.node_config(), RecordDict(), {})
        reply = app()(message=message, context=context)
    except SystemExit as error:  # SIGTERM: the server asks again as soon as it hears of it, and need not wait
        stopped, reply = error, Message(Error(ErrorCode.NODE_UNAVAILABLE, "the board was stopped"), reply_to=asked)
    except Exception as error:  # a programming error or a damaged message; what can go wrong with a device is a reply
        reason = f"{type(error).__name__}: {error}"
        reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=asked)
    seconds = time.monotonic() - begun
    link.send(closed(reply), seconds)
    status.answered(reply, seconds)
    if stopped is not None:
        raise stopped


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
    """Connects and answers until SIGTERM (SystemExit). Raises ConnectionLost, and Failure where it is refused."""
    from client.board.link import Forgotten, Refused, joined

    wait_for_server(config.server, status)
    try:
        with joined(config, config.board_folder) as link:
            left = _left_over(link, status)
            status.connected(link.node_id, config.server)
            answer_all(link, config, status, installed_app, left)
    except Refused as error:
        status.disconnected(f"{_REFUSED} ({error})")
        raise Failure(_REFUSED) from error
    except (Forgotten, KeyboardInterrupt) as error:  # the latter: how Flower says that a request was not authorized
        status.disconnected("the connection was lost (the server forgot the node)")
        raise ConnectionLost("the server forgot the node") from error
    except RequestError:
        raise
    except Exception as error:
        status.disconnected(f"the connection was lost ({type(error).__name__}: {error})")
        raise ConnectionLost(f"{type(error).__name__}: {error}") from error


def probe(config: BoardConfig) -> None:
    """Joins and leaves at once. Raises Failure where the server refuses the board, or cannot be talked to."""
    import httpx

    from client.board.link import Refused, joined

    with tempfile.TemporaryDirectory() as place:
        try:
            with joined(config, Path(place)):
                pass
        except Refused as error:
            raise Failure(f"{_REFUSED} ({error})") from error
        except httpx.HTTPError as error:
            raise Failure(f"the connection failed ({type(error).__name__}: {error})") from error


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

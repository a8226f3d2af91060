"""`lightcl device run`: keeps a board's node running and logs what it says. Imports neither PyTorch nor Flower."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from threading import Thread
from typing import IO

from client.board.config import BoardConfig
from lightcl.errors import Failure, RequestError
from lightcl.storage.files import LOCK

LOG = "log"
_LOG_BYTES, _OLD_LOGS = 1 << 20, 3
_FIRST_DELAY, _LONGEST_DELAY, _GROWTH = 1.0, 60.0, 2.0
_HEALTHY_SECONDS = 60.0
"""A node that ran this long is restarted without delay growth."""
_STOP_SECONDS = 20.0
_WRONG_REQUEST = 2


def run(config: BoardConfig, file: Path) -> None:
    """Starts the node, and again whenever it ends, until KeyboardInterrupt (Ctrl-C or SIGTERM).

    `file` is the configuration's file, which the node reads. Raises RequestError where another process uses the same
    state folder, or the node finds that the configuration is wrong.
    """
    with _alone(config.board_folder) as lock, _Log(config.board_folder) as log:
        log.line(f"lightcl device run: {config.name}, device {config.device} of {config.devices}, {file}")
        notify("READY=1")
        delay = _FIRST_DELAY
        try:
            while True:
                begun = time.monotonic()
                code = _run_node(file, lock, log)
                if code == _WRONG_REQUEST:
                    raise RequestError(f"the node could not start; the reason is above and in {log.file}")
                if time.monotonic() - begun > _HEALTHY_SECONDS:
                    delay = _FIRST_DELAY
                log.line(f"the node ended ({_ending(code)}); starting it again in {delay:.0f} s")
                _wait(delay)
                delay = min(delay * _GROWTH, _LONGEST_DELAY)
        except KeyboardInterrupt:
            notify("STOPPING=1")
            log.line("stopped")


def is_running(folder: Path) -> bool:
    """Whether a `lightcl device run`, or the node that one left behind, holds the lock of this board folder."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """The handle of the board folder's lock, which the node inherits: it is held as long as one of both lives."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RequestError(
            f"state: {folder} cannot be written to ({error.strerror}); give this user the right to write, make room, "
            "or set another folder"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    except BlockingIOError as error:
        raise RequestError(
            f"another `lightcl device run` uses {folder.parent}; `lightcl device status` shows it. A second board on "
            "this machine needs its own configuration with another `state`"
        ) from error
    finally:
        os.close(handle)


def _run_node(file: Path, lock: int, log: _Log) -> int:
    """Runs the node until it ends; returns its exit code. After an interruption it is stopped."""
    environment = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", **os.environ}
    node = subprocess.Popen(
        [sys.executable, "-P", "-m", "client.board.node", str(file)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, pass_fds=[lock],
        start_new_session=True,  # Ctrl-C goes to this process alone, which stops the node
    )  # fmt: skip
    assert node.stdout is not None
    reader = Thread(target=_copy, args=(node.stdout, log), daemon=True)
    reader.start()
    try:
        while (code := _poll(node)) is None:
            notify("WATCHDOG=1")
    except KeyboardInterrupt:
        node.terminate()
        try:
            node.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.line(f"the node did not end within {_STOP_SECONDS:.0f} s and is killed")
            node.kill()
            node.wait()
        raise
    finally:
        reader.join(2)
    return code


def _poll(node: subprocess.Popen[bytes]) -> int | None:
    try:
        return node.wait(10)
    except subprocess.TimeoutExpired:
        return None


def _wait(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        notify("WATCHDOG=1")
        time.sleep(min(left, 10))


def _copy(lines: IO[bytes], log: _Log) -> None:
    for line in lines:
        text = re.sub(r"\x1b\[[0-9;]*m", "", line.decode(errors="replace")).rstrip()
        if text:
            log.line(text)


def _ending(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def notify(text: str) -> None:
    """Tells systemd how the service is (`sd_notify`); nothing where it does not ask."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto(text.encode(), f"\0{address[1:]}" if address.startswith("@") else address)


class _Log:
    """Lines with the time, in a rotating file and on the standard error."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOG
        try:
            self._handler = _Quiet(self.file, maxBytes=_LOG_BYTES, backupCount=_OLD_LOGS, encoding="utf-8")
        except OSError as error:
            raise Failure(f"{self.file} cannot be written ({error.strerror})") from error
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._handler.close()

    def line(self, text: str) -> None:
        record = logging.LogRecord("lightcl", logging.INFO, "", 0, text, (), None)
        self._handler.handle(record)
        with suppress(OSError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


class _Quiet(RotatingFileHandler):
    """A full disk does not end the board's work: the line is then on the standard error only."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

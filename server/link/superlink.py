"""Flower's SuperLink as a process of the server: started, watched, and ended with everything that it started."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

from lightcl.errors import RequestError
from server.link.flower import MARK, environment, program
from server.link.folder import ServerFolder

LOG_BYTES, LOG_FILES = 10 << 20, 3
STOP_SECONDS = 5.0
LONG_LIFE_SECONDS = 300.0
"""A SuperLink that has lived this long starts again at once when it dies."""
LONGEST_PAUSE_SECONDS = 60.0


def pause_before_restart(deaths: int) -> float:
    """Seconds before the SuperLink is started again after so many deaths in a row: 1, 2, 4 ... 60."""
    return float(min(LONGEST_PAUSE_SECONDS, 2 ** (deaths - 1)))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raises RequestError where the server cannot listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RequestError(
                f"port {port} of {host} cannot be used ({error.strerror}); stop the program that listens there, or set "
                "another port in server.toml (and on the boards)"
            ) from error


def superlink_command(folder: ServerFolder, port: int) -> list[str]:
    """Flower's program with its arguments. Raises RequestError where it is not installed."""
    command = [
        program("flower-superlink", environment(folder)), "--host", "127.0.0.1", "--port", str(port),
        "--database", str(folder.database), "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    if folder.settings.insecure:
        return [*command, "--insecure"]
    return [
        *command, "--enable-supernode-auth", "--ssl-ca-certfile", str(folder.authority),
        "--ssl-certfile", str(folder.certificate), "--ssl-keyfile", str(folder.certificate),
    ]  # fmt: skip


class SuperLink:
    """One SuperLink at a time, on `port` of this machine alone: boards reach it through the gateway."""

    def __init__(self, folder: ServerFolder, port: int) -> None:
        self.folder, self.port = folder, port
        self.deaths = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._next_start = 0.0
        self._log = RotatingFileHandler(folder.log, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")

    def keep_up(self) -> str | None:
        """Starts it where it does not run, with growing pauses; returns what to say about that."""
        now = time.monotonic()
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return None
            self._process = None
            end_marked(self.folder.path)  # what it had started
            self.deaths = 1 if now - self._started > LONG_LIFE_SECONDS else self.deaths + 1
            pause = pause_before_restart(self.deaths)
            self._next_start = now + pause
            return f"SuperLink ended ({_ending(code)}); starting it again in {pause:g} s; log: {self.folder.log}"
        if now < self._next_start:
            return None
        self._start()
        return None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self) -> None:
        self._started = time.monotonic()
        # A session of its own: Ctrl-C in the terminal ends it through `stop` alone.
        self._process = subprocess.Popen(
            superlink_command(self.folder, self.port), env=environment(self.folder), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        if self._process.stdout is not None:
            threading.Thread(target=self._copy, args=(self._process.stdout,), daemon=True).start()

    def _copy(self, output: IO[bytes]) -> None:
        """Its output and that of the runs, in a log that does not grow without end."""
        for line in output:
            text = line.decode(errors="replace").rstrip()
            self._log.emit(logging.LogRecord("superlink", logging.INFO, "", 0, text, (), None))

    def last_lines(self, count: int = 5) -> str:
        """The end of the log, for an error."""
        with suppress(OSError):
            return "\n".join(self.folder.log.read_text(errors="replace").splitlines()[-count:])
        return ""

    def stop(self) -> None:
        """Ends it and all that it started; also what a killed server has left."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        self._process = None
        end_marked(self.folder.path)


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def end_marked(folder: Path, seconds: float = 3.0) -> int:
    """Ends every process that carries this server's mark, first asking; returns how many there were.

    They are children of SuperLink, in sessions of their own, and survive where the server is killed.
    """
    found = marked(folder)
    for number, sig in ((0, signal.SIGTERM), (1, signal.SIGKILL)):
        for pid in marked(folder):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, sig)
        deadline = time.monotonic() + (seconds if number == 0 else 2.0)
        while marked(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
    return len(found)


def marked(folder: Path) -> list[int]:
    """The processes of the server on `folder`, except this one (Linux: by their environment)."""
    mark = f"{MARK}={folder}".encode()
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = (place / "environ").read_bytes().split(b"\0")
            if mark in variables and lives(int(place.name)) and int(place.name) != os.getpid():
                found.append(int(place.name))
    return found


def lives(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run_process(folder: Path) -> int | None:
    """The process in which the present run of the server on `folder` works; None where there is none."""
    for pid in marked(folder):
        with suppress(OSError):
            if b"flwr-serverapp" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return None

"""Where `lightcl` starts: how the program answers Ctrl-C, SIGTERM and a closed pipe, from its first import on.

Imports nothing heavy: it is loaded before everything else.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
CLOSED_PIPE = 141
"""Exit codes, as a shell gives them: 128 + the signal's number (SIGINT, SIGPIPE)."""


def main() -> None:
    """Entry point of the installed program."""
    handle_signals()
    from simulations.main import main as run

    run()


def handle_signals() -> None:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; during an import they end the process at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        # An extension module that is being loaded may not survive an exception, and nothing has begun yet.
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            leave("interrupted")
        frame = frame.f_back
    raise KeyboardInterrupt


def leave(text: str) -> NoReturn:
    """Prints a line on the standard error and ends the process as it is, without its exit handlers."""
    os.write(2, f"{text}\n".encode())
    os._exit(INTERRUPTED)


def output_handle() -> int | None:
    """A second handle of the standard output, to ask `pipe_closed`: libraries replace the first one."""
    try:
        return os.dup(1)
    except OSError:  # there is none
        return None


def pipe_closed(handle: int | None) -> bool:
    """Whether the handle is that of a pipe that nobody reads any longer, as after `| head -1`."""
    if handle is None:
        return False
    waiting = select.poll()
    waiting.register(handle, 0)
    return any(event & select.POLLERR for _, event in waiting.poll(0))


def end_quietly() -> NoReturn:
    """Ends a program whose output nobody reads: what is still buffered is dropped without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(CLOSED_PIPE)


if __name__ == "__main__":
    main()

"""The HTTP endpoint of `lightcl device serve`: a follower of a device's state, and a server that asks its model."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from client.commands.predict import answer
from client.request import LocalServer, content_length
from lightcl.errors import Failure, RequestError
from lightcl.export.folders import Place
from lightcl.export.model import Model, read_model
from lightcl.storage.state import MANIFEST

POLL_SECONDS = 1.0
NO_MODEL = "no model yet: the first one comes with the first task that is learned"
MOST_BYTES = 32 * 2**20
"""Of an image file."""
READ_TIMEOUT = 30.0
"""Seconds that a client may keep a connection without sending anything."""


class Follower:
    """Keeps the newest finished model that `find` leads to, whose training may go on in another process.

    A thread looks once per second whether the state was replaced, or a newer run has begun, and then reads it. Until
    the new model is complete, and where the state cannot be read, the model before it answers.
    """

    def __init__(self, find: Callable[[], Place]) -> None:
        self.find = find
        self.model: Model | None = None
        """None until there is a model."""
        self.problem: str | None = None
        """Why the newest state is not used, or None."""
        self._seen: tuple[Path, int, int] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)
        self.look()

    def look(self) -> None:
        """Reads the state if it was replaced since the last time."""
        try:
            place = self.find()
            status = (place.folder / MANIFEST).stat()
            saved = (place.folder, status.st_ino, status.st_mtime_ns)
            if saved == self._seen:
                return
            model = read_model(*place)
        except (RequestError, Failure, OSError) as error:  # the next look tries again
            self.problem = str(error)
            return
        self._seen, self.problem = saved, None
        if model.finished or self.model is None or not self.model.finished:
            self.model = model

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.look()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


class Endpoint(LocalServer):
    """Listens on 127.0.0.1 only: whoever may use this machine may ask, and nobody else."""

    def __init__(self, follower: Follower, port: int) -> None:
        """Raises RequestError for a port that is not free."""
        self.follower = follower
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise RequestError(f"--port {port}: {error.strerror}; name another port, or 0 for any free one") from error

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Refused(Exception):
    """A request that gets an error as its answer."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint
    protocol_version = "HTTP/1.1"
    server_version = "lightcl"
    timeout = READ_TIMEOUT
    paths: ClassVar = ("GET /health", "POST /predict")

    def do_GET(self) -> None:
        follower = self.server.follower
        if self.path != "/health":
            self._send(HTTPStatus.NOT_FOUND, {"error": f"no such page; allowed: {', '.join(self.paths)}"})
            return
        model, problem = follower.model, {"problem": follower.problem} if follower.problem else {}
        if model is None:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, {"error": NO_MODEL} | problem)
            return
        self._send(HTTPStatus.OK, {"model": model.version_values, "classes": model.about.classes} | problem)

    def do_POST(self) -> None:
        try:
            content = self._body()
            model = self.server.follower.model  # one model for the whole answer
            if model is None:
                raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, NO_MODEL)
            try:
                image = model.read_image(content, "the request's body")
            except RequestError as error:
                raise _Refused(HTTPStatus.BAD_REQUEST, f"{error}; send an image file as the body") from error
            self._send(HTTPStatus.OK, answer(model, model.scores(image[None])[0]))
        except _Refused as error:
            self.close_connection = True  # what is left of the body is not read
            self._send(error.status, {"error": str(error)})

    def _body(self) -> bytes:
        """The image file. Raises _Refused."""
        if self.path != "/predict":
            raise _Refused(HTTPStatus.NOT_FOUND, f"no such page; allowed: {', '.join(self.paths)}")
        length = content_length(self.headers)
        if length is None:
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "the request needs a Content-Length")
        if length > MOST_BYTES:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is too large (allowed: up to {MOST_BYTES} bytes)"
            )
        content = self.rfile.read(length)
        if len(content) < length:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"the body has {len(content)} of {length} bytes")
        return content

    def _send(self, status: HTTPStatus, values: dict[str, Any]) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Errors alone: a line per request would fill a board's journal."""

    def log_error(self, format: str, *args: Any) -> None:
        sys.stderr.write(f"serve: {format % args}\n")

"""The HTTP endpoint of `lightcl device serve`: a follower of a device's state, and a server that asks its model."""

from __future__ import annotations

import json
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, Self

from client.commands.predict import answer
from lightcl.errors import Failure, RequestError
from lightcl.export.folders import Place
from lightcl.export.model import Model, read_model
from lightcl.storage.state import MANIFEST

POLL_SECONDS = 1.0
MOST_BYTES = 32 * 2**20
"""Of an image file."""
READ_TIMEOUT = 30.0
"""Seconds that a client may keep a connection without sending anything."""


class Follower:
    """Keeps the newest finished model of a state folder, whose training may go on in another process.

    A thread looks at the manifest once per second and reads the state after it was replaced. Until the new model is
    complete, and where the state cannot be read, the model before it answers.
    """

    def __init__(self, place: Place) -> None:
        """Raises RequestError where nothing was trained yet, StateError for a state that cannot be read."""
        self.place = place
        self.problem: str | None = None
        """Why the newest state is not used, or None."""
        self._seen = self._manifest()
        self.model: Model = read_model(*place)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follower", daemon=True)

    def look(self) -> None:
        """Reads the state if it was replaced since the last time."""
        manifest = self._manifest()
        if manifest == self._seen:
            return
        try:
            model = read_model(*self.place)
        except (RequestError, Failure, OSError) as error:  # the next look tries again
            self.problem = str(error)
            return
        self._seen, self.problem = manifest, None
        if model.finished or not self.model.finished:
            self.model = model

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.look()

    def _manifest(self) -> tuple[int, int] | None:
        """Changes with every save; None while there is no state."""
        try:
            status = (self.place.folder / MANIFEST).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


class Endpoint(ThreadingHTTPServer):
    """Listens on 127.0.0.1 only: whoever may use this machine may ask, and nobody else."""

    daemon_threads = True

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
        values: dict[str, Any] = {"model": follower.model.version_values, "classes": follower.model.about.classes}
        self._send(HTTPStatus.OK, values | ({"problem": follower.problem} if follower.problem else {}))

    def do_POST(self) -> None:
        try:
            content = self._body()
            model = self.server.follower.model  # one model for the whole answer
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
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "the request needs a Content-Length")
        if int(length) > MOST_BYTES:
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length} bytes; allowed: up to {MOST_BYTES} for an image file"
            )
        content = self.rfile.read(int(length))
        if len(content) < int(length):
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

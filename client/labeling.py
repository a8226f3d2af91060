"""The local web page of `lightcl device label`: one unlabeled image at a time, one key per class. Needs no PyTorch."""

from __future__ import annotations

import io
import json
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import ImageOps

from client.request import LocalServer, content_length
from lightcl.data.field import FieldTasks, NotReady
from lightcl.data.sources.decoding import opened
from lightcl.data.sources.field import SETTLE_SECONDS, UNLABELED, Contents, FieldFile, read_contents, settled
from lightcl.errors import RequestError

PAGE = Path(__file__).with_name("label.html")
KEYS = "123456789abcdefghijklmnopqrstvwxyz"
"""One per class; the letter u is for undo, and space skips."""
LONGEST_SIDE = 1600
"""Pixels of an image as it is shown."""
MOST_PROBLEMS = 5
MOST_BYTES = 10_000
"""Of a request's body."""
READ_TIMEOUT = 30.0
"""Seconds that a client may keep a connection without sending anything."""


@dataclass(frozen=True)
class Move:
    """A label that was given: the names of the image before and after."""

    before: str
    after: str


@dataclass
class Labeling:
    """The images that wait for a label in a field's folder. Its methods may be called by several threads.

    `tasks`: of the newest run on this board, to say how many images the next task has; None: not known.
    """

    folder: Path
    classes: tuple[str, ...]
    tasks: FieldTasks | None = None
    settle: float = SETTLE_SECONDS
    clock: Callable[[], float] = time.time
    _skipped: list[str] = field(default_factory=list)
    _moves: list[Move] = field(default_factory=list)
    _taken_back: set[str] = field(default_factory=set)
    _unreadable: dict[str, str] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @classmethod
    def of(cls, folder: Path, classes: Sequence[str], tasks: FieldTasks | None = None, **options: Any) -> Labeling:
        """`classes`: empty for those whose folders are there. Raises RequestError where there is no folder or class."""
        if not folder.is_dir():
            raise RequestError(f"{folder} is not a folder; name the one that the images are in (data in device.toml)")
        found = tuple(classes) or tuple(
            sorted(
                place.name
                for place in folder.iterdir()
                if place.is_dir() and place.name != UNLABELED and not place.name.startswith(".")
            )
        )
        if not found:
            raise RequestError(
                f"{folder} has no folders of classes; make one per class, e.g. {folder / 'cup'}, or start the run: the "
                "board makes them"
            )
        if len(found) > len(KEYS):
            raise RequestError(f"{folder} has {len(found)} classes; the page has keys for {len(KEYS)}")
        return cls(folder, found, tasks, **options)

    def state(self) -> dict[str, Any]:
        """What the page shows: the next image, the classes with their keys, and the progress. Raises OSError."""
        with self._lock:
            contents, waiting = self._look()
            names = [file.name for file in waiting if file.name not in self._unreadable]
            names.sort(key=lambda name: (name in self._skipped and 1 + self._skipped.index(name), name))
            names.sort(key=lambda name: name not in self._taken_back)
            labeled = Counter(label for _, label in contents.labeled)
            broken = [self._unreadable[name] for name in sorted(self._unreadable)]
            return {
                "image": names[0] if names else None,
                "waiting": len(names),
                "arriving": len(contents.unlabeled) - len(waiting),
                "classes": [
                    {"name": name, "key": key, "images": labeled[name]}
                    for name, key in zip(self.classes, KEYS, strict=False)
                ],
                "undo": self._moves[-1].after if self._moves else None,
                "given": len(self._moves),
                "task": self._next_task(),
                "problems": [*contents.problems, *broken][:MOST_PROBLEMS],
            }

    def _look(self) -> tuple[Contents, list[FieldFile]]:
        """All images, and those of the unlabeled ones that are complete: one that was taken back is."""
        now = self.clock()
        contents = read_contents(self.folder, self.classes, now, 0.0, self._taken())
        complete = [
            file
            for file in contents.unlabeled
            if file.name in self._taken_back or settled(file.arrived, now, self.settle)
        ]
        return contents, complete

    def _next_task(self) -> str | None:
        if self.tasks is None:
            return None
        try:
            fresh = FieldTasks(self.tasks.folder, self.tasks.plan, clock=self.clock, settle=0.0)
            number = len(fresh.cut)
            found = fresh.waiting(inspect=False)
            found.problems = []  # the page lists them
            return found.text(number, fresh.plan) if number < fresh.plan.tasks else None
        except NotReady as error:
            return error.reason

    def picture(self, name: str) -> bytes:
        """An unlabeled image as JPEG. Raises KeyError where there is none of this name that can be shown."""
        file = self._file_of(name)
        content = io.BytesIO()
        try:
            with opened(file, f"{name} cannot be shown") as picture:
                picture.draft("RGB", (LONGEST_SIDE, LONGEST_SIDE))
                shown = picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
                shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE))  # before it is copied
                ImageOps.exif_transpose(shown).convert("RGB").save(content, "JPEG", quality=90)
        except RequestError as error:
            if not isinstance(error.__cause__, FileNotFoundError):  # it was moved a moment ago
                with self._lock:
                    self._unreadable[name] = str(error)
            raise KeyError(name) from error
        return content.getvalue()

    def label(self, name: str, label: str) -> None:
        """Moves an image to the folder of a class. Raises KeyError for an unknown image or class, OSError."""
        if label not in self.classes:
            raise KeyError(label)
        with self._lock:
            file = self._file_of(name)
            target = self._free(PurePosixPath(label, file.name))
            (self.folder / label).mkdir(exist_ok=True)
            file.rename(self.folder / target)
            self._moves.append(Move(name, target))
            self._taken_back.discard(name)

    def skip(self, name: str) -> None:
        """Puts an image behind the others. Raises KeyError."""
        with self._lock:
            self._file_of(name)
            self._skipped = [*(other for other in self._skipped if other != name), name]
            self._taken_back.discard(name)

    def undo(self) -> None:
        """Takes the last label back. Raises KeyError where there is none, or a task has the image; OSError."""
        with self._lock:
            if not self._moves:
                raise KeyError("there is no label to take back")
            move = self._moves.pop()
            if move.after in self._taken():
                raise KeyError(f"{move.after} is part of a task already")
            target = self._free(PurePosixPath(move.before))
            try:
                (self.folder / move.after).rename(self.folder / target)
            except FileNotFoundError as error:
                raise KeyError(f"{move.after} is not there any more") from error
            self._skipped = [other for other in self._skipped if other != target]
            self._taken_back.add(target)

    def _taken(self) -> set[str]:
        if self.tasks is None:
            return set()
        cut = FieldTasks(self.tasks.folder, self.tasks.plan).cut
        return {image.file for task in cut for image in task.images}

    def _file_of(self, name: str) -> Path:
        """The file of an image that waits. Only names that were found in the folder are known: no path leads out."""
        with self._lock:
            known = {file.name: file for file in self._look()[1]}
        return self.folder / known[name].name

    def _free(self, wanted: PurePosixPath) -> str:
        """The name, or one like it where there is such a file already."""
        name, number = wanted, 2
        while (self.folder / name).exists():
            name, number = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}"), number + 1
        return name.as_posix()


class LabelServer(LocalServer):
    """Serves the page. On another address than this machine's own, the page's path has a secret part."""

    def __init__(self, labeling: Labeling, host: str, port: int) -> None:
        """Raises RequestError for an address or port that cannot be used."""
        self.labeling, self.host = labeling, host
        try:
            local = ip_address(host).is_loopback
        except ValueError as error:
            raise RequestError(f"--host {host}: not an address of this machine, such as 127.0.0.1") from error
        self.prefix = "" if local else f"/{secrets.token_urlsafe(16)}"
        if ":" in host:
            raise RequestError(f"--host {host}: only IPv4 addresses, such as 127.0.0.1")
        if ip_address(host).is_unspecified:
            raise RequestError(f"--host {host}: name one address of this machine, the one that the other device uses")
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise RequestError(f"--host {host} --port {port}: {error.strerror}; name others, or port 0") from error

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.server_port}{self.prefix}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """What a browser that was given `url` sends as Host; another one was led here by a foreign page."""
        names = (self.host, *(("localhost",) if not self.prefix else ()))
        return tuple(f"{name}:{self.server_port}" for name in names)

    def allows(self, headers: Any) -> bool:
        """Whether a request comes from this server's own page, or from a person who typed the address."""
        if headers.get("Host", "") not in self.hosts or headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            return False
        origin = headers.get("Origin")
        try:
            return origin is None or urlsplit(origin).netloc in self.hosts
        except ValueError:  # not an address: http://[
            return False


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    protocol_version = "HTTP/1.1"
    server_version = "lightcl"
    timeout = READ_TIMEOUT

    def do_GET(self) -> None:
        path = self._path()
        if path is None:
            return
        labeling = self.server.labeling
        if path == "/":
            self._send(HTTPStatus.OK, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path == "/state":
            self._answer(labeling.state)
        elif path == "/image":
            name = parse_qs(urlsplit(self.path).query).get("name", [""])[0]
            try:
                self._send(HTTPStatus.OK, labeling.picture(name), "image/jpeg")
            except KeyError:
                self._json(HTTPStatus.NOT_FOUND, {"error": "no such image waits for a label"})
        else:
            self._json(HTTPStatus.NOT_FOUND, {"error": "no such page"})

    def do_POST(self) -> None:
        path = self._path()
        if path is None:
            return
        values = self._body()
        if values is None:
            return
        labeling, image = self.server.labeling, str(values.get("image"))
        acts: dict[str, Callable[[], None]] = {
            "/label": lambda: labeling.label(image, str(values.get("class"))),
            "/skip": lambda: labeling.skip(image),
            "/undo": labeling.undo,
        }
        if path not in acts:
            self._json(HTTPStatus.NOT_FOUND, {"error": "no such page"})
            return

        def act() -> dict[str, Any]:
            acts[path]()
            return labeling.state()

        self._answer(act)

    def _answer(self, act: Callable[[], dict[str, Any]]) -> None:
        try:
            self._json(HTTPStatus.OK, act())
        except KeyError as error:
            self._json(HTTPStatus.CONFLICT, {"error": f"{error.args[0]}: not possible any more"})
        except OSError as error:
            text = f"the disk refuses it: {error.strerror} ({error.filename})"
            self._json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": text})

    def _path(self) -> str | None:
        """The path below the secret part; None where the request was refused."""
        server = self.server
        if not server.allows(self.headers):
            self._json(HTTPStatus.FORBIDDEN, {"error": f"only for the page at {server.hosts[0]}"})
            return None
        try:
            path = urlsplit(self.path).path
        except ValueError:
            self._json(HTTPStatus.BAD_REQUEST, {"error": "the address of the page cannot be read"})
            return None
        if not path.startswith(f"{server.prefix}/"):
            self._json(HTTPStatus.NOT_FOUND, {"error": "no such page"})
            return None
        return path.removeprefix(server.prefix)

    def _body(self) -> dict[str, Any] | None:
        """The JSON object of a request; None where it was refused. A form of a foreign page cannot send JSON."""
        length = content_length(self.headers)
        if self.headers.get_content_type() != "application/json" or length is None or length > MOST_BYTES:
            self._json(HTTPStatus.BAD_REQUEST, {"error": f"expected JSON of at most {MOST_BYTES} bytes"})
            return None
        try:
            values = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            self._json(HTTPStatus.BAD_REQUEST, {"error": "expected a JSON object"})
            return None
        return values

    def _json(self, status: HTTPStatus, values: dict[str, Any]) -> None:
        if status != HTTPStatus.OK:
            self.close_connection = True  # what is left of the body is not read
        self._send(status, json.dumps(values).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; img-src 'self' data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        )
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Errors alone."""

    def log_error(self, format: str, *args: Any) -> None:
        sys.stderr.write(f"label: {format % args}\n")

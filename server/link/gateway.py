"""The only port that boards reach: passes the requests of SuperNodes on to SuperLink, and nothing else.

Flower 1.41 answers boards, `flwr` and its own processes on one port, and asks only boards for a key: anyone who reaches
that port may register a key of their own or start a run, which is code that the server and all boards execute. So
SuperLink listens on this machine alone, and this program stands before it. It knows the boards' keys (Flower checks the
signatures), slows down a board that sends too many requests, and cuts off a reply that is too long before it is stored.
SuperLink is told so at once, as if by the board: its round would wait for the rest of the reply.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from lightcl.errors import Failure
from server.link.folder import ServerFolder
from server.link.limits import MOST_SENDERS, Limits

PATH = re.compile(r"/v1/fleet/[a-z-]+")
BEGINS_REPLY, CONTINUES_REPLY = "/v1/fleet/push-messages", "/v1/fleet/push-object"
WITHDRAWS_REPLY, LEAVES = "/v1/fleet/confirm-message-received", "/v1/fleet/deactivate-node"
KNOCKS = ("/v1/fleet/register-node", "/v1/fleet/activate-node")
"""How a SuperNode begins. Flower itself refuses a key that it does not know, so that SuperNodes say why they end."""
KEY_HEADER = "flwr-public-key"
MOST_BODY_BYTES = 32 << 20
"""Of one request; Flower sends tensors in pieces of 5 MiB."""
MOST_KEPT_BYTES = 1 << 20
"""Of the request that begins a reply; it lists the reply's pieces, about 100 bytes each."""
BODY_SECONDS = 300.0
"""In which a request must have arrived: 5 MiB at 150 kbit per second."""
MOST_CONNECTIONS = 1000
LONGEST_WAIT_SECONDS = 10.0
"""A request that would have to wait longer is refused with 503, after which SuperNodes try again."""
UPSTREAM_SECONDS = 60.0
HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
     "upgrade", "host", "content-length")
)  # fmt: skip

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _TooLarge(Exception):
    """The body of a request is longer than allowed."""


@dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes
    headers: list[tuple[bytes, bytes]]

    @classmethod
    def text(cls, status: int, text: str) -> _Answer:
        return cls(status, text.encode(), [(b"content-type", b"text/plain; charset=utf-8")])


class Gateway:
    """An ASGI application before the SuperLink at `upstream`.

    `keys` are the boards' keys as their headers give them, None for a server without keys. `open` is set while
    SuperLink runs and knows all boards: before that, one that it does not know yet would be told to go away for good.
    """

    def __init__(self, upstream: str, limits: Limits, keys: frozenset[str] | None, authority: str | None) -> None:
        self.keys, self.open = keys, False
        self.refused = 0
        """Requests that were not passed on."""
        self.cut_off: set[str] = set()
        """Keys of boards of which a reply was cut off since somebody looked."""
        self._begun: dict[str, bytes] = {}  # the request that began a sender's last reply
        self._upstream, self._limits = upstream, limits
        self._verify: ssl.SSLContext | bool = ssl.create_default_context(cafile=authority) if authority else False
        self._client: httpx.AsyncClient | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        answer = await self._answer(scope, receive)
        if answer.status in (401, 404, 413):
            self.refused += 1
        headers = [*answer.headers, (b"content-length", str(len(answer.body)).encode())]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    async def close(self) -> None:
        """Closes the connections to SuperLink; the next request opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _answer(self, scope: Scope, receive: Receive) -> _Answer:
        path = scope["path"]
        if scope["method"] != "POST" or not PATH.fullmatch(path):
            return _Answer.text(404, "this port is for SuperNodes only")
        if not self.open:
            return _Answer.text(503, "the server is starting")
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        key = next((value for name, value in headers if name == KEY_HEADER), "")
        known = self.keys is None or key in self.keys
        if not known and path not in KNOCKS:
            return _Answer.text(401, "this key is not registered; on the server run: lightcl server add-device")
        # The key is not proved here, so nobody can use up what another machine may send; and strangers count together.
        sender = f"{(scope.get('client') or ('',))[0]} {key if known else 'strangers'}"
        wait = self._limits.wait_for(sender)
        if wait > LONGEST_WAIT_SECONDS:
            return _Answer.text(503, "too many requests")
        await asyncio.sleep(wait)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _body(receive)
        except TimeoutError:
            return _Answer.text(408, f"a request may take {BODY_SECONDS:g} s to arrive")
        except _TooLarge:
            return _Answer.text(413, f"a request may have {MOST_BODY_BYTES} bytes")
        except ConnectionError:
            return _Answer.text(400, "the request was cut off")
        begins = path == BEGINS_REPLY
        if (begins or path == CONTINUES_REPLY) and not self._limits.accepts(sender, len(body), begins=begins):
            self.cut_off.add(key)
            await self._end_reply(sender, headers, body, begins=begins)
            return _Answer.text(413, "the reply is longer than most_reply_mib in the server's server.toml")
        if begins:
            self._note_begun(sender, body)
        return await self._pass_on(path, headers, body)

    def _note_begun(self, sender: str, body: bytes) -> None:
        if len(self._begun) >= MOST_SENDERS:  # where anybody may connect: their replies end as in `_end_reply`
            self._begun.clear()
        self._begun[sender] = body if len(body) <= MOST_KEPT_BYTES else b""

    async def _end_reply(self, sender: str, headers: list[tuple[str, str]], body: bytes, *, begins: bool) -> None:
        """Tells SuperLink, with the board's own signature, that a reply will not come, or not come any further.

        Of a reply that has begun, the part that SuperLink has is withdrawn; it then gives the server an error in its
        place. (Without that it does so after three minutes.) Before that it knows of none, but only of the board, which
        leaves; its next heartbeat brings it back.
        """
        # Once per reply: its pieces come several at a time.
        first = body if begins else self._begun.pop(sender, b"")
        if not first:
            return
        request = _departure(first) if begins else _withdrawal(first)
        if request:
            await self._pass_on(LEAVES if begins else WITHDRAWS_REPLY, headers, request)

    async def _pass_on(self, path: str, headers: list[tuple[str, str]], body: bytes) -> _Answer:
        if self._client is None:  # made here: it belongs to the loop that uses it
            limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
            self._client = httpx.AsyncClient(verify=self._verify, timeout=UPSTREAM_SECONDS, limits=limits)
        try:
            found = await self._client.post(
                self._upstream + path, content=body, headers=[pair for pair in headers if pair[0] not in HOP_BY_HOP]
            )
        except httpx.HTTPError as error:
            return _Answer.text(503, f"SuperLink does not answer ({type(error).__name__})")
        # httpx has undone a compression of the body.
        dropped = HOP_BY_HOP | {"content-encoding"}
        passed = [(name, value) for name, value in found.headers.raw if name.decode("latin-1").lower() not in dropped]
        return _Answer(found.status_code, found.content, passed)


# Flower's messages are loaded where they are needed: they take as much memory as all the rest of the server.


def _withdrawal(body: bytes) -> bytes:
    """The request that withdraws the reply which the request `body` begins; empty where it begins none."""
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
    from google.protobuf.message import DecodeError

    try:
        sent = PushMessagesRequest.FromString(body)
        run, reply = sent.messages_list[0].metadata.run_id, sent.message_object_trees[0].object_id
    except (DecodeError, IndexError):
        return b""
    request = ConfirmMessageReceivedRequest(node=sent.node, run_id=run, message_object_id=reply)
    return bytes(request.SerializeToString())


def _departure(body: bytes) -> bytes:
    """The request by which the board leaves that begins a reply with `body`; empty where it is none."""
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest, PushMessagesRequest
    from google.protobuf.message import DecodeError

    try:
        node = PushMessagesRequest.FromString(body).node.node_id
    except DecodeError:
        return b""
    return bytes(DeactivateNodeRequest(node_id=node).SerializeToString())


async def _body(receive: Receive) -> bytes:
    """The body of a request. Raises _TooLarge as soon as it is longer than allowed, and ConnectionError."""
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        piece = message.get("body", b"")
        size += len(piece)
        if size > MOST_BODY_BYTES:
            raise _TooLarge
        pieces.append(piece)
        if not message.get("more_body"):
            return b"".join(pieces)


class GatewayServer:
    """The gateway, listening in a thread of this process."""

    def __init__(self, folder: ServerFolder, inner_port: int, keys: frozenset[str] | None) -> None:
        settings, secure = folder.settings, not folder.settings.insecure
        limits = Limits(settings.most_requests_per_second, settings.most_reply_mib << 20)
        upstream = f"{'https' if secure else 'http'}://127.0.0.1:{inner_port}"
        self.app = Gateway(upstream, limits, keys, str(folder.authority) if secure else None)
        certificate = str(folder.certificate) if secure else None
        config = uvicorn.Config(
            self.app, host=settings.listen, port=settings.port, lifespan="off", log_level="critical", access_log=False,
            server_header=False, limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=3,
            ssl_certfile=certificate, ssl_keyfile=certificate,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="gateway", daemon=True)

    def start(self) -> None:
        """Raises Failure where it cannot listen."""
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise Failure(f"port {self._server.config.port} cannot be used; stop the program that listens there")
            time.sleep(0.02)

    def stop(self) -> None:
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(5)

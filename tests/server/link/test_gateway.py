"""The gateway before SuperLink: what it passes on, what it refuses, and what it cuts off."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from flwr.proto.fleet_pb2 import DeactivateNodeRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata as MetadataProto
from flwr.proto.node_pb2 import Node

from server.link import gateway as module
from server.link.gateway import Gateway
from server.link.limits import Limits
from server.link.superlink import free_port


class Upstream:
    """An HTTP server that keeps what it gets and answers with the body backwards."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[bytes, bytes], bytes]] = []

    async def __call__(self, scope: module.Scope, receive: module.Receive, send: module.Send) -> None:
        body = await module._body(receive)
        self.requests.append((scope["path"], dict(scope["headers"]), body))
        headers = [(b"content-type", b"application/x-protobuf"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        await send({"type": "http.response.body", "body": body[::-1]})


@pytest.fixture
def upstream() -> Iterator[tuple[Upstream, str]]:
    app, port = Upstream(), free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield app, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def opened(url: str, keys: frozenset[str] | None = frozenset({"good"}), reply_bytes: int = 1000) -> Gateway:
    gateway = Gateway(url, Limits(100, reply_bytes), keys, None)
    gateway.open = True
    return gateway


def status_of(url: str, receive: module.Receive) -> object:
    """What the gateway answers to a request whose body comes as `receive` gives it."""
    sent: list[module.MutableMapping[str, object]] = []

    async def send(message: module.MutableMapping[str, object]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/fleet/push-object", "headers": [(b"flwr-public-key", b"good")],
    }  # fmt: skip
    asyncio.run(opened(url)(scope, receive, send))
    return sent[0]["status"]


def post(
    gateway: Gateway, *requests: tuple[str, bytes], key: str = "good", method: str = "POST"
) -> list[httpx.Response]:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://gateway") as client:
            headers = {"Flwr-Public-Key": key, "flwr-signature": "s", "connection": "close"}
            answers = [await client.request(method, path, content=body, headers=headers) for path, body in requests]
        await gateway.close()
        return answers

    return asyncio.run(ask())


def test_requests_of_boards_are_passed_on_as_they_are(upstream: tuple[Upstream, str]) -> None:
    app, url = upstream
    (answer,) = post(opened(url), ("/v1/fleet/pull-messages", b"abc"))
    assert (answer.status_code, answer.content) == (201, b"cba")
    assert answer.headers["content-type"] == "application/x-protobuf"
    ((path, headers, body),) = app.requests
    assert (path, body, headers[b"flwr-public-key"], headers[b"flwr-signature"]) == (
        "/v1/fleet/pull-messages", b"abc", b"good", b"s",
    )  # fmt: skip


def test_nothing_else_is_passed_on(upstream: tuple[Upstream, str]) -> None:
    app, url = upstream
    gateway = opened(url)
    paths = [
        "/", "/docs", "/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/pull-pending-tasks",
        "/v1/fleet/", "/v1/fleet/a/../../control/start-run", "/v1/fleet/..%2fcontrol", "/v1/fleet/x%0a", "//v1/fleet/x",
    ]  # fmt: skip
    assert {one.status_code for one in post(gateway, *((path, b"") for path in paths))} == {404}
    assert post(gateway, ("/v1/fleet/pull-messages", b""), method="GET")[0].status_code == 404
    assert app.requests == []
    assert gateway.refused == len(paths) + 1


def test_only_known_keys_are_let_in_and_not_before_the_server_is_ready(upstream: tuple[Upstream, str]) -> None:
    app, url = upstream
    gateway = opened(url)
    pull = ("/v1/fleet/pull-messages", b"")
    assert post(gateway, pull, key="other")[0].status_code == 401
    gateway.keys = frozenset({"other"})
    assert post(gateway, pull)[0].status_code == 401
    gateway.open = False
    assert post(gateway, pull, key="other")[0].status_code == 503
    assert app.requests == []
    assert post(opened(url, keys=None), pull, key="any")[0].status_code == 201


def test_strangers_may_knock_and_count_together(upstream: tuple[Upstream, str]) -> None:
    """Flower refuses them; what they send with one key after the other uses up one allowance."""
    app, url = upstream
    gateway = Gateway(url, Limits(1, 1000, clock=lambda: 0.0), frozenset(), None)
    gateway.open = True
    knocks = [("/v1/fleet/activate-node", b"")]
    for number in range(2):
        assert [one.status_code for one in post(gateway, *knocks * 10, key=str(number))] == [201] * 10
    for _ in range(11):
        gateway._limits.wait_for("127.0.0.1 strangers")
    assert post(gateway, *knocks, key="21")[0].status_code == 503
    assert len(app.requests) == 20


def test_a_reply_that_is_too_long_is_cut_off(upstream: tuple[Upstream, str], monkeypatch: pytest.MonkeyPatch) -> None:
    app, url = upstream
    begin, more = "/v1/fleet/push-messages", "/v1/fleet/push-object"
    answers = post(opened(url), (begin, b"x" * 100), (more, b"x" * 900), (more, b"x"), (begin, b"x" * 1000))
    assert [one.status_code for one in answers] == [201, 201, 413, 201]
    assert "most_reply_mib" in answers[2].text
    assert [len(body) for _, _, body in app.requests] == [100, 900, 1000]
    monkeypatch.setattr(module, "MOST_BODY_BYTES", 50)
    (answer,) = post(opened(url), ("/v1/fleet/pull-messages", b"x" * 51))
    assert answer.status_code == 413


def begin(node: int, run: int, reply: str) -> bytes:
    """The first request of a reply, as a SuperNode sends it."""
    return PushMessagesRequest(
        node=Node(node_id=node),
        messages_list=[MessageProto(metadata=MetadataProto(run_id=run))],
        message_object_trees=[ObjectTree(object_id=reply)],
    ).SerializeToString()


def test_superlink_hears_of_a_reply_that_is_cut_off(upstream: tuple[Upstream, str]) -> None:
    """Once, with the board's own signature: what it has of the reply is withdrawn."""
    app, url = upstream
    gateway = opened(url)
    more = ("/v1/fleet/push-object", b"x" * 600)
    post(gateway, ("/v1/fleet/push-messages", begin(7, 8, "r")), more, more, more)
    paths = [path.rpartition("/")[2] for path, _, _ in app.requests]
    assert paths == ["push-messages", "push-object", "confirm-message-received"]
    _, headers, body = app.requests[-1]
    assert headers[b"flwr-signature"] == b"s"
    assert ConfirmMessageReceivedRequest.FromString(body) == ConfirmMessageReceivedRequest(
        node=Node(node_id=7), run_id=8, message_object_id="r"
    )
    assert gateway.cut_off == {"good"}


def test_a_board_whose_reply_is_cut_off_before_it_has_begun_is_signed_off(upstream: tuple[Upstream, str]) -> None:
    """SuperLink knows of no reply, so the round would wait for one."""
    app, url = upstream
    (answer,) = post(opened(url), ("/v1/fleet/push-messages", begin(7, 8, "r" * 1000)))
    assert answer.status_code == 413
    ((path, _, body),) = app.requests
    assert path == "/v1/fleet/deactivate-node"
    assert DeactivateNodeRequest.FromString(body).node_id == 7
    (answer,) = post(opened(url), ("/v1/fleet/push-messages", b"\xff" * 1001))  # no request of a SuperNode
    assert answer.status_code == 413
    assert len(app.requests) == 1


def test_a_board_that_asks_too_often_is_slowed_down_then_refused(
    upstream: tuple[Upstream, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = upstream
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    gateway = Gateway(url, Limits(1, 1000, clock=lambda: 0.0), frozenset({"good", "calm"}), None)
    gateway.open = True
    monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=sleep, timeout=asyncio.timeout))
    answers = post(gateway, *[("/v1/fleet/pull-messages", b"")] * 31)
    assert [one.status_code for one in answers] == [201] * 30 + [503]
    assert [seconds for seconds in waited if seconds] == [float(number) for number in range(1, 11)]
    assert post(gateway, ("/v1/fleet/pull-messages", b""), key="calm")[0].status_code == 201


def test_a_request_that_does_not_arrive_is_given_up(
    upstream: tuple[Upstream, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, url = upstream
    monkeypatch.setattr(module, "BODY_SECONDS", 0.01)

    async def receive() -> module.MutableMapping[str, object]:
        await asyncio.Event().wait()
        raise AssertionError("nothing comes")

    assert status_of(url, receive) == 408
    assert app.requests == []


def test_half_a_request_is_not_passed_on(upstream: tuple[Upstream, str]) -> None:
    app, url = upstream
    pieces = iter([{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> module.MutableMapping[str, object]:
        return next(pieces)

    assert status_of(url, receive) == 400
    assert app.requests == []


def test_without_superlink_boards_are_asked_to_try_again() -> None:
    (answer,) = post(opened(f"http://127.0.0.1:{free_port()}"), ("/v1/fleet/pull-messages", b""))
    assert (answer.status_code, answer.text) == (503, "SuperLink does not answer (ConnectError)")

"""A board's side of Flower's fleet protocol: join, ask, answer, leave.

Flower's own connection (`flwr.supernode.fleet_http_connection`) joins as a new node at each start, which a server
refuses for a minute after a kill, and a message that was under way is lost. This one speaks the same requests and
keeps a journal (`client/board/journal.py`), so that a restarted node goes on as the node that was killed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Lock
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.board.config import BoardConfig
from client.board.journal import Journal, Parcel, Unfinished
from client.board.setup import private_key

ABSENCE_SECONDS = 10.0
"""How long a node stays away where a message may have been lost on its way to it: long enough for the server to see
that it is offline, and to ask again. It looks several times a second while it waits for replies."""

_PASSING = (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT)


class Refused(Exception):
    """The server refuses this node; the text is its reason."""


class Forgotten(Exception):
    """The server does not know this node any longer."""


def opened(parcel: Parcel) -> Message:
    """The message with its content. Raises ValueError where a part is missing or is not what it should be."""
    object_id = message_pb2.ObjectTree.FromString(parcel.tree).object_id
    try:
        message = inflate_object_from_contents(object_id, dict(parcel.objects))
    except KeyError as error:
        raise ValueError(f"the message came without its part {error}") from error
    if not isinstance(message, Message):
        raise ValueError(f"a message came as {type(message).__name__}")
    message.metadata.__dict__["_message_id"] = object_id  # the content is sent without it
    return message


def envelope(parcel: Parcel) -> Message:
    """The message without its content, which is enough to answer with an error."""
    return message_from_proto(message_pb2.Message.FromString(parcel.header))


def closed(reply: Message) -> Parcel:
    """The form in which a reply is sent."""
    reply.metadata.__dict__["_message_id"] = reply.object_id
    with no_object_id_recompute():
        tree = get_object_tree(reply)
        objects = {object_id: part.deflate() for object_id, part in get_all_nested_objects(reply).items()}
    bare = remove_content_from_message(reply) if reply.has_content() else reply
    return Parcel(message_to_proto(bare).SerializeToString(), tree.SerializeToString(), objects)


class Link:
    """A node that has joined. Its methods raise what the network raises, and flwr's RunNotRunningException."""

    def __init__(self, client: FleetHttpClient, node_id: int, journal: Journal) -> None:
        self.node_id, self._journal = node_id, journal
        self._client, self._node = client, Node(node_id=node_id)
        self._retry = make_simple_http_retry_invoker()
        self._away, self._forgotten, self._beating = Event(), Event(), Lock()
        self._heartbeats = HeartbeatSender(self._heartbeat)

    def unfinished(self) -> Unfinished:
        """What a killed predecessor left.

        Where a message may have been on its way to it, the server is made to notice that it is lost.
        """
        found = self._journal.unfinished()
        if found.message is None and self._journal.may_have_lost:
            self._stay_away()
        return found

    def receive(self) -> Parcel | None:
        """The next message, or None. Raises Forgotten.

        An answer that gets lost on a bad line may have been a message, which the server would then wait for: the node
        goes offline for a moment, so that the server notices.
        """
        if self._forgotten.is_set():
            raise Forgotten
        try:
            with self._journal.asking():
                return self._take()
        except httpx.ConnectError:  # the question did not arrive, so nothing is lost
            self._journal.nothing_lost()
            time.sleep(1)
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code not in _PASSING:
                raise
            self._stay_away()
        return None

    def _take(self) -> Parcel | None:
        response = self._client.PullMessages(fleet_pb2.PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        header, tree = response.messages_list[0], response.message_object_trees[0]
        run_id, objects = header.metadata.run_id, {}
        pull = make_pull_object_fn_protobuf(self._retried(self._client.PullObject), self._node, run_id)
        with suppress(ObjectPullError):  # `opened` says what is missing, to the server
            objects = pull_objects([part.object_id for part in iterate_object_tree(tree)], pull)
        parcel = Parcel(header.SerializeToString(), tree.SerializeToString(), objects)
        self._journal.received(parcel)
        self._retry.invoke(
            self._client.ConfirmMessageReceived,
            message_pb2.ConfirmMessageReceivedRequest(
                node=self._node, run_id=run_id, message_object_id=tree.object_id
            ),
        )  # fmt: skip
        return parcel

    def send(self, reply: Parcel, seconds: float = 0.0) -> None:
        """`seconds`: how long the board worked on it."""
        self._journal.replied(reply)
        header = message_pb2.Message.FromString(reply.header)
        response = self._retry.invoke(
            self._client.PushMessages,
            fleet_pb2.PushMessagesRequest(
                node=self._node, messages_list=[header],
                message_object_trees=[message_pb2.ObjectTree.FromString(reply.tree)],
                clientapp_runtime_list=[seconds],
            ),
        )  # fmt: skip
        self._journal.announced(response.session_id)
        wanted = set(response.objects_to_push)
        push = self._push(reply, response.session_id)
        push_object_contents_from_iterable(((key, data) for key, data in reply.objects.items() if key in wanted), push)

    def send_rest(self, reply: Parcel, session: str) -> None:
        """Sends what is missing of a reply that a killed node sent in part.

        The server's run waits for it and does nothing else, and a reply that it has begun to read cannot be announced
        again.
        """
        push = self._push(reply, session)
        for key, data in reply.objects.items():
            with suppress(ObjectPushError):  # it is there already
                push(key, data)

    def _push(self, reply: Parcel, session: str) -> Callable[[str, bytes], None]:
        run_id = message_pb2.Message.FromString(reply.header).metadata.run_id
        return make_push_object_fn_protobuf(self._retried(self._client.PushObject), self._node, run_id, session)

    def done(self) -> None:
        """The message is answered, or its run has ended."""
        self._journal.finished()

    @contextmanager
    def kept_alive(self) -> Iterator[None]:
        """Inside, heartbeats tell the server that the node is there; at the end it leaves."""
        self._heartbeats.start()
        try:
            yield
        finally:
            self._heartbeats.stop()
            with suppress(httpx.HTTPError, RuntimeError):
                self._client.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=self.node_id))
                self._journal.left()

    def _stay_away(self) -> None:
        with self._beating:  # a heartbeat that is on its way would make the node online again
            self._away.set()
        leave = fleet_pb2.DeactivateNodeRequest(node_id=self.node_id)
        for seconds in (2.0, ABSENCE_SECONDS):  # twice: one that was given up may arrive late
            with suppress(httpx.HTTPStatusError):  # it is offline already
                self._retry.invoke(self._client.DeactivateNode, leave)
            time.sleep(seconds)
        self._journal.nothing_lost()
        self._away.clear()
        self._heartbeat()

    def _retried(self, request: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda message: self._retry.invoke(request, message)

    def _heartbeat(self) -> bool:
        """False where it should be sent again soon."""
        with self._beating:
            if self._away.is_set() or self._forgotten.is_set():
                return True
            try:
                known = alive(self._client, self._node)
            except httpx.HTTPError:
                return False
            if not known:
                self._forgotten.set()
            return True


def alive(client: FleetHttpClient, node: Node) -> bool:
    """Sends a heartbeat; whether the server knows the node. Raises httpx.HTTPError where that cannot be said now."""
    try:
        return client.SendNodeHeartbeat(
            heartbeat_pb2.SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        ).success
    except httpx.HTTPStatusError as error:
        if error.response.status_code in _PASSING:
            raise
        return False


@contextmanager
def joined(config: BoardConfig, folder: Path) -> Iterator[Link]:
    """Joins the fleet, as the node whose journal in `folder` shows that it was killed, or as a new one; at the end the
    node leaves.

    Raises Refused, httpx.HTTPError, and RequestError for a key that cannot be read.
    """
    journal = Journal(folder, f"{config.server} {config.key}")
    keys = _keys(config, journal)
    client = FleetHttpClient.from_server_address(
        config.server, config.insecure, config.certificate or None,
        [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(*keys)],
    )  # fmt: skip
    with client:
        node_id = journal.node_id
        if node_id is None or not alive(client, Node(node_id=node_id)):
            node_id = _new_node(client, public_key_to_bytes(keys[1]), register=not config.key)
            journal.joined(node_id)
        try:
            link = Link(client, node_id, journal)
            with link.kept_alive():
                yield link
        finally:
            if not config.key:
                with suppress(httpx.HTTPError, RuntimeError):
                    client.UnregisterNode(fleet_pb2.UnregisterNodeFleetRequest(node_id=node_id))


def _keys(config: BoardConfig, journal: Journal) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]:
    """The board's own key, or one for this node alone where the server asks for none."""
    if config.key:
        private = private_key(Path(config.key))
        return private, private.public_key()
    file = journal.folder / "node.key"
    if journal.node_id is not None and file.exists():
        private = private_key(file)
        return private, private.public_key()
    private, public = generate_key_pairs()
    text = private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    journal.left()
    with suppress(OSError):
        file.unlink(missing_ok=True)
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:  # noqa: PTH123
            out.write(text)
    return private, public


def _new_node(client: FleetHttpClient, public_key: bytes, *, register: bool) -> int:
    retry = make_simple_http_retry_invoker()
    try:
        if register:
            retry.invoke(client.RegisterNode, fleet_pb2.RegisterNodeFleetRequest(public_key=public_key))
        request = fleet_pb2.ActivateNodeRequest(public_key=public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        return int(retry.invoke(client.ActivateNode, request).node_id)
    except httpx.HTTPStatusError as error:
        said = FlowerError.from_json(error.response.text)
        raise Refused(f"{said.message} {said.public_details or ''}".strip() if said else str(error)) from error

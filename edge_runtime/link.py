"""MQTT 5 or 3.1.1 that comes back by itself, with a bounded inbox.

One thread owns the socket; it only moves events into the inbox, and the owner's loop takes them out with `Link.poll`.
Each connection gets a client of its own, because paho's session lives in memory only and, on a reconnect, marks
everything it ever queued for sending regardless of its in-flight limit (eclipse-paho/paho.mqtt.python#492): what must
survive is the outbox's business. Nothing is given an expiry: windows must not be lost to one, and retained releases
are valid until they are replaced.
"""

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from edge_runtime.contract.errors import BudgetExceeded, LinkError
from edge_runtime.contract.topics import PROTOCOLS, Delivery
from edge_runtime.mqtt.broker import Broker
from edge_runtime.mqtt.client import MAX_IN_FLIGHT, Client
from edge_runtime.mqtt.inbox import Inbox
from edge_runtime.mqtt.packets import MAX_PACKET_BYTES, PUBLISH_OVERHEAD_BYTES, Message

MAX_INBOX_BYTES: Final = 4 << 20
STABLE_SECONDS: Final = 10.0
"""A connection that lasted this long starts the backoff anew; a shorter one counts as a failed attempt."""
STOP_POLL_SECONDS: Final = 0.1
DRAIN_SECONDS: Final = 2.0
MAX_REASON_LENGTH: Final = 300
_UNSUPPORTED_VERSION: Final = 0x84

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to publish."""

    topic: str
    payload: bytes = field(repr=False)
    delivery: Delivery


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted us, and every subscription was sent again. Retained state that matters must be published."""

    session_present: bool


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection ended, or an attempt failed. No token from before will be delivered: publish again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Received:
    """A message arrived; ``token`` is for `Link.acknowledge`, 0 when the quality of service is 0."""

    topic: str
    payload: bytes = field(repr=False)
    retained: bool
    token: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """The broker has answered a publish (QoS 0: it was written). That says nothing of its disk.

    ``refusal`` is why it will not pass the message on, empty when it will; under MQTT 3.1.1 a broker cannot say so.
    """

    token: int
    refusal: str = ""


LinkEvent = Connected | Disconnected | Received | Delivered


class Link:
    """A connection to a broker that comes back by itself.

    `poll` is the owner's only way in. Messages received beyond ``inbox_size`` or `MAX_INBOX_BYTES` stay in the socket
    (TCP holds the broker back); an owner that does not poll for longer than the keepalive loses the connection. A
    message larger than `MAX_PACKET_BYTES` or with a topic that is no text is dropped with a warning, and acknowledged
    lest it come again. Every method may be called from any thread, except `start` and `stop`, which are the owner's.

    ``delay`` gives the seconds to wait before a new attempt, from the number of failed ones before it. With
    ``manual_ack`` a message of QoS 1 comes again, after a reconnect of a persistent session, unless `acknowledge` was
    called for it; without, it is acknowledged when it enters the inbox.

    Without ``clean_session`` the broker keeps subscriptions and messages while we are away, `SESSION_SECONDS` at most.

    A broker of MQTT 5 has at most ``receive_maximum`` messages on the way to us that we have not acknowledged; one of
    3.1.1 as many as its own configuration says.

    TLS files are read for every connection, so that renewed ones need no new link. Files that cannot be used end an
    attempt; with ``needs_tls_files`` those that cannot be used now are an error here, for owners who would not wait.

    Raises:
        LinkError: a certificate or key cannot be read, or there is no such protocol.
    """

    def __init__(  # noqa: PLR0913 (independent choices, all by name)
        self,
        broker: Broker,
        *,
        client_id: str,
        delay: Callable[[int], float],
        clean_session: bool = True,
        will: Outgoing | None = None,
        inbox_size: int = 1024,
        manual_ack: bool = False,
        needs_tls_files: bool = True,
        receive_maximum: int = MAX_IN_FLIGHT,
    ) -> None:
        if broker.protocol not in PROTOCOLS:
            raise LinkError(f"no protocol {broker.protocol!r}: use one of {', '.join(PROTOCOLS)}")
        self._broker = broker
        self._client_id = client_id
        self._delay = delay
        self._clean_session = clean_session
        self._will = will
        self._manual_ack = manual_ack
        self._receive_maximum = receive_maximum
        if needs_tls_files:
            _tls_context(broker)
        self._inbox: Inbox[LinkEvent] = Inbox(inbox_size, MAX_INBOX_BYTES)
        self._mqtt5 = broker.protocol != "3.1.1"
        self._version_known = broker.protocol != "auto"
        self._at_once = False
        self._stopping = threading.Event()
        self._stop_deadline = 0.0
        self._thread = threading.Thread(target=self._run, name=f"link-{client_id}", daemon=True)
        # Guards what follows. Callbacks that paho makes under its own mutexes must not take it (see `_on_publish`).
        self._lock = threading.Lock()
        self._client: Client | None = None
        self._connected = False
        self._epoch = 0
        self._subscriptions: dict[str, int] = {}
        self._asked: dict[int, str] = {}
        self._refusal = ""

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and the connection is not known to be lost."""
        return self._connected

    def start(self) -> None:
        """Begins to connect, in a thread of its own; the outcome comes as an event."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Waits until what was published is acknowledged, says goodbye (no last will) and ends the thread.

        What `acknowledge` was called for before has reached the broker then. Gives up after ``timeout`` seconds; a
        thread that is just opening a socket ends by itself, seconds later. Events already in the inbox can still be
        polled.
        """
        self._stop_deadline = deadline = time.monotonic() + timeout
        self._inbox.close()
        while (
            self._connected
            and (client := self._client) is not None
            and not client.is_settled
            and time.monotonic() < deadline
        ):
            client.wait_settled(STOP_POLL_SECONDS)
        self._stopping.set()
        with self._lock:
            client = self._client
            if client is not None:
                client.disconnect()
        if self._thread.ident is None:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()) + STOP_POLL_SECONDS)
        if self._thread.is_alive() and client is not None:
            log.warning("link_stop_forced client=%s timeout_seconds=%s", self._client_id, timeout)
            wire = client.socket()
            if isinstance(wire, socket.socket):
                _shut(wire)
            self._thread.join(1.0)

    def subscribe(self, topic: str, qos: int = 1) -> None:
        """Subscribes now if connected, and at every connection to come. A refusal by the broker is logged.

        Raises:
            ValueError: ``qos`` is neither 0 nor 1.
        """
        _check_qos(qos)
        with self._lock:
            self._subscriptions[topic] = qos
            if self._connected and self._client is not None:
                self._ask(self._client, topic, qos)

    def unsubscribe(self, topic: str) -> None:
        """Ends a subscription, also for connections to come."""
        with self._lock:
            self._subscriptions.pop(topic, None)
            if self._connected and self._client is not None:
                self._client.unsubscribe(topic)

    def publish(self, message: Outgoing) -> int:
        """Hands a message to the connection; its token comes back as `Delivered`, unless the connection is lost before.

        Raises:
            LinkError: there is no connection, or too many publishes are unacknowledged or unwritten.
            BudgetExceeded: the message is larger than `MAX_PACKET_BYTES` allow, or than this broker takes.
            ValueError: the quality of service is neither 0 nor 1, or the topic holds a wildcard.
        """
        _check_qos(message.delivery.qos)
        if len(message.payload) + len(message.topic.encode()) > MAX_PACKET_BYTES - PUBLISH_OVERHEAD_BYTES:
            raise BudgetExceeded(
                f"message of {len(message.payload)} bytes for {message.topic} does not fit into a packet of "
                f"{MAX_PACKET_BYTES} bytes"
            )
        with self._lock:
            if not self._connected or self._client is None:
                raise LinkError(
                    f"not connected to {self._broker.host}:{self._broker.port}; wait for Connected"
                )
            mid = self._client.send(message.topic, message.payload, message.delivery)
            return _token(self._epoch, mid)

    def acknowledge(self, received: Received) -> None:
        """Tells the broker that a message is safe; does nothing for one of an earlier connection: it comes again."""
        epoch, mid = divmod(received.token, _MIDS)
        with self._lock:
            if received.token and epoch == self._epoch and self._client is not None:
                self._client.ack(mid, 1)

    def publish_all(self, messages: Sequence[tuple[str, bytes]]) -> int:
        """Hands over messages (topic, payload) of QoS 0 that are not retained; returns how many, from the first.

        Fewer than all when there is no connection, too much waits to be written, or the broker takes none so large.
        No `Delivered` comes for them.
        """
        with self._lock:
            if not self._connected or self._client is None:
                return 0
            return self._client.send_all(messages)

    def acknowledge_all(self, received: Sequence[Received]) -> None:
        """`acknowledge` of many."""
        with self._lock:
            if self._client is None:
                return
            mids = [
                message.token % _MIDS
                for message in received
                if message.token and message.token // _MIDS == self._epoch
            ]
            self._client.ack_all(mids)

    def poll_many(self, limit: int, timeout_seconds: float) -> list[LinkEvent]:
        """The oldest events, up to ``limit``; none after ``timeout_seconds`` without one, or when `wake` was called."""
        return self._inbox.get_many(limit, timeout_seconds)

    def poll(self, timeout_seconds: float) -> LinkEvent | None:
        """The oldest event; None after ``timeout_seconds`` without one, or when `wake` was called."""
        return self._inbox.get(timeout_seconds)

    def wake(self) -> None:
        """Makes a `poll` that waits, or else the next one that would wait, return None at once."""
        self._inbox.wake()

    # ── the link's thread ──────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        attempt = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            reason = self._connect_and_serve()
            with self._lock:
                reason, self._refusal = (self._refusal or reason)[:MAX_REASON_LENGTH], ""
            if self._stopping.is_set():
                return
            log.info("link_lost client=%s reason=%s", self._client_id, reason)
            if self._at_once:
                self._at_once = False
                continue
            self._inbox.put(Disconnected(reason))
            attempt = 0 if time.monotonic() - started >= STABLE_SECONDS else attempt + 1
            self._stopping.wait(self._delay(attempt))

    def _connect_and_serve(self) -> str:
        """One connection from its first packet to its end; returns why it ended."""
        try:
            tls = _tls_context(self._broker)
        except LinkError as e:
            return str(e)
        with self._lock:
            self._epoch += 1
            self._asked.clear()
            client = self._make_client(self._epoch, tls)
        try:
            client.open(self._broker.host, self._broker.port, self._broker.keepalive_seconds)
            with self._lock:
                self._client = client
                if self._stopping.is_set():  # `stop` came between and found no client to disconnect
                    client.disconnect()
            return client.serve()
        except LinkError as e:
            return str(e)
        except (OSError, ValueError) as e:
            return f"cannot connect to {self._broker.host}:{self._broker.port}: {e}"
        except Exception as e:  # whatever a hostile broker's bytes do inside paho, the link comes back
            log.exception("link_broken client=%s", self._client_id)
            return f"{type(e).__name__}: {e}"
        finally:
            with self._lock:
                self._client = None
                self._connected = False
                client.close()  # after this no other thread can queue to it
            if client.is_reached and not client.is_answered and not self._version_known:
                self._mqtt5 = not self._mqtt5  # some brokers say nothing to a version they do not know

    def _make_client(self, epoch: int, tls: ssl.SSLContext | None) -> Client:
        client = Client(
            self._client_id,
            mqtt5=self._mqtt5,
            clean_session=self._clean_session,
            receive_maximum=self._receive_maximum,
            take=lambda client, message: self._on_message(client, epoch, message),
        )
        client.enable_logger(log.getChild("paho"))
        if tls is not None:
            client.tls_set_context(tls)
        if self._broker.username:
            client.username_pw_set(self._broker.username, self._broker.password or None)
        if self._will is not None:
            will = self._will
            client.will_set(will.topic, will.payload, qos=will.delivery.qos, retain=will.delivery.retain)
        client.on_socket_close = self._on_socket_close
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_publish = lambda _client, _data, mid, reason, _properties: self._on_publish(
            epoch, mid, reason
        )
        return client

    def _on_connect(self, client: Any, _: object, flags: Any, reason: Any, properties: Any) -> None:
        client.is_answered = True
        with self._lock:
            if reason.is_failure:
                self._refusal = f"the broker refused the connection: {reason}"
                if reason.value == _UNSUPPORTED_VERSION and self._mqtt5 and self._broker.protocol == "auto":
                    self._mqtt5, self._version_known, self._at_once = False, True, True
                return
            client.obey(properties, self._broker.keepalive_seconds)
            log.info("link_up client=%s mqtt=%s", self._client_id, "5" if self._mqtt5 else "3.1.1")
            self._version_known = self._connected = True
            self._inbox.put(Connected(bool(flags.session_present)))
            for topic, qos in self._subscriptions.items():
                self._ask(client, topic, qos)

    def _on_disconnect(self, _: object, __: object, flags: Any, reason: Any, properties: Any) -> None:
        if flags.is_disconnect_packet_from_server:
            words = getattr(properties, "ReasonString", "")
            with self._lock:
                self._refusal = f"the broker ended the connection: {reason}{words and f' ({words})'}"

    def _ask(self, client: Client, topic: str, qos: int) -> None:
        _, mid = client.subscribe(topic, qos)
        if mid is not None:
            self._asked[mid] = topic

    def _on_subscribe(self, _: object, __: object, mid: int, reasons: list[Any], ___: object) -> None:
        with self._lock:
            topic = self._asked.pop(mid, "")
        if topic and any(reason.is_failure for reason in reasons):
            log.error("subscription_refused client=%s topic=%s", self._client_id, topic)

    def _on_message(self, client: Client, epoch: int, message: Message) -> None:
        token = _token(epoch, message.mid) if message.mid else 0
        taken = True
        if message.topic is None:
            log.warning("topic_not_text client=%s", self._client_id)
        else:
            received = Received(message.topic, message.payload, message.retained, token)
            taken = self._inbox.put_bounded(received, len(message.topic) + len(message.payload))
        if message.mid and taken and (message.topic is None or not self._manual_ack):
            client.ack(message.mid, 1)

    def _on_publish(self, epoch: int, mid: int, reason: Any) -> None:
        # paho calls this under its out-message mutex, which `publish` takes too: neither block here nor take our lock.
        refusal = str(reason) if reason.is_failure else ""
        if refusal:
            log.warning("publish_refused client=%s reason=%s", self._client_id, refusal)
        self._inbox.put(Delivered(_token(epoch, mid), refusal))

    def _on_socket_close(self, _: object, __: object, wire: Any) -> None:
        """Lets the broker close first when we stop.

        A socket closed with anything unread is reset, and the broker then forgets what it had received and not yet
        read: acknowledgements, and the goodbye.
        """
        if not self._stopping.is_set() or not self._connected:
            return
        deadline = min(self._stop_deadline, time.monotonic() + DRAIN_SECONDS)
        try:
            wire.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                wire.settimeout(left)
                if not wire.recv(64 << 10):
                    return
        except OSError as e:
            log.debug("link_drain client=%s reason=%s", self._client_id, e)


_MIDS: Final = 1 << 16


def _token(epoch: int, mid: int) -> int:
    """A number that names a message over all connections of a link; never 0."""
    return epoch * _MIDS + mid


def _tls_context(broker: Broker) -> ssl.SSLContext | None:
    if not broker.ca:
        if broker.certificate or broker.key:
            raise LinkError("a client certificate without a ca: give the broker's certificate authority too")
        return None
    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=broker.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if broker.certificate:
            context.load_cert_chain(broker.certificate, broker.key or None)
    except (OSError, ValueError) as e:
        files = ", ".join(name for name in (broker.ca, broker.certificate, broker.key) if name)
        raise LinkError(f"cannot use the TLS files {files}: {e}") from e
    return context


def _check_qos(qos: int) -> None:
    if qos not in (0, 1):
        raise ValueError(f"quality of service {qos}: a link speaks 0 and 1")


def _shut(wire: socket.socket) -> None:
    try:
        wire.shutdown(socket.SHUT_RDWR)
    except OSError as e:
        log.debug("link_shutdown reason=%s", e)  # the other side was quicker

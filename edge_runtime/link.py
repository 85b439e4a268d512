"""MQTT 3.1.1 with a bounded inbox. The only paho import.

One thread owns the socket; it only moves events into the inbox, and the owner's loop takes them out with `Link.poll`.
Each connection gets a paho client of its own, because paho's session lives in memory only and, on a reconnect, marks
everything it ever queued for sending regardless of its in-flight limit (eclipse-paho/paho.mqtt.python#492): what must
survive is the outbox's business.
"""

import logging
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from edge_runtime.contract.codec import MAX_MESSAGE_BYTES
from edge_runtime.contract.errors import BudgetExceeded, LinkError
from edge_runtime.contract.topics import Delivery

MAX_PACKET_BYTES: Final = MAX_MESSAGE_BYTES + (64 << 10)
"""The largest packet read or sent: the largest message, and the longest topic. paho alone would read 256 MB."""
MAX_IN_FLIGHT: Final = 20
MAX_OUTSTANDING: Final = 1000
"""Publishes that the broker has not acknowledged; beyond that `Link.publish` refuses."""
STABLE_SECONDS: Final = 10.0
"""A connection that lasted this long starts the backoff anew; a shorter one counts as a failed attempt."""
LOOP_SECONDS: Final = 5.0
STOP_POLL_SECONDS: Final = 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """Where the broker is and who we are to it; ``ca``, ``certificate`` and ``key`` are paths of PEM files.

    TLS (1.2 or newer, host name checked) is spoken when ``ca`` is given, with a client certificate when that is given.
    """

    host: str
    port: int = 1883
    username: str = ""
    password: str = field(default="", repr=False)
    ca: str = ""
    certificate: str = ""
    key: str = ""
    keepalive_seconds: int = 30


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
    """The broker has acknowledged a publish (QoS 0: it was written). That says nothing of its disk."""

    token: int


LinkEvent = Connected | Disconnected | Received | Delivered


class Link:
    """A connection to a broker that comes back by itself.

    `poll` is the owner's only way in. Messages received beyond ``inbox_size`` stay in the socket (TCP holds the broker
    back) and nothing is dropped; an owner that does not poll for longer than the keepalive loses the connection. Every
    method may be called from any thread, except `start` and `stop`, which are the owner's.

    ``delay`` gives the seconds to wait before a new attempt, from the number of failed ones before it. With
    ``manual_ack`` a message of QoS 1 comes again, after a reconnect of a persistent session, unless `acknowledge` was
    called for it; without, it is acknowledged when it enters the inbox.

    Raises:
        LinkError: a certificate or key cannot be read.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        client_id: str,
        delay: Callable[[int], float],
        clean_session: bool = True,
        will: Outgoing | None = None,
        inbox_size: int = 1024,
        manual_ack: bool = False,
    ) -> None:
        self._broker = broker
        self._client_id = client_id
        self._delay = delay
        self._clean_session = clean_session
        self._will = will
        self._manual_ack = manual_ack
        self._tls = _tls_context(broker)
        self._inbox = _Inbox(inbox_size)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"link-{client_id}", daemon=True)
        # Guards what follows. Callbacks that paho makes under its own mutexes must not take it (see `_on_publish`).
        self._lock = threading.Lock()
        self._client: mqtt.Client | None = None
        self._connected = False
        self._epoch = 0
        self._subscriptions: dict[str, int] = {}
        self._asked: dict[int, str] = {}
        self._refusal = ""
        self._last: mqtt.MQTTMessageInfo | None = None

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted us and the connection is not known to be lost."""
        return self._connected

    def start(self) -> None:
        """Begins to connect, in a thread of its own; the outcome comes as an event."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Waits until what was published is acknowledged, says goodbye (no last will) and ends the thread.

        Gives up after ``timeout`` seconds. Events already in the inbox can still be polled.
        """
        deadline = time.monotonic() + timeout
        self._inbox.close()
        # A socket that is closed with acknowledgements unread is reset, and the broker then drops what it had not read.
        while (
            (last := self._last)
            and self._connected
            and not last.is_published()
            and time.monotonic() < deadline
        ):
            last.wait_for_publish(STOP_POLL_SECONDS)
        self._stopping.set()
        with self._lock:
            client = self._client
            if client is not None:
                client.disconnect()
        if self._thread.ident is None:
            return
        self._thread.join(max(STOP_POLL_SECONDS, deadline - time.monotonic()))
        if self._thread.is_alive() and client is not None:
            log.warning("link_stop_forced client=%s timeout_seconds=%s", self._client_id, timeout)
            wire = client.socket()
            if isinstance(wire, socket.socket):
                _shut(wire)
            self._thread.join(1.0)

    def subscribe(self, topic: str, qos: int = 1) -> None:
        """Subscribes now if connected, and at every connection to come. A refusal by the broker is logged."""
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
            LinkError: there is no connection, or `MAX_OUTSTANDING` publishes are unacknowledged.
            BudgetExceeded: the message is larger than `MAX_PACKET_BYTES` allow.
        """
        if len(message.payload) + len(message.topic) > MAX_PACKET_BYTES:
            raise BudgetExceeded(
                f"message of {len(message.payload)} bytes for {message.topic} does not fit into a packet of "
                f"{MAX_PACKET_BYTES} bytes"
            )
        with self._lock:
            if not self._connected or self._client is None:
                raise LinkError(
                    f"not connected to {self._broker.host}:{self._broker.port}; wait for Connected"
                )
            info = self._client.publish(
                message.topic, message.payload, qos=message.delivery.qos, retain=message.delivery.retain
            )
            if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
                raise LinkError(
                    f"{MAX_OUTSTANDING} messages await the broker's acknowledgement; wait for Delivered"
                )
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                raise LinkError(f"cannot publish to {message.topic}: {mqtt.error_string(info.rc)}")
            self._last = info
            return _token(self._epoch, info.mid)

    def acknowledge(self, received: Received) -> None:
        """Tells the broker that a message is safe; does nothing for one of an earlier connection: it comes again."""
        epoch, mid = divmod(received.token, _MIDS)
        with self._lock:
            if received.token and epoch == self._epoch and self._client is not None:
                self._client.ack(mid, 1)

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
                self._client = None
                self._connected = False
                reason, self._refusal = self._refusal or reason, ""
            if self._stopping.is_set():
                return
            log.info("link_lost client=%s reason=%s", self._client_id, reason)
            self._inbox.put(Disconnected(reason))
            attempt = 0 if time.monotonic() - started >= STABLE_SECONDS else attempt + 1
            self._stopping.wait(self._delay(attempt))

    def _connect_and_serve(self) -> str:
        """One connection from its first packet to its end; returns why it ended."""
        with self._lock:
            self._epoch += 1
            self._asked.clear()
            client = self._make_client(self._epoch)
        try:
            client.connect(self._broker.host, self._broker.port, self._broker.keepalive_seconds)
            with self._lock:
                self._client = client
                if self._stopping.is_set():  # `stop` came between and found no client to disconnect
                    client.disconnect()
            timeout = min(LOOP_SECONDS, self._broker.keepalive_seconds / 4)
            code = MQTTErrorCode.MQTT_ERR_SUCCESS
            while code == MQTTErrorCode.MQTT_ERR_SUCCESS and client.socket() is not None:
                code = client.loop(timeout)
        except (OSError, ValueError) as e:
            return f"cannot connect to {self._broker.host}:{self._broker.port}: {e}"
        except Exception as e:  # whatever a hostile broker's bytes do inside paho, the link comes back
            log.exception("link_broken client=%s", self._client_id)
            return f"{type(e).__name__}: {e}"
        finally:
            wire = client.socket()
            if isinstance(wire, socket.socket):
                wire.close()
        return mqtt.error_string(code)

    def _make_client(self, epoch: int) -> mqtt.Client:
        client = _Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=self._clean_session,
            protocol=mqtt.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=self._manual_ack,
        )
        client.suppress_exceptions = True
        client.enable_logger(log.getChild("paho"))
        client.max_inflight_messages_set(MAX_IN_FLIGHT)
        client.max_queued_messages_set(MAX_OUTSTANDING)
        if self._tls is not None:
            client.tls_set_context(self._tls)
        if self._broker.username:
            client.username_pw_set(self._broker.username, self._broker.password or None)
        if self._will is not None:
            will = self._will
            client.will_set(will.topic, will.payload, qos=will.delivery.qos, retain=will.delivery.retain)
        client.on_socket_open = _set_nodelay
        # With this set, publishing only queues and wakes the link's thread, which alone writes to the socket.
        client.on_socket_register_write = _wait_for_loop
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = lambda _client, _data, message: self._on_message(epoch, message)
        client.on_publish = lambda _client, _data, mid, _reason, _properties: self._on_publish(epoch, mid)
        client.on_oversize = self._on_oversize
        return client

    def _on_connect(self, client: mqtt.Client, _: object, flags: Any, reason: Any, __: object) -> None:
        if reason.is_failure:
            with self._lock:
                self._refusal = f"the broker refused the connection: {reason}"
            return
        with self._lock:
            self._connected = True
            self._inbox.put(Connected(bool(flags.session_present)))
            for topic, qos in self._subscriptions.items():
                self._ask(client, topic, qos)

    def _ask(self, client: mqtt.Client, topic: str, qos: int) -> None:
        _, mid = client.subscribe(topic, qos)
        if mid is not None:
            self._asked[mid] = topic

    def _on_subscribe(self, _: object, __: object, mid: int, reasons: list[Any], ___: object) -> None:
        with self._lock:
            topic = self._asked.pop(mid, "")
        if any(reason.is_failure for reason in reasons):
            log.error("subscription_refused client=%s topic=%s", self._client_id, topic)

    def _on_message(self, epoch: int, message: mqtt.MQTTMessage) -> None:
        token = _token(epoch, message.mid) if message.qos else 0
        try:
            topic = message.topic
        except UnicodeDecodeError:
            log.warning("topic_not_utf8 client=%s", self._client_id)
            return
        self._inbox.put_bounded(Received(topic, bytes(message.payload), message.retain, token))

    def _on_publish(self, epoch: int, mid: int) -> None:
        # paho calls this under its out-message mutex, which `publish` takes too: neither block here nor take our lock.
        self._inbox.put(Delivered(_token(epoch, mid)))

    def _on_oversize(self, size: int) -> None:
        with self._lock:
            self._refusal = f"a packet of {size} bytes is larger than the {MAX_PACKET_BYTES} allowed"


_MIDS: Final = 1 << 16


def _token(epoch: int, mid: int) -> int:
    """A number that names a message over all connections of a link; never 0."""
    return epoch * _MIDS + mid


class _Client(mqtt.Client):
    """A paho client that refuses to read packets larger than `MAX_PACKET_BYTES`."""

    on_oversize: Callable[[int], None]

    def _sock_recv(self, bufsize: int) -> bytes:
        # paho asks for a packet's whole remainder at once, so the size is known before any memory is taken.
        if bufsize > MAX_PACKET_BYTES:
            self.on_oversize(bufsize)
            raise ConnectionError(f"packet of {bufsize} bytes refused")
        return super()._sock_recv(bufsize)


class _Inbox:
    """Events in the order they came. Only received messages count towards the bound and wait for room.

    The others are few: a connection's ends, and one delivery per outstanding publish.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._events: deque[LinkEvent] = deque()
        self._messages = 0
        self._closed = False
        self._woken = False
        self._changed = threading.Condition()

    def put(self, event: LinkEvent) -> None:
        """Appends without waiting."""
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def put_bounded(self, event: LinkEvent) -> None:
        """Appends when there is room; after `close` drops the event, which the broker keeps or we no longer want."""
        with self._changed:
            while self._messages >= self._size and not self._closed:
                self._changed.wait()
            if not self._closed:
                self._messages += 1
                self._events.append(event)
                self._changed.notify_all()

    def get(self, timeout_seconds: float) -> LinkEvent | None:
        """The oldest event, or None after the timeout or a `wake`."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while not self._events:
                left = deadline - time.monotonic()
                if self._woken or left <= 0:
                    self._woken = False
                    return None
                self._changed.wait(left)
            event = self._events.popleft()
            if isinstance(event, Received):
                self._messages -= 1
                self._changed.notify_all()
            return event

    def wake(self) -> None:
        """Ends a waiting `get`, or the next one that would wait."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        """Lets a waiting `put_bounded` go; later ones drop their event."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


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


def _set_nodelay(_: mqtt.Client, __: object, wire: Any) -> None:
    # Small packets wait 40 ms for the acknowledgement of the last one otherwise.
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _wait_for_loop(_: mqtt.Client, __: object, ___: Any) -> None:
    """Nothing to do: the link's thread looks at what is queued before it waits."""


def _shut(wire: socket.socket) -> None:
    try:
        wire.shutdown(socket.SHUT_RDWR)
    except OSError as e:
        log.debug("link_shutdown reason=%s", e)  # the other side was quicker

"""A paho client for one connection that trusts the broker with nothing. The only paho import.

paho parses whatever comes: packets of 256 MB, messages of QoS 2 without end, answers to nothing. This one takes what
`packets` allows, in bounded memory and time. What it overrides is private to paho: for each there is a test that fails
when a newer paho no longer calls it.
"""

import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

from edge_runtime.contract.errors import BudgetExceeded, LinkError
from edge_runtime.contract.topics import Delivery
from edge_runtime.mqtt import packets
from edge_runtime.mqtt.lean import sparing
from edge_runtime.mqtt.packets import MAX_PACKET_BYTES

# paho asks urllib.request for proxies where PySocks is installed; it brings http.client, email and tempfile: 1.4 MB.
with sparing("urllib.request", unless="socks"):
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

MAX_IN_FLIGHT: Final = 20
MAX_OUTSTANDING: Final = 1000
"""Publishes that the broker has not acknowledged; beyond that `Client.send` refuses."""
MAX_ANSWERS: Final = 3 * MAX_OUTSTANDING
"""Packets not yet written beyond which `Client.send_all` takes no more. A batch's PUBACKs stand before its answers."""
MAX_QUEUED: Final = 5 * MAX_OUTSTANDING
"""Packets not yet written; a broker that goes on sending while it reads nothing is left."""
SESSION_SECONDS: Final = 7 * 86400
"""How long a broker keeps a persistent session of MQTT 5; one of 3.1.1 has no end of its own."""
OPEN_SECONDS: Final = 5.0
"""For the socket, of each address, and again for the TLS handshake as a whole."""
CONNECT_SECONDS: Final = 10.0
"""From the open socket to CONNACK."""
PACKET_SECONDS: Final = 60.0
"""From a packet's first byte to its last. Pings do not bound that while we go on sending."""
LOOP_SECONDS: Final = 5.0
_CHUNK_BYTES: Final = 64 << 10
"""Read from the socket at once, and written to it at once where packets are small."""
_AT_ONCE: Final = 256
"""Packets handled before the socket is looked at again, for what waits to be written."""

log = logging.getLogger(__name__)


class Client(mqtt.Client):
    """One connection. ``take`` gets each message, in the thread of `serve`, and sees to its acknowledgement.

    Only that thread reads and writes the socket; `send`, `subscribe`, `ack` and `disconnect` queue, from any thread.
    """

    def __init__(
        self,
        client_id: str,
        *,
        mqtt5: bool,
        clean_session: bool,
        receive_maximum: int,
        take: Callable[["Client", packets.Message], None],
    ) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=None if mqtt5 else clean_session,
            protocol=mqtt.MQTTv5 if mqtt5 else mqtt.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        self.suppress_exceptions = True
        self.connect_timeout = OPEN_SECONDS
        self.max_inflight_messages_set(MAX_IN_FLIGHT)
        self.max_queued_messages_set(MAX_OUTSTANDING)
        # With this set, publishing only queues and wakes the link's thread, which alone writes to the socket.
        self.on_socket_register_write = _wait_for_loop
        self.is_reached = False
        self.is_answered = False
        self._max_packet_bytes = MAX_PACKET_BYTES
        self._mqtt5 = mqtt5
        self._keeps_session = not clean_session
        self._receive_maximum = receive_maximum
        self._take = take
        self._last: mqtt.MQTTMessageInfo | None = None
        self._answer_due = 0.0
        self._packet_due: float | None = None
        self._ahead = b""
        self._ahead_at = 0

    def open(self, host: str, port: int, keepalive_seconds: int) -> None:
        """Opens the socket and queues CONNECT.

        Raises:
            OSError: there is nobody, or no TLS with them.
        """
        if self._mqtt5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.ReceiveMaximum = self._receive_maximum
            properties.MaximumPacketSize = MAX_PACKET_BYTES
            if self._keeps_session:
                properties.SessionExpiryInterval = SESSION_SECONDS
            fresh = not self._keeps_session
            self.connect(host, port, keepalive_seconds, clean_start=fresh, properties=properties)
        else:
            self.connect(host, port, keepalive_seconds)
        self.is_reached = True
        self._answer_due = time.monotonic() + CONNECT_SECONDS
        wire: Any = self.socket()
        # Small packets wait 40 ms for the acknowledgement of the last one otherwise.
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        """Closes every socket. Nothing may be queued from then on."""
        wire = self.socket()
        if wire is not None:
            wire.close()
        self._reset_sockets(sockpair_only=True)

    def serve(self) -> str:
        """Reads and writes until the connection ends; returns why.

        Raises:
            LinkError: the broker broke a rule or a deadline.
        """
        code = MQTTErrorCode.MQTT_ERR_SUCCESS
        while code == MQTTErrorCode.MQTT_ERR_SUCCESS and self.socket() is not None:
            due = self._packet_due if self.is_answered else self._answer_due
            rest = min(LOOP_SECONDS, self._keepalive / 4)
            left = rest if due is None else due - time.monotonic()
            if left <= 0 and self.is_answered:
                raise LinkError(f"the broker did not end a packet within {PACKET_SECONDS:g} s")
            if left <= 0:
                raise LinkError(f"the broker did not answer CONNECT within {CONNECT_SECONDS:g} s")
            code = self.loop(0.0 if self._ahead else min(rest, left))
            for _ in range(_AT_ONCE):
                if code != MQTTErrorCode.MQTT_ERR_SUCCESS or not self._ahead or self.socket() is None:
                    break
                if not self._take_ahead():
                    code = self.loop_read()
        return mqtt.error_string(code)

    def obey(self, properties: Any, keepalive_seconds: int) -> None:
        """Takes over the limits in CONNACK (MQTT 5, section 3.2.2.3) where they are tighter than ours."""
        self._max_inflight_messages = min(MAX_IN_FLIGHT, getattr(properties, "ReceiveMaximum", MAX_IN_FLIGHT))
        self._max_packet_bytes = min(
            MAX_PACKET_BYTES, getattr(properties, "MaximumPacketSize", MAX_PACKET_BYTES)
        )
        self._keepalive = min(keepalive_seconds, self._keepalive or keepalive_seconds)

    def send(self, topic: str, payload: bytes, delivery: Delivery) -> int:
        """Queues a message and returns its id.

        Raises:
            LinkError: too much is queued.
            BudgetExceeded: the broker takes no packet of that size.
        """
        size_bytes = len(topic.encode()) + len(payload) + packets.PUBLISH_OVERHEAD_BYTES
        if size_bytes > self._max_packet_bytes:
            raise BudgetExceeded(
                f"the broker takes packets of at most {self._max_packet_bytes} bytes, and the message for {topic} has "
                f"{len(payload)}: raise the broker's maximum packet size"
            )
        if not delivery.qos and len(self._out_packet) >= MAX_OUTSTANDING:
            raise LinkError(f"{MAX_OUTSTANDING} packets are not yet written; wait for Delivered")
        info = self.publish(topic, payload, qos=delivery.qos, retain=delivery.retain)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            raise LinkError(
                f"{MAX_OUTSTANDING} messages await the broker's acknowledgement; wait for Delivered"
            )
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise LinkError(f"cannot publish to {topic}: {mqtt.error_string(info.rc)}")
        self._last = info
        return info.mid

    def send_all(self, messages: Sequence[tuple[str, bytes]]) -> int:
        """Queues messages of QoS 0 that are not retained, and returns how many of them, from the first, there was room
        for. Nobody is told when they are written.
        """
        room = max(0, MAX_ANSWERS - len(self._out_packet))
        found = []
        for topic, payload in messages[:room]:
            packet = packets.publish_packet(topic, payload, mqtt5=self._mqtt5)
            if len(packet) > self._max_packet_bytes:
                break
            found.append(packet)
        self._queue_all(found)
        return len(found)

    def ack_all(self, mids: Sequence[int]) -> None:
        """Queues the acknowledgements of messages that came."""
        self._queue_all([packets.puback_packet(mid) for mid in mids])

    def _queue_all(self, whole: Sequence[bytes]) -> None:
        """Queues packets after whose writing paho has nothing to do, and wakes the thread once.

        That is what it takes a PUBACK for, whatever the bytes are.
        """
        for packet in whole[:-1]:
            self._out_packet.append(_out(packet))
        if whole:
            self._packet_queue(packets.PUBACK, whole[-1], 0, 1)

    @property
    def is_settled(self) -> bool:
        """Whether the last message sent was acknowledged (QoS 0: written)."""
        return self._last is None or self._last.is_published()

    def wait_settled(self, timeout_seconds: float) -> None:
        """Returns when `is_settled`, or after the timeout."""
        if self._last is not None:
            self._last.wait_for_publish(timeout_seconds)

    # ── what paho calls ────────────────────────────────────────────────────────────────────────────────

    def _sock_recv(self, bufsize: int) -> bytes:
        packet = self._in_packet
        if packet["have_remaining"]:
            packets.check_size(packet["command"], packet["remaining_length"])
            if packet["remaining_length"] > MAX_PACKET_BYTES and not packet["packet"]:
                packet["packet"] = _Head()
        if not self._ahead:
            self._ahead = super()._sock_recv(_CHUNK_BYTES)
        at = self._ahead_at
        data = self._ahead[at : at + bufsize]
        self._ahead_at = at + len(data)
        if self._ahead_at == len(self._ahead):
            self._ahead, self._ahead_at = b"", 0
        if self._packet_due is None:
            self._packet_due = time.monotonic() + PACKET_SECONDS
        return data

    def _packet_write(self) -> MQTTErrorCode:
        """Joins what may be written at once: each small packet costs a system call and the interpreter's lock."""
        queue = self._out_packet
        joined: list[bytes | bytearray] = []
        size = 0
        while queue and size < _CHUNK_BYTES and queue[0]["command"] == packets.PUBACK and not queue[0]["pos"]:
            packet = queue.popleft()["packet"]
            joined.append(packet)
            size += len(packet)
        if joined:
            queue.appendleft(_out(b"".join(joined)))
        return super()._packet_write()

    def _packet_handle(self) -> MQTTErrorCode:
        self._packet_due = None
        self._check(self._in_packet["command"])
        return super()._packet_handle()

    def _handle_publish(self) -> MQTTErrorCode:
        first, body = self._in_packet["command"], self._in_packet["packet"]
        size_bytes = self._in_packet["remaining_length"]
        if size_bytes > MAX_PACKET_BYTES:
            topic, mid, _ = packets.read_head(first, body)
            log.warning("message_too_large topic=%r bytes=%d", topic, size_bytes)
        else:
            mid = self._hand_on(packets.read_message(first, body, mqtt5=self._mqtt5))
        return self.ack(mid, 1) if mid else MQTTErrorCode.MQTT_ERR_SUCCESS

    # ── what both ways of reading do ───────────────────────────────────────────────────────────────────

    def _take_ahead(self) -> bool:
        """Takes the next packet if it is a message that was read ahead whole; every other one is left to paho.

        paho asks for a packet's bytes in three goes, and an aggregator's link spent half its time on that.
        """
        found = None if self._in_packet["command"] else packets.message_ahead(self._ahead, self._ahead_at)
        if found is None:
            return False
        first, (begin, end) = self._ahead[self._ahead_at], found
        self._check(first)
        message = packets.read_message(first, self._ahead[begin:end], mqtt5=self._mqtt5)
        self._ahead_at = end
        if end == len(self._ahead):
            self._ahead, self._ahead_at = b"", 0
        if mid := self._hand_on(message):
            self.ack(mid, 1)
        return True

    def _check(self, first: int) -> None:
        """Refuses a packet by its first byte, and a broker that reads nothing; raises `LinkError`."""
        packets.check_kind(first, answered=self.is_answered, mqtt5=self._mqtt5)
        if len(self._out_packet) > MAX_QUEUED:
            raise LinkError(
                f"the broker goes on sending, and leaves {len(self._out_packet)} packets of ours unread"
            )

    def _hand_on(self, message: packets.Message) -> int:
        """Hands a message on; returns its id where nobody could take it: it must not come again and again."""
        try:
            self._take(self, message)
        except Exception:
            log.exception("message_poisoned topic=%r", message.topic)
            return message.mid
        return 0


class _Head(bytearray):
    """The beginning of a packet too large to keep: what is added beyond it is forgotten."""

    def __iadd__(self, data: Any) -> Self:  # type: ignore[misc]
        self.extend(data[: packets.MAX_HEAD_BYTES - len(self)])
        return self


def _out(packet: bytes) -> Any:
    """What paho keeps of a packet that waits to be written."""
    return {
        "command": packets.PUBACK,
        "mid": 0,
        "qos": 1,
        "pos": 0,
        "to_process": len(packet),
        "packet": packet,
        "info": None,
    }


def _wait_for_loop(_: mqtt.Client, __: object, ___: Any) -> None:
    """Nothing to do: the link's thread looks at what is queued before it waits."""

"""A sender that heeds nobody: as many messages of QoS 1 as the broker takes, over a socket of its own (MQTT 3.1.1).

And an ear for what is acknowledged, which costs a busy machine little.
"""

import socket
import threading
from collections.abc import Iterable
from typing import Self

from edge_runtime.contract.codec import decode
from edge_runtime.contract.ids import DeviceId, SessionId
from edge_runtime.contract.messages import Ack
from edge_runtime.contract.topics import Topics

CONNECT = 0x10
SUBSCRIBE = 0x82
PUBLISH_QOS_1 = 0x32
SUCCESS = bytes([0x20, 2, 0, 0])
IDS = 65_535


def flood(port: int, messages: Iterable[tuple[str, bytes]], client_id: str = "flood") -> int:
    """Publishes all ``messages`` and returns how many, once the broker has acknowledged the last."""
    with socket.create_connection(("127.0.0.1", port), timeout=60.0) as wire:
        wire.sendall(_packet(CONNECT, b"\0\4MQTT\4\2\0\0" + _text(client_id)))
        assert wire.recv(4) == SUCCESS
        sent = answered = 0
        batch = []
        for topic, payload in messages:
            sent += 1
            batch.append(_packet(PUBLISH_QOS_1, _text(topic) + (1 + sent % IDS).to_bytes(2, "big") + payload))
            if len(batch) == 500:
                wire.sendall(b"".join(batch))
                batch.clear()
                answered += _answers(wire, sent - answered)
        wire.sendall(b"".join(batch))
        _answers(wire, sent - answered)
        return sent


def _answers(wire: socket.socket, count: int) -> int:
    """Waits for ``count`` PUBACKs of four bytes each."""
    left = 4 * count
    while left:
        found = wire.recv(min(left, 1 << 16))
        assert found, "the broker hung up"
        left -= len(found)
    return count


def _text(text: str) -> bytes:
    return len(text.encode()).to_bytes(2, "big") + text.encode()


def _packet(first: int, body: bytes) -> bytes:
    length = bytearray()
    rest = len(body)
    while rest > 127:
        length.append(rest & 127 | 128)
        rest >>= 7
    return bytes([first, *length, rest]) + body


class Acks:
    """Counts what an aggregator tells a fleet's devices that it has stored, as cheaply as Python can."""

    def __init__(self, port: int, topics: Topics) -> None:
        self._wire = socket.create_connection(("127.0.0.1", port), timeout=60.0)
        self._wire.sendall(_packet(CONNECT, b"\0\4MQTT\4\2\0\0" + _text(f"acks-{topics.fleet}")))
        assert self._wire.recv(4) == SUCCESS
        self._wire.sendall(_packet(SUBSCRIBE, b"\0\1" + _text(topics.ack(DeviceId("+"))) + b"\0"))
        assert self._wire.recv(5) == bytes([0x90, 3, 0, 1, 0])
        self._seen: set[tuple[DeviceId, SessionId, int]] = set()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._listen, name="acks")
        self._thread.start()

    @property
    def count(self) -> int:
        """How many different messages of devices were acknowledged."""
        with self._changed:
            return len(self._seen)

    def forget(self) -> None:
        """Counts from nothing again."""
        with self._changed:
            self._seen.clear()

    def wait(self, count: int, timeout_seconds: float) -> None:
        """Returns once ``count`` are acknowledged, and forgets them."""
        with self._changed:
            done = self._changed.wait_for(lambda: len(self._seen) >= count, timeout_seconds)
            assert done, f"{len(self._seen)} of {count} were acknowledged within {timeout_seconds} s"
            self._seen.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._wire.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._wire.close()

    def _listen(self) -> None:
        self._wire.settimeout(None)
        data = bytearray()
        while found := self._wire.recv(1 << 16):
            data += found
            told = [decode(payload) for payload in _payloads(data)]
            with self._changed:
                for ack in told:
                    assert isinstance(ack, Ack)
                    self._seen.update((ack.device, ack.session, seq) for seq in ack.seqs)
                self._changed.notify_all()


def _payloads(data: bytearray) -> list[bytes]:
    """Takes whole messages of QoS 0 off the front of ``data``."""
    found, at = [], 0
    while at + 2 <= len(data):
        length, shift, body = 0, 0, at + 1
        while body < len(data) and data[body] > 127:
            length |= (data[body] & 127) << shift
            shift, body = shift + 7, body + 1
        if body >= len(data):
            break
        length |= data[body] << shift
        end = body + 1 + length
        if end > len(data):
            break
        topic = int.from_bytes(data[body + 1 : body + 3], "big")
        found.append(bytes(data[body + 3 + topic : end]))
        at = end
    del data[:at]
    return found

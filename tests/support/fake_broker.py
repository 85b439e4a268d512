"""A broker that says what a test wants, byte for byte, in either version of MQTT."""

import socket
import threading
from collections.abc import Callable
from typing import Self

from tests.services import HOST

WAIT_SECONDS = 10.0
MQTT5 = 5
NOT_AUTHORISED = (0x05, 0x87)
BAD_VERSION = (0x01, 0x84)


class FakeBroker:
    """Accepts one connection after another, reads CONNECT, and hands each to ``serve`` once it is welcomed.

    With ``welcome=False`` nothing is answered; `answer` can do that.
    """

    def __init__(self, serve: Callable[[socket.socket], object], *, welcome: bool = True) -> None:
        self._serve = serve
        self._welcome = welcome
        self._listener = socket.create_server((HOST, 0))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.host = HOST
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self.connects: list[bytes] = []

    @property
    def level(self) -> int:
        """The version of the newest CONNECT: 4 is MQTT 3.1.1."""
        connect = self.connects[-1]
        return connect[connect.index(b"MQTT") + 4]

    def answer(
        self, connection: socket.socket, reasons: tuple[int, int] = (0, 0), properties: bytes = b""
    ) -> None:
        """CONNACK with a reason code of 3.1.1 or of 5, as the client speaks."""
        mqtt5 = bytes([0, reasons[1], len(properties)]) + properties
        connection.sendall(packet(0x20, mqtt5 if self.level == MQTT5 else bytes([0, reasons[0]])))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(WAIT_SECONDS)

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed: the test is over
                return
            with connection:
                connection.settimeout(WAIT_SECONDS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    self._hear(connection)
                    self._serve(connection)
                except OSError:  # the client went away, as it may
                    continue

    def _hear(self, connection: socket.socket) -> None:
        first = connection.recv(4096)
        if not first:
            raise ConnectionError("the client left before CONNECT")
        self.connects.append(first)
        self.connections += 1
        if self._welcome:
            self.answer(connection)


def silent(connection: socket.socket) -> None:
    """Reads everything and acknowledges nothing, until the client leaves."""
    while connection.recv(65536):
        pass


def message(level: int, topic: bytes, payload: bytes, *, mid: int = 0, properties: bytes = b"") -> bytes:
    """PUBLISH, of QoS 1 when it has a message id."""
    body = len(topic).to_bytes(2) + topic + (mid.to_bytes(2) if mid else b"")
    if level == MQTT5:
        body += bytes([len(properties)]) + properties
    return packet(0x32 if mid else 0x30, body + payload)


def packet(first: int, body: bytes) -> bytes:
    """A packet: its first byte, the length of the rest, and the rest."""
    return bytes([first]) + length(len(body)) + body


def length(value: int) -> bytes:
    """A variable byte integer."""
    found = bytearray()
    while True:
        value, digit = divmod(value, 128)
        found.append(digit | (0x80 if value else 0))
        if not value:
            return bytes(found)

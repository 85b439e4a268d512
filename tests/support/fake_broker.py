"""A broker that says what a test wants, byte for byte."""

import socket
import threading
from collections.abc import Callable
from typing import Self

from tests.services import HOST

CONNACK = b"\x20\x02\x00\x00"
REFUSED = b"\x20\x02\x00\x05"  # not authorised
WAIT_SECONDS = 10.0


class FakeBroker:
    """Accepts one connection after another and hands each to ``serve``, after its first packet was read."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server((HOST, 0))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.host = HOST
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0

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
                self.connections += 1
                connection.recv(4096)
                try:
                    self._serve(connection)
                except OSError:  # the client went away, as it may
                    continue


def silent(connection: socket.socket) -> None:
    """Accepts the client, reads everything and acknowledges nothing, until the client leaves."""
    connection.sendall(CONNACK)
    while connection.recv(65536):
        pass

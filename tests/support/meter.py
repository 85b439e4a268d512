"""A wire with a meter: a TCP relay before a service, which counts what crosses it in both directions."""

import contextlib
import selectors
import socket
import threading
from dataclasses import dataclass

from tests.services import HOST

WAIT_SECONDS = 15.0
_READ_BYTES = 1 << 16


@dataclass
class Crossed:
    """One connection: bytes of payload (of TCP) to the service and from it, and the beginning of what went to it."""

    up: int = 0
    down: int = 0
    beginning: bytes = b""

    @property
    def total(self) -> int:
        return self.up + self.down


class Meter:
    """Relays connections to ``port`` on the loopback address; ``connections`` has what crossed, by their start."""

    def __init__(self, port: int) -> None:
        self.connections: list[Crossed] = []
        self._service = port
        self._changed = threading.Condition()
        self._listener = socket.create_server((HOST, 0))
        self.host, self.port = HOST, int(self._listener.getsockname()[1])
        self._wires: set[socket.socket] = set()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection((HOST, self._service))
            except OSError:
                return
            for wire in (near, far):
                wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            crossed = Crossed()
            with self._changed:
                self.connections.append(crossed)
                self._wires |= {near, far}
            threading.Thread(target=self._relay, args=(near, far, crossed), daemon=True).start()

    def _relay(self, near: socket.socket, far: socket.socket, crossed: Crossed) -> None:
        with contextlib.suppress(OSError), selectors.DefaultSelector() as waiting:
            waiting.register(near, selectors.EVENT_READ, far)
            waiting.register(far, selectors.EVENT_READ, near)
            while True:
                for key, _ in waiting.select():
                    source = key.fileobj
                    assert isinstance(source, socket.socket)
                    data = source.recv(_READ_BYTES)
                    if not data:
                        raise ConnectionError
                    key.data.sendall(data)
                    self._count(crossed, data, up=source is near)
        with self._changed:
            self._wires -= {near, far}
        near.close()
        far.close()

    def _count(self, crossed: Crossed, data: bytes, *, up: bool) -> None:
        with self._changed:
            if up:
                crossed.up += len(data)
                crossed.beginning = (crossed.beginning + data)[:256]
            else:
                crossed.down += len(data)
            self._changed.notify_all()

    def settle(self, quiet_seconds: float = 0.4) -> None:
        """Returns when nothing has crossed for a while."""
        with self._changed:
            while self._changed.wait(quiet_seconds):
                pass

    def forget(self) -> None:
        """Starts counting anew; connections that are open are counted no more."""
        with self._changed:
            self.connections = []

    def of(self, client_id: str) -> list[Crossed]:
        """The connections of this MQTT client."""
        name = client_id.encode()
        mark = len(name).to_bytes(2) + name
        return [crossed for crossed in self.connections if mark in crossed.beginning]

    def cut(self) -> None:
        """Ends every connection."""
        with self._changed:
            wires = list(self._wires)
        for wire in wires:
            with contextlib.suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(WAIT_SECONDS)
        self.cut()

"""A web server on the loopback address that offers a folder over TLS, and whatever a hostile one would do instead."""

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

from tests.services import HOST
from tests.support.certificates import Pair

WAIT_SECONDS = 10.0
RANGE = re.compile(r"bytes=(\d+)-")


@dataclass(frozen=True)
class Asked:
    """A request: its path and the first byte of the range it wants, None for the whole."""

    path: str
    start: int | None


class Visit(BaseHTTPRequestHandler):
    """One connection's requests; hooks get it as their only argument, see `WebServer.behave`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "WebServer"

    @property
    def asked(self) -> Asked:
        found = RANGE.fullmatch(self.headers.get("Range", ""))
        return Asked(self.path, int(found[1]) if found else None)

    @property
    def data(self) -> bytes | None:
        """The file that was asked for, None where there is none."""
        path = self.server.folder / self.path.lstrip("/")
        return path.read_bytes() if path.is_file() else None

    def do_GET(self) -> None:
        self.server.asked.append(self.asked)
        try:
            if self.server.behave is not None:
                self.close_connection = True
                self.server.behave(self)
            else:
                self.serve()
        except (OSError, ssl.SSLError):  # the client has left, as it should
            self.close_connection = True

    def serve(self) -> None:
        """As an honest server does, with ranges."""
        data, start = self.data, self.asked.start
        if data is None:
            self.say(404, body=b"no such file")
        elif start is None:
            self.say(200, body=data)
        elif start >= len(data):
            self.say(416)
        else:
            self.say(206, data[start:], Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")

    def say(self, status: int, body: bytes = b"", *, length: int | None = None, **headers: str) -> None:
        """An answer; ``length`` says another Content-Length than that of ``body``, below 0 none."""
        self.send_response(status)
        length = len(body) if length is None else length
        if length >= 0:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.write(body)

    def write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.server.sent += len(data)

    def drip(self, data: bytes, seconds: float) -> None:
        """Byte by byte, until the client or the test has enough."""
        for i in range(len(data)):
            if self.server.closing.wait(seconds):
                return
            self.wfile.write(data[i : i + 1])
            self.wfile.flush()

    def endless(self, piece: bytes) -> None:
        """The same again and again, until the client or the test has enough."""
        while not self.server.closing.is_set():
            self.write(piece)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (http.server's name)
        """Says nothing."""


class WebServer(ThreadingHTTPServer):
    """Offers ``folder`` on a port of its own; with ``pair`` over TLS, with ``client_ca`` to whom that signed only.

    ``behave`` answers requests instead, ``asked`` has all of them, ``sent`` counts bytes of bodies, ``visitors``
    connections. A context manager.
    """

    daemon_threads = True
    block_on_close = True

    def __init__(self, folder: Path, pair: Pair | None = None, *, client_ca: str = "") -> None:
        super().__init__((HOST, 0), Visit)
        self.folder = folder
        self.behave: Callable[[Visit], None] | None = None
        self.asked: list[Asked] = []
        self.sent = 0
        self.visitors = 0
        self.closing = threading.Event()
        self._context: ssl.SSLContext | None = None
        if pair is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(pair.certificate, pair.key)
            if client_ca:
                self._context.load_verify_locations(client_ca)
                self._context.verify_mode = ssl.CERT_REQUIRED
        self.url = f"{'http' if pair is None else 'https'}://{HOST}:{self.server_address[1]}/"
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self._thread.join(WAIT_SECONDS)
        self.server_close()

    def finish_request(self, request, client_address) -> None:
        self.visitors += 1
        request.settimeout(WAIT_SECONDS)
        try:
            if self._context is not None:
                request = self._context.wrap_socket(request, server_side=True)
        except OSError:  # a client that trusts us not, or that we do not trust
            return
        try:
            super().finish_request(request, client_address)
        finally:
            if self._context is not None:
                hang_up(request)

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is none of our business."""


def hang_up(wire: socket.socket) -> None:
    """Ends a connection without a word of TLS."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(wire, socket.SHUT_RDWR)
    wire.close()

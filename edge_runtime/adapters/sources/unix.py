"""Rows from several applications at once over a Unix socket; each client is a stream with its answers in order.

One thread serves all. A client gets a few answers at a time and then the next one's turn comes. One that does not
read its answers is not read from, so that its socket fills and holds it back; nobody else notices.
"""

import logging
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from edge_runtime.adapters.sources.ndjson import MAX_LINE_BYTES, Answerer, Lines, Refusal, encode, respond
from edge_runtime.adapters.unix_socket import UnixListener

CHUNK_BYTES: Final = 1 << 16
TURN_LINES: Final = 8
"""Answers for one client before the next one's turn comes."""
MAX_UNSENT_BYTES: Final = 1 << 16
"""A client with more unsent than this, which is one answer at the most past it, gets no more answers."""
TICK_SECONDS: Final = 0.25
RETRY_ACCEPT_SECONDS: Final = 1.0

log = logging.getLogger(__name__)


class UnixSource:
    """Listens at ``path`` from the start; serves at most ``max_clients`` at once and refuses others with a line.

    A client may end its input (``shutdown(SHUT_WR)``) and still gets every answer. An idle one costs a descriptor.
    Memory for a client is bounded: one chunk of 64 KiB, one line of ``max_line_bytes``, 64 KiB and one answer unsent.

    Raises:
        ConfigError: see `UnixListener`.
    """

    def __init__(
        self,
        path: Path,
        *,
        mode: int = 0o660,
        max_clients: int = 16,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        self._listener = UnixListener(path, mode=mode)
        self._listener.socket.setblocking(False)
        self._max_clients = max_clients
        self._max_line_bytes = max_line_bytes
        self._clients: list[_Client] = []
        self._accepts_from = 0.0
        self._selector = selectors.DefaultSelector()

    def close(self) -> None:
        """Gives the path back; for a source that is not served."""
        for client in self._clients:
            client.wire.close()
        self._clients.clear()
        self._selector.close()
        self._listener.close()

    def serve(self, answer: Answerer, stop: threading.Event) -> None:
        """Answers until ``stop`` is set; then closes every connection and removes the socket's file."""
        self._selector.register(self._listener.socket, selectors.EVENT_READ)
        try:
            while not stop.is_set():
                busy = any(client.can_answer for client in self._clients)
                for key, events in self._selector.select(0 if busy else TICK_SECONDS):
                    if key.data is None:
                        self._accept()
                    else:
                        self._move(key.data, events)
                self._resume_accepting()
                for client in list(self._clients):
                    self._take_turn(client, answer, stop)
        finally:
            self.close()

    def _accept(self) -> None:
        try:
            wire, _ = self._listener.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as e:  # no descriptors left: the others go on, and this one waits
            log.warning("client_not_accepted path=%s reason=%s", self._listener.path, e.strerror)
            self._selector.unregister(self._listener.socket)
            self._accepts_from = time.monotonic() + RETRY_ACCEPT_SECONDS
            return
        wire.setblocking(False)
        if len(self._clients) >= self._max_clients:
            log.warning("client_refused path=%s clients=%d", self._listener.path, len(self._clients))
            self._refuse(wire)
            return
        client = _Client(wire, self._max_line_bytes)
        self._clients.append(client)
        self._selector.register(wire, selectors.EVENT_READ, client)

    def _resume_accepting(self) -> None:
        if self._accepts_from and time.monotonic() >= self._accepts_from:
            self._accepts_from = 0.0
            self._selector.register(self._listener.socket, selectors.EVENT_READ)

    def _refuse(self, wire: socket.socket) -> None:
        many = f"{self._max_clients} clients are connected already; close one or raise source.max_clients"
        with wire:
            try:
                wire.send(encode(None, Refusal("unavailable", many)))
            except OSError as e:  # it did not wait for the answer
                log.debug("refusal_unsent reason=%s", e)

    def _move(self, client: "_Client", events: int) -> None:
        """Bytes in and out of one client."""
        try:
            if events & selectors.EVENT_READ:
                client.receive()
            if events & selectors.EVENT_WRITE:
                client.send()
        except OSError as e:  # it is gone, and with it the only one who wanted its answers
            log.debug("client_lost reason=%s", e)
            self._drop(client)

    def _take_turn(self, client: "_Client", answer: Answerer, stop: threading.Event) -> None:
        """A few answers for one client, and what it is waited for from now on."""
        for _ in range(TURN_LINES):
            if stop.is_set() or not client.can_answer:
                break
            client.answer_one(answer)
            self._move(client, selectors.EVENT_WRITE)
            if client not in self._clients:
                return
        if client.finished:
            self._drop(client)
            return
        wanted = (selectors.EVENT_WRITE if client.unsent else 0) | (
            selectors.EVENT_READ if client.can_receive else 0
        )
        if wanted != client.wanted:
            self._wait_for(client, wanted)

    def _wait_for(self, client: "_Client", wanted: int) -> None:
        if not client.wanted:
            self._selector.register(client.wire, wanted, client)
        elif wanted:
            self._selector.modify(client.wire, wanted, client)
        else:
            self._selector.unregister(client.wire)
        client.wanted = wanted

    def _drop(self, client: "_Client") -> None:
        if client.wanted:
            self._selector.unregister(client.wire)
        self._clients.remove(client)
        client.wire.close()


class _Client:
    """One connection: bytes that came, lines not answered yet, answers not sent yet."""

    __slots__ = (
        "_arrived_ns",
        "_ended",
        "_lines",
        "_max_line_bytes",
        "_next",
        "_pending",
        "unsent",
        "wanted",
        "wire",
    )

    def __init__(self, wire: socket.socket, max_line_bytes: int) -> None:
        self.wire = wire
        self.wanted = selectors.EVENT_READ
        self.unsent = bytearray()
        self._max_line_bytes = max_line_bytes
        self._lines = Lines(max_line_bytes)
        self._pending: Iterator[bytes | None] = iter(())
        self._next: tuple[bytes | None] | None = None
        self._arrived_ns = 0
        self._ended = False

    @property
    def can_answer(self) -> bool:
        """Whether a line waits and its answer would be taken."""
        return self._next is not None and len(self.unsent) < MAX_UNSENT_BYTES

    @property
    def can_receive(self) -> bool:
        """Whether every line is answered, so that more may come."""
        return self._next is None and not self._ended and len(self.unsent) < MAX_UNSENT_BYTES

    @property
    def finished(self) -> bool:
        """Whether its input ended and every answer is sent."""
        return self._ended and self._next is None and not self.unsent

    def receive(self) -> None:
        """Takes what came; raises OSError when the client is gone."""
        try:
            data = self.wire.recv(CHUNK_BYTES)
        except BlockingIOError:
            return
        self._arrived_ns = time.perf_counter_ns()
        self._ended = not data
        self._pending = self._lines.push(data) if data else self._lines.end()
        self._advance()

    def answer_one(self, answer: Answerer) -> None:
        """Answers the line that waits."""
        assert self._next is not None
        self.unsent += respond(
            self._next[0], answer, arrived_ns=self._arrived_ns, max_line_bytes=self._max_line_bytes
        )
        self._advance()

    def send(self) -> None:
        """Sends what the client's socket takes; raises OSError when the client is gone."""
        try:
            while self.unsent:
                del self.unsent[: self.wire.send(self.unsent)]
        except BlockingIOError:
            return

    def _advance(self) -> None:
        """Looks one line ahead, because only its absence says that the chunk is worked off."""
        for line in self._pending:
            self._next = (line,)
            return
        self._next = None

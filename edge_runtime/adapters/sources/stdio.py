"""Rows on stdin, answers on stdout: ``app | skiffd device.toml | app``. Logs go to stderr."""

import os
import select
import threading
import time
from typing import Final

from edge_runtime.adapters.sources.ndjson import MAX_LINE_BYTES, Answerer, Lines, respond

CHUNK_BYTES: Final = 1 << 16
TICK_SECONDS: Final = 0.25
_GONE: Final = select.POLLERR | select.POLLNVAL


class StdioSource:
    """Two file descriptors; a pipe that is empty or full is waited for, but can be told to stop.

    Back-pressure is the pipes' own: nothing is read while an answer cannot be written. The source ends when its input
    ends, after the answer to a last line without a newline, or when nobody can read the answers any more.
    """

    def __init__(self, *, stdin: int = 0, stdout: int = 1, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._stdin = stdin
        self._stdout = stdout
        self._max_line_bytes = max_line_bytes

    def serve(self, answer: Answerer, stop: threading.Event) -> None:
        """Answers until the input ends, the reader is gone or ``stop`` is set; raises OSError on a broken device."""
        lines = Lines(self._max_line_bytes)
        while (data := self._read(stop)) is not None:
            arrived_ns = time.perf_counter_ns()
            for line in lines.push(data) if data else lines.end():
                reply = respond(line, answer, arrived_ns=arrived_ns, max_line_bytes=self._max_line_bytes)
                if not self._write(reply, stop) or stop.is_set():
                    return
            if not data:
                return

    def _read(self, stop: threading.Event) -> bytes | None:
        """Some bytes, none at the end of the input; None when it is time to end."""
        poll = select.poll()
        poll.register(self._stdin, select.POLLIN)
        poll.register(self._stdout, 0)  # POLLERR, a pipe without a reader, is always told
        while not stop.is_set():
            ready = dict(poll.poll(TICK_SECONDS * 1e3))
            if ready.get(self._stdout, 0) & _GONE or ready.get(self._stdin, 0) & select.POLLNVAL:
                return None
            if self._stdin in ready:
                return os.read(self._stdin, CHUNK_BYTES)
        return None

    def _write(self, data: bytes, stop: threading.Event) -> bool:
        """Whether all was written; not when the reader is gone, or does not read and ``stop`` is set."""
        poll = select.poll()
        poll.register(self._stdout, select.POLLOUT)
        while data:
            ending = stop.is_set()
            events = dict(poll.poll(0 if ending else TICK_SECONDS * 1e3)).get(self._stdout, 0)
            if events & _GONE or (ending and not events):
                return False
            if events & select.POLLOUT:
                try:
                    # A pipe that is writable takes this much without blocking (pipe(7)).
                    data = data[os.write(self._stdout, data[: select.PIPE_BUF]) :]
                except BrokenPipeError:
                    return False
        return True

"""The queue between a thread that receives and an owner that polls: bounded in messages and in bytes."""

import threading
import time
from collections import deque
from typing import Generic, TypeVar

E = TypeVar("E")


class Inbox(Generic[E]):
    """Events in the order they came. Only messages (`put_bounded`) count towards the bounds and wait for room.

    Whoever puts without a bound vouches that those events are few. A message is taken whatever its size when there is
    no other, so memory is bounded by ``max_bytes`` and the largest message.
    """

    def __init__(self, max_messages: int, max_bytes: int) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._events: deque[tuple[E, int | None]] = deque()
        self._messages = 0
        self._bytes = 0
        self._closed = False
        self._woken = False
        self._changed = threading.Condition()

    def put(self, event: E) -> None:
        """Appends without waiting."""
        with self._changed:
            self._events.append((event, None))
            self._changed.notify_all()

    def put_bounded(self, event: E, size_bytes: int) -> bool:
        """Appends when there is room; after `close` drops the event and returns False."""
        with self._changed:
            while not self._closed and self._is_full(size_bytes):
                self._changed.wait()
            if self._closed:
                return False
            self._messages += 1
            self._bytes += size_bytes
            self._events.append((event, size_bytes))
            self._changed.notify_all()
            return True

    def _is_full(self, size_bytes: int) -> bool:
        return self._messages >= self._max_messages or (
            self._messages > 0 and self._bytes + size_bytes > self._max_bytes
        )

    def get(self, timeout_seconds: float) -> E | None:
        """The oldest event, or None after the timeout or a `wake`."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while not self._events:
                left = deadline - time.monotonic()
                if self._woken or left <= 0:
                    self._woken = False
                    return None
                self._changed.wait(left)
            event, size_bytes = self._events.popleft()
            if size_bytes is not None:
                self._messages -= 1
                self._bytes -= size_bytes
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

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
        self._waiting = 0
        self._changed = threading.Condition()

    def put(self, event: E) -> None:
        """Appends without waiting."""
        with self._changed:
            self._events.append((event, None))
            self._notify()

    def put_bounded(self, event: E, size_bytes: int) -> bool:
        """Appends when there is room; after `close` drops the event and returns False."""
        with self._changed:
            while not self._closed and self._is_full(size_bytes):
                self._wait(None)
            if self._closed:
                return False
            self._messages += 1
            self._bytes += size_bytes
            self._events.append((event, size_bytes))
            self._notify()
            return True

    def _is_full(self, size_bytes: int) -> bool:
        return self._messages >= self._max_messages or (
            self._messages > 0 and self._bytes + size_bytes > self._max_bytes
        )

    def get(self, timeout_seconds: float) -> E | None:
        """The oldest event, or None after the timeout or a `wake`."""
        found = self.get_many(1, timeout_seconds)
        return found[0] if found else None

    def get_many(self, limit: int, timeout_seconds: float) -> list[E]:
        """The oldest events, up to ``limit``; waits for the first of them only, and no longer than a `wake`."""
        with self._changed:
            if not self._events and not self._wait_for_event(timeout_seconds):
                return []
            found: list[E] = []
            before = self._messages
            while self._events and len(found) < limit:
                event, size_bytes = self._events.popleft()
                if size_bytes is not None:
                    self._messages -= 1
                    self._bytes -= size_bytes
                found.append(event)
            if self._messages < before:
                self._notify()
            return found

    def _wait_for_event(self, timeout_seconds: float) -> bool:
        deadline = time.monotonic() + timeout_seconds
        while not self._events:
            left = deadline - time.monotonic()
            if self._woken or left <= 0:
                self._woken = False
                return False
            self._wait(left)
        return True

    def wake(self) -> None:
        """Ends a waiting `get`, or the next one that would wait."""
        with self._changed:
            self._woken = True
            self._notify()

    def close(self) -> None:
        """Lets a waiting `put_bounded` go; later ones drop their event."""
        with self._changed:
            self._closed = True
            self._notify()

    def _wait(self, seconds: float | None) -> None:
        self._waiting += 1
        try:
            self._changed.wait(seconds)
        finally:
            self._waiting -= 1

    def _notify(self) -> None:
        if self._waiting:
            self._changed.notify_all()

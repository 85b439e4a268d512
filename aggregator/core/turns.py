"""Who is next: messages that wait for a batch, and a bound on how many of them one sender may have.

The broker hands over one queue in which whoever sends most stands everywhere. Here each sender has a queue of its own
and senders take turns (round robin, after J. Nagle, RFC 970, 1985), so that a batch holds a message of everybody who
waits before it holds a second one of anybody. Pure: nothing is read, nothing is sent.
"""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

M = TypeVar("M")


class Turns(Generic[M]):
    """Waiting messages by sender, each sender's in the order they came, ``per_sender`` of one sender at most."""

    def __init__(self, per_sender: int) -> None:
        self._per_sender = per_sender
        self._waiting: OrderedDict[str, deque[M]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        """How many messages wait."""
        return self._size

    def put(self, sender: str, message: M) -> bool:
        """Lets ``message`` wait; False, and nothing kept, when its sender has as many waiting as it may."""
        queue = self._waiting.get(sender)
        if queue is None:
            queue = self._waiting[sender] = deque()
        elif len(queue) >= self._per_sender:
            return False
        queue.append(message)
        self._size += 1
        return True

    def take(self, limit: int) -> list[M]:
        """Up to ``limit`` messages in turns; the next call goes on with the sender after the last one served."""
        taken: list[M] = []
        while self._waiting and len(taken) < limit:
            sender, queue = self._waiting.popitem(last=False)
            taken.append(queue.popleft())
            if queue:
                self._waiting[sender] = queue
        self._size -= len(taken)
        return taken

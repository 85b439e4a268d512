"""Releases in line for the update child, which works on one at a time. Nothing in them is verified yet."""

import random
from typing import Final

from edge_runtime.core.backoff import next_delay_seconds

MAX_OFFERS: Final = 4


class Offers:
    """The line, newest claim first; who was followed or refused before is not offered again. Not thread-safe.

    Releases are known by their signed bytes. Times are monotonic seconds.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._line: dict[bytes, int] = {}
        self._followed = b""
        self._refused = b""
        self._at_work = b""
        self._attempt = 0
        self._retry_at: float | None = None

    def __len__(self) -> int:
        return len(self._line)

    @property
    def working(self) -> bool:
        """Whether the child is at work on one."""
        return bool(self._at_work)

    def put(self, signed: bytes, revision: int) -> None:
        """Puts a release in line, with the ``revision`` that it claims: that only orders the line."""
        if signed in self._line or signed in (self._followed, self._refused):
            return
        if len(self._line) == MAX_OFFERS:  # late ones make room for the newest, claims for what came now
            del self._line[min(self._line, key=self._line.__getitem__)]
        self._line[signed] = revision

    def repeat(self, revision: int) -> bool:
        """The release followed last has to be worked on again; whether there was one."""
        if self._followed:
            self._line[self._followed] = revision
        return bool(self._followed)

    def next(self, now: float) -> bytes | None:
        """The one to work on from now on; None while there is none, or somebody is at work, or it is too early."""
        if not self._line or self._at_work or (self._retry_at is not None and now < self._retry_at):
            return None
        self._at_work = max(self._line, key=self._line.__getitem__)
        return self._at_work

    def put_off(self, now: float) -> None:
        """Not before a while, which grows with every call until one is followed."""
        self._attempt += 1
        self._retry_at = now + next_delay_seconds(self._attempt, self._rng)

    def wait_until(self, seconds: float) -> None:
        """Not before then."""
        self._retry_at = seconds

    def interrupted(self, now: float) -> bool:
        """The child came to no end: it stays in line. Whether this is the first time in a row."""
        self._at_work = b""
        self.put_off(now)
        return self._attempt == 1

    def refuse(self, now: float) -> None:
        """The one at work is not a release of ours."""
        self._refused, self._at_work = self._at_work, b""
        self._line.pop(self._refused, None)
        self.put_off(now)

    def follow(self, revision: int) -> None:
        """The one at work is a release of ours, of this ``revision``: what claims less is out of line."""
        self._followed, self._at_work = self._at_work, b""
        self._line = {o: r for o, r in self._line.items() if r > revision and o != self._followed}
        self._attempt, self._retry_at = 0, None

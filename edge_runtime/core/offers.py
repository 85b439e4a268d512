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
        self._doubts: dict[bytes, int] = {}
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
            self._leave(min(self._line, key=self._place))
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
        self._at_work = max(self._line, key=self._place)
        return self._at_work

    def _place(self, signed: bytes) -> tuple[int, int]:
        """Greater for who comes earlier: whoever was not believed stands behind those who were not asked yet."""
        return -self._doubts.get(signed, 0), self._line[signed]

    def _leave(self, signed: bytes) -> None:
        self._line.pop(signed, None)
        self._doubts.pop(signed, None)

    def put_off(self, now: float) -> None:
        """Not before a while, which grows with every call until one is followed."""
        self._attempt += 1
        self._retry_at = now + next_delay_seconds(self._attempt, self._rng)

    def wait_until(self, seconds: float) -> None:
        """Not before then."""
        self._retry_at = seconds

    def interrupted(self, now: float, *, doubted: bool = False) -> bool:
        """The child came to no end: it stays in line. Whether this is the first time in a row.

        ``doubted``: no key that is trusted now has signed it. One may be trusted later, so it is not refused for good.
        """
        if doubted:
            self._doubts[self._at_work] = self._doubts.get(self._at_work, 0) + 1
        self._at_work = b""
        self.put_off(now)
        return self._attempt == 1

    def refuse(self, now: float) -> None:
        """The one at work is not a release of ours."""
        self._refused, self._at_work = self._at_work, b""
        self._leave(self._refused)
        self.put_off(now)

    def follow(self, revision: int) -> None:
        """The one at work is a release of ours, of this ``revision``: what claims less is out of line."""
        self._followed, self._at_work = self._at_work, b""
        self._line = {o: r for o, r in self._line.items() if r > revision and o != self._followed}
        self._doubts = {o: n for o, n in self._doubts.items() if o in self._line}
        self._attempt, self._retry_at = 0, None

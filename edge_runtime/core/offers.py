"""Releases in line for the update child, which works on one at a time. Nothing in them is verified yet."""

import random
from dataclasses import dataclass
from typing import Final

from edge_runtime.core.backoff import next_delay_seconds

MAX_OFFERS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """How long one release waits, in seconds: longer with every time, up to ``cap``; see `next_delay_seconds`."""

    base: float
    cap: float
    least: float = 0.0


WRONG_BYTES: Final = Pause(base=2.0, cap=6 * 3600.0, least=0.5)
"""What was damaged on its way is whole the next time, and a bad sector is another. But a chunk that is damaged where it
is kept stays so until the model is published again, and every try costs the download."""
UNPUBLISHED: Final = Pause(base=0.5, cap=900.0)
"""Metadata that is published with a release may come a moment later, or never."""
SUSPECTED: Final = Pause(base=30.0, cap=900.0, least=0.5)
"""Memory that is short is short for a while."""


class Offers:
    """The line, newest claim first; who was followed or refused before is not offered again. Not thread-safe.

    Releases are known by their signed bytes. Times are monotonic seconds.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._line: dict[bytes, int] = {}
        self._doubts: dict[bytes, int] = {}
        # How often it was told to wait, and until when.
        self._waits: dict[bytes, tuple[int, float]] = {}
        self._followed = b""
        self._refused = b""
        self._at_work = b""
        self._attempt = 0
        self._retry_at: float | None = None

    def __len__(self) -> int:
        return len(self._line)

    @property
    def line(self) -> tuple[bytes, ...]:
        """All that are in line, also the one at work."""
        return tuple(self._line)

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
        if self._at_work or (self._retry_at is not None and now < self._retry_at):
            return None
        due = [signed for signed in self._line if signed not in self._waits or now >= self._waits[signed][1]]
        self._at_work = max(due, key=self._place, default=b"")
        return self._at_work or None

    def _place(self, signed: bytes) -> tuple[int, int]:
        """Greater for who comes earlier: whoever was not believed stands behind those who were not asked yet."""
        return -self._doubts.get(signed, 0), self._line[signed]

    def _leave(self, signed: bytes) -> None:
        self._line.pop(signed, None)
        self._doubts.pop(signed, None)
        self._waits.pop(signed, None)

    def put_off(self, now: float) -> None:
        """Not before a while, which grows with every call until one is followed."""
        self._attempt += 1
        self._retry_at = now + next_delay_seconds(self._attempt, self._rng)

    def wait_until(self, seconds: float) -> None:
        """Not before then."""
        self._retry_at = seconds

    def interrupted(
        self, now: float, *, doubted: bool = False, revision: int | None = None, pause: Pause | None = None
    ) -> bool:
        """The child came to no end: it stays in line. Whether this is the first time in a row.

        ``doubted``: no key that is trusted now has signed it. One may be trusted later, so it is not refused for good.
        ``revision`` is that of a release that was verified: what claims less is out of line. With ``pause`` it waits
        for itself alone, and others are worked on meanwhile.
        """
        signed, self._at_work = self._at_work, b""
        if doubted:
            self._doubts[signed] = self._doubts.get(signed, 0) + 1
        if revision is not None:
            self._overtake(signed, revision)
        if pause is None:
            self.put_off(now)
            return self._attempt == 1
        count = self._waits.get(signed, (0, 0.0))[0] + 1
        delay = next_delay_seconds(count, self._rng, base=pause.base, cap=pause.cap, least=pause.least)
        self._waits[signed] = (count, now + delay)
        return count == 1

    def refuse(self, now: float) -> None:
        """The one at work is not a release of ours."""
        self._refused, self._at_work = self._at_work, b""
        self._leave(self._refused)
        self.put_off(now)

    def follow(self, revision: int) -> None:
        """The one at work is a release of ours, of this ``revision``: what claims less is out of line."""
        self._followed, self._at_work = self._at_work, b""
        self._leave(self._followed)
        self._overtake(self._followed, revision)
        self._attempt, self._retry_at = 0, None

    def _overtake(self, signed: bytes, revision: int) -> None:
        for other in [o for o, claimed in self._line.items() if o != signed and claimed <= revision]:
            self._leave(other)

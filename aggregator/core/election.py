"""Which of several processes leads: a lease that its holder renews, and that another takes over when it stands still.

Nobody compares clocks: a candidate takes the lease over when it has seen it unchanged for its whole length by its own
monotonic clock, which began to count after the holder's did. That makes two leaders rare, not impossible: a process
that was paused believes in its lease until it looks. What makes them harmless is the term, which every writing
transaction of a leader checks (`Ledger.guard`; M. Kleppmann, "How to do distributed locking", 2016, on fencing).
"""

import math
from typing import Final

from aggregator.records import Lease

RENEWALS: Final = 3
"""A leader renews so many times within a lease, so that one late renewal is not its end."""


class Election:
    """One process's view of the lease. ``holder`` is a name that no other process has or had."""

    def __init__(self, holder: str, lease_seconds: float) -> None:
        self._holder = holder
        self._seconds = lease_seconds
        self._held: Lease | None = None
        self._until = -math.inf
        self._renew_at = -math.inf
        self._seen: Lease | None = None
        self._seen_at = math.inf

    @property
    def held(self) -> Lease | None:
        """The lease this process won last, None after `lose`."""
        return self._held

    def leads(self, now_seconds: float) -> bool:
        """Whether the lease is held and not yet due to end."""
        return self._held is not None and now_seconds < self._until

    def bid(self, found: Lease | None, now_seconds: float) -> Lease | None:
        """What to put in the place of ``found``, the lease as it stands; None: nothing now.

        ``now_seconds`` is monotonic, read after ``found``.
        """
        if self._held is not None and found is not None and found.term == self._held.term:
            return Lease(self._holder, found.term, found.beat + 1) if now_seconds >= self._renew_at else None
        if found is None:
            return Lease(self._holder, 1)
        if found != self._seen:
            self._seen, self._seen_at = found, now_seconds
        if not found.holder or now_seconds >= self._seen_at + self._seconds:
            return Lease(self._holder, found.term + 1)
        return None

    def win(self, lease: Lease, asked_seconds: float) -> None:
        """The bid stands in the ledger; ``asked_seconds`` was read before it was written."""
        self._held = lease
        self._until = asked_seconds + self._seconds
        self._renew_at = asked_seconds + self._seconds / RENEWALS

    def lose(self) -> None:
        """This process leads no more."""
        self._held = None
        self._until = self._renew_at = -math.inf

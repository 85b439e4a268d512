"""Who leads, where several processes share a ledger: one row, changed only by whoever knows what stands in it."""

from functools import partial
from typing import Final

from sqlalchemy import Connection, select

from aggregator.adapters.ledger import tables
from aggregator.adapters.ledger.control import Part
from aggregator.records import Lease, LeaseLost

LOCK: Final = 0x6C65617365
"""Of PostgreSQL's advisory locks, "lease": leaders' transactions share it, a change of the lease excludes them. SQLite
has one writer at a time anyway.
"""


class Leases(Part):
    """The lease, and the guard that keeps a deposed leader from writing."""

    def lease(self) -> Lease | None:
        """The lease as it stands; None when there never was one."""
        row = self._db.one(select(tables.lease.c.holder, tables.lease.c.term, tables.lease.c.beat))
        return Lease(row.holder, row.term, row.beat) if row else None

    def swap_lease(self, old: Lease | None, new: Lease) -> bool:
        """Puts ``new`` in the place of ``old``, durably; False, and nothing done, when another stands there by now."""
        guard, self._db.first = self._db.first, partial(_lock, shared=False)
        try:
            with self._db.transaction():
                if self.lease() != old:
                    return False
                row = {"id": 1, "holder": new.holder, "term": new.term, "beat": new.beat}
                self._db.upsert(tables.lease, row)
        finally:
            self._db.first = guard
        return True

    def guard(self, lease: Lease | None) -> None:
        """From now on every transaction of this object asks first whether ``lease``'s holder still has that term.

        Where it has not, the transaction raises `LeaseLost` before anything is written.
        """
        self._db.first = None if lease is None else partial(self._check, lease)

    def _check(self, mine: Lease, c: Connection) -> None:
        _lock(c, shared=True)
        now = self.lease()
        if now is None or (now.holder, now.term) != (mine.holder, mine.term):
            raise LeaseLost(f"{mine} is over: {now} stands; another process leads, nothing was written")


def _lock(c: Connection, *, shared: bool) -> None:
    if c.dialect.name == "postgresql":
        c.exec_driver_sql(f"SELECT pg_advisory_xact_lock{'_shared' if shared else ''}({LOCK})")

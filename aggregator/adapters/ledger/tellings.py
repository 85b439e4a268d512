"""Alarm events on their way: written with their incident, there until a sink has them."""

from collections.abc import Collection, Iterable

from sqlalchemy import delete, insert, select

from aggregator.adapters.ledger import tables
from aggregator.adapters.ledger.control import Part
from aggregator.records import Telling


class Tellings(Part):
    """The outbox of the alarms."""

    def put_tellings(self, tellings: Iterable[Telling]) -> None:
        """Keeps what is to be told, each under a number of its own, whatever ``number`` says."""
        for t in tellings:
            row = {"sink": t.sink, "incident": t.incident, "at_ns": t.at_ns, "document": t.text}
            self._db.run(insert(tables.tellings), row)

    def tellings(self, after: int = 0) -> tuple[Telling, ...]:
        """What was not told yet and is numbered above ``after``, in the order it was put."""
        t = tables.tellings
        return tuple(
            Telling(number=row.id, sink=row.sink, incident=row.incident, at_ns=row.at_ns, text=row.document)
            for row in self._db.rows(select(t).where(t.c.id > after).order_by(t.c.id))
        )

    def put_told(self, numbers: Collection[int]) -> None:
        """Forgets what was told, or given up."""
        t = tables.tellings
        for number in numbers:
            self._db.run(delete(t).where(t.c.id == number))

"""How a full outbox makes room, within the transaction of the append that filled it: merging first, dropping last."""

import sqlite3
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Final

from edge_runtime.contract.codec import decode, encode
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.messages import Event, Window

Merge = Callable[[Window, Window], Window | None]
Choose = Callable[[Sequence[int], Collection[int]], int | None]

RECORD_BYTES: Final = 160
"""Charged per record beside its topic and payload: keys, row and index entries, and what pages leave empty."""
EVENTS_SHARE: Final = 4
"""One part in so many is what events may hold of a full outbox: chatter must not thin out the windows."""

LENGTHS: Final = "length(CAST(topic AS BLOB)) + length(payload)"
EXTEND_GAP: Final = """
INSERT INTO gaps (topic, kind, windows, records, start_ns, end_ns) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (topic, kind) DO UPDATE SET
  windows = windows + excluded.windows,
  records = records + excluded.records,
  start_ns = min(coalesce(start_ns, excluded.start_ns), coalesce(excluded.start_ns, start_ns)),
  end_ns = max(coalesce(end_ns, excluded.end_ns), coalesce(excluded.end_ns, end_ns))
"""


def charge(topic: str, payload: bytes) -> int:
    """What a record costs in bytes."""
    return len(topic.encode()) + len(payload) + RECORD_BYTES


@dataclass(slots=True)
class Figures:
    """What would take a scan to know: how many records, their bytes, those of events, and which places are settled.

    All up to ``sent_up_to`` count as sent. ``apart`` are places of windows that can't be merged with the next one.
    """

    count: int
    size: int
    events_size: int
    last_place: int
    sent_up_to: int
    apart: set[int] = field(default_factory=set)

    def add(self, count: int, size: int, *, is_window: bool) -> None:
        """Counts records that came, or went when negative."""
        self.count += count
        self.size += size
        if not is_window:
            self.events_size += size

    def copy(self) -> "Figures":
        """One that stays as it is."""
        return replace(self, apart=set(self.apart))


@dataclass(slots=True)
class _Queue:
    """The windows of one topic that were never sent: their places and how many closed windows each holds."""

    places: list[int] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    size: int = 0


class Room:
    """Room in ``db`` for what was just put into it; ``figures`` are kept up to date. For one transaction."""

    def __init__(
        self,
        db: sqlite3.Connection,
        figures: Figures,
        *,
        max_bytes: int,
        merge: Merge | None,
        choose: Choose | None,
    ) -> None:
        self._db: Final = db
        self._now: Final = figures
        self._max_bytes: Final = max_bytes
        self._merge: Final = merge
        self._choose: Final = choose

    def make(self) -> None:
        """Merges and drops until the records fit; the newest is never dropped."""
        self._drop("windows = 0", lambda: self._now.events_size <= self._max_bytes // EVENTS_SHARE)
        if self._merge is not None and self._choose is not None:
            self._merge_windows(self._merge, self._choose)
        self._drop("windows = 0", lambda: self._fits or not self._now.events_size)
        self._drop("TRUE", lambda: self._fits)

    @property
    def _fits(self) -> bool:
        return self._now.size <= self._max_bytes

    def _merge_windows(self, merge: Merge, choose: Choose) -> None:
        for queue in sorted(self._queues(), key=lambda q: q.size, reverse=True):
            while not self._fits:
                apart = self._now.apart
                index = choose(
                    queue.spans, [i for i, p in enumerate(queue.places) if p in apart] if apart else ()
                )
                if index is None:
                    break
                self._merge_pair(merge, queue, index)

    def _queues(self) -> list[_Queue]:
        queues: dict[str, _Queue] = {}
        if not self._fits:
            rows = self._db.execute(
                f"SELECT place, topic, windows, {LENGTHS} FROM records"  # noqa: S608
                " WHERE windows > 0 AND place > ? ORDER BY place",
                (self._now.sent_up_to,),
            )
            for place, topic, windows, length in rows.fetchall():
                queue = queues.setdefault(topic, _Queue())
                queue.places.append(place)
                queue.spans.append(windows)
                queue.size += length
        return list(queues.values())

    def _merge_pair(self, merge: Merge, queue: _Queue, index: int) -> None:
        """Puts the record of both in the newer one's place, or remembers that there is none."""
        (older_place, older), (place, newer) = (
            (p, self._payload(p)) for p in queue.places[index : index + 2]
        )
        merged, payload = _merged(merge, older, newer)
        if merged is None:
            self._now.apart.add(older_place)
            return
        spans = queue.spans[index : index + 2]
        self._db.execute("DELETE FROM records WHERE place = ?", (older_place,))
        topic = self._db.execute(
            "UPDATE records SET payload = ?, windows = ? WHERE place = ? RETURNING topic",
            (payload, sum(spans), place),
        ).fetchall()[0][0]
        gained = charge(topic, payload) - charge(topic, older) - charge(topic, newer)
        self._now.add(-1, gained, is_window=True)
        self._db.execute(EXTEND_GAP, (topic, "merged", spans.count(1), 1, merged.start_ns, merged.end_ns))
        del queue.places[index]
        queue.spans[index : index + 2] = [sum(spans)]

    def _payload(self, place: int) -> bytes:
        row = self._db.execute("SELECT payload FROM records WHERE place = ?", (place,)).fetchone()
        return bytes(row[0])

    def _drop(self, which: str, enough: Callable[[], bool]) -> None:
        """Drops the oldest records for which ``which`` holds, but for the newest, until it is ``enough``."""
        if enough():
            return
        gone: list[tuple[int]] = []
        query = (
            f"SELECT place, topic, payload, windows FROM records WHERE {which} AND place < ? ORDER BY place"  # noqa: S608
        )
        with closing(self._db.execute(query, (self._now.last_place,))) as rows:
            for place, topic, payload, windows in rows:
                gone.append((place,))
                self._now.add(-1, -charge(topic, payload), is_window=windows > 0)
                self._db.execute(EXTEND_GAP, (topic, "dropped", windows, 1, *_times(payload)))
                if enough():
                    break
        self._db.executemany("DELETE FROM records WHERE place = ?", gone)
        self._db.execute("UPDATE totals SET value = value + ? WHERE name = 'dropped'", (len(gone),))


def _merged(merge: Merge, older: bytes, newer: bytes) -> tuple[Window | None, bytes]:
    """The record of both and its bytes; None where there is none, also because it would be too large to send."""
    try:
        first, second = decode(older), decode(newer)
        merged = merge(first, second) if isinstance(first, Window) and isinstance(second, Window) else None
        return merged, encode(merged) if merged is not None else b""
    except ContractError:
        return None, b""


def _times(payload: bytes) -> tuple[int | None, int | None]:
    """From when to when a message is, by its own account."""
    try:
        message = decode(payload)
    except ContractError:
        return None, None
    match message:
        case Window():
            return message.start_ns, message.end_ns
        case Event():
            return message.wall_ns, message.wall_ns
        case _:
            return None, None

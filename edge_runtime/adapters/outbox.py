"""Messages that wait until the aggregator says it has stored them. The only durable queue on the device.

The broker is never the durability point: a PUBACK says nothing of its disk. A record stays here until `Outbox.trim`.
"""

import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from edge_runtime.adapters import outbox_file
from edge_runtime.adapters.outbox_file import Damaged
from edge_runtime.adapters.outbox_room import (
    EXTEND_GAP,
    LENGTHS,
    RECORD_BYTES,
    Choose,
    Figures,
    Merge,
    Room,
    charge,
)
from edge_runtime.contract.errors import BudgetExceeded, SkiffError
from edge_runtime.contract.ids import SessionId

T = TypeVar("T")

VOLATILE_BYTES: Final = 1 << 20
"""The bound of an outbox that had to be kept in memory."""

_INSERT: Final = (
    "INSERT INTO records (place, session, seq, topic, payload, windows) VALUES (?, ?, ?, ?, ?, ?)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One waiting message; (session, seq) is its key. ``sent``: it may have left the device."""

    session: SessionId
    seq: int
    topic: str
    payload: bytes = field(repr=False)
    sent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """What a full outbox gave up on one topic, until `Outbox.settle` says that it was told.

    ``records`` is how many fewer there are. ``kind`` is ``merged``: so many were merged into others, with exact totals,
    and ``windows`` closed windows have no record of their own any more; or ``dropped``: the messages are gone,
    ``windows`` closed windows with them. A gap grows while the outbox stays full; its ``number`` stays. ``start_ns``
    to ``end_ns`` is what the messages themselves span, 0 to 0 when they don't say.
    """

    number: int
    topic: str
    kind: str
    windows: int
    records: int
    start_ns: int
    end_ns: int


class Outbox:
    """A bounded, durable queue in one SQLite file (write-ahead log, flushed at every commit). Not thread-safe.

    What `append` returned from survives the process being killed and the power being cut. Records leave in the order
    they came, so that all up to the last one that was sent count as sent, which is durable before the first of them
    leaves (`mark_sent`).

    When ``max_bytes`` are reached, neighbouring windows that were never sent are merged: ``choose`` says which pair is
    next, ``merge`` gives the record of both; each `append` reads the few it merges. Events may hold a quarter, then the
    oldest of them are dropped. Only when nothing is left to merge the oldest records are dropped, events first. All of
    it is written down in `gaps`, and `dropped` counts for ever. Without ``merge`` and ``choose`` nothing is merged.

    A file that is damaged, when opened or later, is renamed to ``….damaged`` (replacing an earlier one) and a new one
    begins; `set_aside` says why. Where that fails, and where the disk cannot be written from the start, records are
    kept in memory until it can; `volatile` says why.

    Raises:
        SkiffError: another process has the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = 8 << 20,
        merge: Merge | None = None,
        choose: Choose | None = None,
    ) -> None:
        self._path: Final = path
        self._max_file_bytes: Final = max_bytes
        self._merge: Final = merge
        self._choose: Final = choose
        self._set_aside = ""
        self._volatile = ""
        self._now: Figures
        self._open()

    @property
    def set_aside(self) -> str:
        """Why a damaged file was set aside since this object was made; empty when none was."""
        return self._set_aside

    @property
    def volatile(self) -> str:
        """Why records are in memory and not on the disk; empty when they are on the disk."""
        return self._volatile

    @property
    def size_bytes(self) -> int:
        """What the records are charged: their topics, payloads and `RECORD_BYTES` each."""
        return self._now.size

    @property
    def dropped(self) -> int:
        """How many records were ever dropped because the outbox was full."""
        return self._guard(lambda: self._total("dropped"))

    def __len__(self) -> int:
        return self._now.count

    def append(self, session: SessionId, seq: int, topic: str, payload: bytes, *, sent: bool = False) -> None:
        """Keeps a message until it is trimmed; durable when this returns. See `append_all`."""
        self.append_all((Record(session=session, seq=seq, topic=topic, payload=payload, sent=sent),))

    def append_all(self, records: Sequence[Record]) -> None:
        """Keeps several messages in one commit: all of them, or none when this raises.

        A record that is given as ``sent`` is about to be published: unless others wait before it, that is written down
        in the same commit, and `mark_sent` has nothing left to do.

        Raises:
            BudgetExceeded: a message alone is larger than the outbox.
            SkiffError: a key is already there with other content, or the disk refuses; nothing was changed.
        """
        if self._volatile:
            self._try_the_disk()
        for record in records:
            if charge(record.topic, record.payload) > self._max_bytes:
                raise BudgetExceeded(
                    f"a message of {len(record.payload)} bytes is larger than the outbox ({self._max_bytes} bytes)"
                )
        self._guard(lambda: self._append(records))

    def pending(self, limit: int, skip: AbstractSet[tuple[SessionId, int]] = frozenset()) -> list[Record]:
        """Up to ``limit`` records, oldest first, leaving out the (session, seq) in ``skip``.

        Call `mark_sent` before any of them is published.
        """
        return self._guard(lambda: self._pending(limit, skip))

    def mark_sent(self, keys: Iterable[tuple[SessionId, int]]) -> None:
        """Writes down that these are about to be published, and that all before them may have been: none is merged.

        Durable when this returns; costs nothing where it is known already. Raises `SkiffError` when the disk refuses:
        then they must not be published, for the aggregator would count twice what is merged later.
        """
        self._guard(lambda: self._mark_sent(keys))

    def trim(self, session: SessionId, seqs: Collection[int]) -> int:
        """Forgets records that are stored elsewhere; returns how many were here."""
        return self._guard(lambda: self._trim(session, seqs))

    def gaps(self) -> tuple[Gap, ...]:
        """What was given up and not settled yet: two per topic at most."""
        return self._guard(self._gaps)

    def settle(self, gaps: Iterable[Gap]) -> None:
        """Forgets gaps that were told, in a record of this outbox; one that has grown since stays whole."""
        self._guard(lambda: self._settle(gaps))

    def close(self) -> None:
        """Closes the file; the object can't be used any more."""
        self._database.close()

    # ── records ────────────────────────────────────────────────────────────────────────────────────────

    def _append(self, records: Sequence[Record]) -> None:
        with self._change() as db:
            for record in records:
                known = db.execute(
                    "SELECT topic, payload FROM records WHERE session = ? AND seq = ?",
                    (record.session, record.seq),
                ).fetchone()
                if known is None:
                    self._insert(db, record)
                elif known != (record.topic, record.payload):
                    raise SkiffError(
                        f"{self._path}: (session {record.session}, seq {record.seq}) is already there "
                        "with other content"
                    )
            self._make_room(db)

    def _insert(self, db: sqlite3.Connection, record: Record) -> None:
        now = self._now
        first_unsent = now.sent_up_to == now.last_place
        windows = int(record.topic.endswith("/window"))
        now.last_place += 1
        db.execute(
            _INSERT,
            (now.last_place, record.session, record.seq, record.topic, record.payload, windows),
        )
        self._now.add(1, charge(record.topic, record.payload), is_window=bool(windows))
        if record.sent and first_unsent:
            self._write_sent(db, now.last_place)

    def _make_room(self, db: sqlite3.Connection) -> None:
        if self._now.size > self._max_bytes:
            Room(db, self._now, max_bytes=self._max_bytes, merge=self._merge, choose=self._choose).make()

    def _pending(self, limit: int, skip: AbstractSet[tuple[SessionId, int]]) -> list[Record]:
        found: list[Record] = []
        with closing(
            self._database.execute("SELECT place, session, seq FROM records ORDER BY place")
        ) as rows:
            wanted: list[int] = []
            for place, session, seq in rows:
                if len(wanted) == limit:
                    break
                if (session, seq) not in skip:
                    wanted.append(place)
        for place in wanted:
            session, seq, topic, payload = self._database.execute(
                "SELECT session, seq, topic, payload FROM records WHERE place = ?", (place,)
            ).fetchone()
            sent = place <= self._now.sent_up_to
            found.append(Record(session=session, seq=seq, topic=topic, payload=payload, sent=sent))
        return found

    def _mark_sent(self, keys: Iterable[tuple[SessionId, int]]) -> None:
        query = "SELECT place FROM records WHERE session = ? AND seq = ?"
        rows = [self._database.execute(query, key).fetchone() for key in keys]
        last = max((row[0] for row in rows if row), default=0)
        if last > self._now.sent_up_to:
            with self._change() as db:
                self._write_sent(db, last)

    def _write_sent(self, db: sqlite3.Connection, place: int) -> None:
        db.execute("UPDATE totals SET value = ? WHERE name = 'sent_up_to'", (place,))
        self._now.sent_up_to = place

    def _trim(self, session: SessionId, seqs: Collection[int]) -> int:
        before = self._now.count
        with self._change() as db:
            for seq in seqs:
                gone = db.execute(
                    f"DELETE FROM records WHERE session = ? AND seq = ? RETURNING windows, {LENGTHS}",  # noqa: S608
                    (session, seq),
                )
                for windows, length in gone.fetchall():
                    self._now.add(-1, -length - RECORD_BYTES, is_window=bool(windows))
        return before - self._now.count

    # ── gaps ───────────────────────────────────────────────────────────────────────────────────────────

    def _gaps(self) -> tuple[Gap, ...]:
        rows = self._database.execute(
            "SELECT number, topic, kind, windows, records, coalesce(start_ns, 0), coalesce(end_ns, 0)"
            " FROM gaps ORDER BY number"
        )
        return tuple(
            Gap(number=n, topic=t, kind=k, windows=w, records=r, start_ns=a, end_ns=b)
            for n, t, k, w, r, a, b in rows.fetchall()
        )

    def _settle(self, gaps: Iterable[Gap]) -> None:
        told = [(gap.number, gap.windows, gap.records) for gap in gaps]
        with self._change() as db:
            db.executemany("DELETE FROM gaps WHERE number = ? AND windows = ? AND records = ?", told)

    def _total(self, name: str) -> int:
        return int(self._database.execute("SELECT value FROM totals WHERE name = ?", (name,)).fetchone()[0])

    # ── the file ───────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction; when it fails, the figures are again what they were."""
        before = self._now.copy()
        try:
            with self._database as db:
                yield db
        except BaseException:
            self._now = before
            raise

    def _guard(self, work: Callable[[], T]) -> T:
        """Runs ``work``; on damage sets the file aside and runs it once more on a new one."""
        try:
            return work()
        except (
            sqlite3.Error,
            UnicodeDecodeError,
        ) as e:  # the latter: an error that quotes wrong bytes of the file
            if isinstance(e, sqlite3.Error) and not outbox_file.is_damage(e):
                raise SkiffError(f"{self._path}: {e}") from e
            self._database.close()
            self._open(str(e))
        return work()

    def _open(self, damage: str = "") -> None:
        database, aside, self._volatile = outbox_file.open_or_explain(
            self._path, max_bytes=self._max_file_bytes, damage=damage
        )
        self._set_aside = aside or self._set_aside
        self._use(database)

    def _use(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._max_bytes = (
            min(self._max_file_bytes, VOLATILE_BYTES) if self._volatile else self._max_file_bytes
        )
        count, size, events_size, last = database.execute(
            f"SELECT count(*), coalesce(sum({LENGTHS} + {RECORD_BYTES}), 0),"  # noqa: S608
            f" coalesce(sum(iif(windows = 0, {LENGTHS} + {RECORD_BYTES}, 0)), 0), coalesce(max(place), 0) FROM records"
        ).fetchone()
        sent_up_to = self._total("sent_up_to")
        self._now = Figures(
            size=size,
            events_size=events_size,
            count=count,
            last_place=max(last, sent_up_to),
            sent_up_to=sent_up_to,
        )

    def _try_the_disk(self) -> None:
        """Moves what is in memory to the disk, if that can be written by now."""
        try:
            database = outbox_file.open_file(self._path, max_bytes=self._max_file_bytes)
        except (sqlite3.Error, OSError, SkiffError, Damaged):
            return
        memory, reason, figures = self._database, self._volatile, self._now
        try:
            self._volatile = ""
            self._use(database)
            self._take_over(memory, figures.sent_up_to)
        except sqlite3.Error:
            database.close()
            self._volatile = reason
            self._use(memory)
        else:
            memory.close()

    def _take_over(self, memory: sqlite3.Connection, sent_up_to: int) -> None:
        last_sent = 0
        with self._change() as db:
            for place, *row in memory.execute(
                "SELECT place, session, seq, topic, payload, windows FROM records ORDER BY place"
            ):
                self._now.last_place += 1
                db.execute(_INSERT, (self._now.last_place, *row))
                self._now.add(1, charge(row[2], row[3]), is_window=bool(row[4]))
                last_sent = self._now.last_place if place <= sent_up_to else last_sent
            if last_sent:
                self._write_sent(db, last_sent)
            gaps = memory.execute("SELECT topic, kind, windows, records, start_ns, end_ns FROM gaps")
            db.executemany(EXTEND_GAP, gaps.fetchall())
            dropped = memory.execute("SELECT value FROM totals WHERE name = 'dropped'").fetchone()
            db.execute("UPDATE totals SET value = value + ? WHERE name = 'dropped'", dropped)
            self._make_room(db)

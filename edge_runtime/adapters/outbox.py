"""Messages that wait until the aggregator says it has stored them. The only durable queue on the device.

The broker is never the durability point: a PUBACK says nothing of its disk. A record stays here until `Outbox.trim`.
"""

import sqlite3
from collections.abc import Callable, Collection
from collections.abc import Set as AbstractSet
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from edge_runtime.adapters import disk
from edge_runtime.contract.errors import BudgetExceeded, SkiffError
from edge_runtime.contract.ids import SessionId

T = TypeVar("T")

RECORD_BYTES: Final = 256
"""Charged per record beside its topic and payload: keys, row and index entries."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS records (
  place INTEGER PRIMARY KEY,
  session TEXT NOT NULL,
  seq INTEGER NOT NULL,
  topic TEXT NOT NULL,
  payload BLOB NOT NULL,
  UNIQUE (session, seq)
);
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT OR IGNORE INTO totals VALUES ('dropped', 0);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One waiting message; (session, seq) is its key."""

    session: SessionId
    seq: int
    topic: str
    payload: bytes = field(repr=False)


class Outbox:
    """A bounded, durable queue in one SQLite file (write-ahead log, flushed at every commit). Not thread-safe.

    What `append` returned from survives the process being killed and the power being cut. When ``max_bytes`` are
    reached the oldest records make room and are counted in `dropped`, which survives too.

    A file that is damaged, when opened or later, is renamed to ``….damaged`` (replacing an earlier one) and a new one
    begins; `set_aside` says why.

    Raises:
        SkiffError: the file cannot be opened or written for another reason than damage; the message says which.
    """

    def __init__(self, path: Path, *, max_bytes: int = 8 << 20) -> None:
        self._path: Final = path
        self._max_bytes: Final = max_bytes
        self._set_aside = ""
        self._size = 0
        self._count = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = self._open_or_set_aside()

    @property
    def set_aside(self) -> str:
        """Why a damaged file was set aside since this object was made; empty when none was."""
        return self._set_aside

    @property
    def size_bytes(self) -> int:
        """What the records are charged: their topics, payloads and `RECORD_BYTES` each."""
        return self._size

    @property
    def dropped(self) -> int:
        """How many records were ever dropped because the outbox was full."""
        return self._guard(self._dropped)

    def __len__(self) -> int:
        return self._count

    def append(self, session: SessionId, seq: int, topic: str, payload: bytes) -> None:
        """Keeps a message until it is trimmed; durable when this returns.

        Raises:
            BudgetExceeded: the message alone is larger than the outbox.
            SkiffError: the key is already there with other content, or the disk refuses; nothing was changed.
        """
        charge = _charge(topic, payload)
        if charge > self._max_bytes:
            raise BudgetExceeded(
                f"a message of {len(payload)} bytes is larger than the outbox ({self._max_bytes} bytes)"
            )
        self._guard(lambda: self._append(session, seq, topic, payload))

    def pending(self, limit: int, skip: AbstractSet[tuple[SessionId, int]] = frozenset()) -> list[Record]:
        """Up to ``limit`` records, oldest first, leaving out the (session, seq) in ``skip``."""
        return self._guard(lambda: self._pending(limit, skip))

    def trim(self, session: SessionId, seqs: Collection[int]) -> int:
        """Forgets records that are stored elsewhere; returns how many were here."""
        return self._guard(lambda: self._trim(session, seqs))

    def close(self) -> None:
        """Closes the file; the object can't be used any more."""
        self._database.close()

    # ── inside ─────────────────────────────────────────────────────────────────────────────────────────

    def _append(self, session: SessionId, seq: int, topic: str, payload: bytes) -> None:
        with self._database as db:
            known = db.execute(
                "SELECT topic, payload FROM records WHERE session = ? AND seq = ?", (session, seq)
            ).fetchone()
            if known == (topic, payload):
                return
            if known is not None:
                raise SkiffError(
                    f"{self._path}: (session {session}, seq {seq}) is already there with other content"
                )
            size, count = self._make_room(_charge(topic, payload))
            db.execute(
                "INSERT INTO records (session, seq, topic, payload) VALUES (?, ?, ?, ?)",
                (session, seq, topic, payload),
            )
        self._size, self._count = size, count

    def _make_room(self, charge: int) -> tuple[int, int]:
        """Drops the oldest records until ``charge`` bytes fit; the size and count with them."""
        size, count = self._size + charge, self._count + 1
        if size <= self._max_bytes:
            return size, count
        last, dropped = 0, 0
        with closing(
            self._database.execute("SELECT place, topic, payload FROM records ORDER BY place")
        ) as rows:
            for place, topic, payload in rows:
                last, dropped = place, dropped + 1
                size -= _charge(topic, payload)
                if size <= self._max_bytes:
                    break
        self._database.execute("DELETE FROM records WHERE place <= ?", (last,))
        self._database.execute("UPDATE totals SET value = value + ? WHERE name = 'dropped'", (dropped,))
        return size, count - dropped

    def _pending(self, limit: int, skip: AbstractSet[tuple[SessionId, int]]) -> list[Record]:
        found: list[Record] = []
        with closing(self._database.execute("SELECT session, seq FROM records ORDER BY place")) as keys:
            wanted: list[tuple[SessionId, int]] = []
            for session, seq in keys:
                if len(wanted) == limit:
                    break
                if (session, seq) not in skip:
                    wanted.append((session, seq))
        for session, seq in wanted:
            topic, payload = self._database.execute(
                "SELECT topic, payload FROM records WHERE session = ? AND seq = ?", (session, seq)
            ).fetchone()
            found.append(Record(session=session, seq=seq, topic=topic, payload=payload))
        return found

    def _trim(self, session: SessionId, seqs: Collection[int]) -> int:
        charges: list[int] = []
        with self._database as db:
            for seq in seqs:
                gone = db.execute(
                    "DELETE FROM records WHERE session = ? AND seq = ? RETURNING topic, payload",
                    (session, seq),
                )
                charges += [_charge(topic, payload) for topic, payload in gone.fetchall()]
        self._count -= len(charges)
        self._size -= sum(charges)
        return len(charges)

    def _dropped(self) -> int:
        return int(self._database.execute("SELECT value FROM totals WHERE name = 'dropped'").fetchone()[0])

    def _guard(self, work: Callable[[], T]) -> T:
        """Runs ``work``; on damage sets the file aside and runs it once more on a new one."""
        try:
            return work()
        except (sqlite3.OperationalError, sqlite3.IntegrityError) as e:
            raise SkiffError(f"{self._path}: {e}") from e
        except sqlite3.DatabaseError as e:
            self._database.close()
            self._database = self._begin_anew(str(e))
            return work()

    def _open_or_set_aside(self) -> sqlite3.Connection:
        try:
            return self._open()
        except (sqlite3.OperationalError, OSError) as e:
            raise SkiffError(f"{self._path}: cannot be opened ({e})") from e
        except sqlite3.DatabaseError as e:
            return self._begin_anew(str(e))

    def _begin_anew(self, reason: str) -> sqlite3.Connection:
        self._set_aside = f"{self._path}: damaged ({reason}); kept as {self._path.name}.damaged"
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        self._path.replace(self._path.with_name(self._path.name + ".damaged"))
        return self._open()

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=5.0)
        try:
            # FULL flushes the log at each commit; NORMAL would lose the last commits with the power.
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.execute("PRAGMA journal_size_limit = 1048576")
            _check(database)
            database.executescript(_SCHEMA)
            self._count, self._size = database.execute(
                "SELECT count(*), coalesce(sum(length(CAST(topic AS BLOB)) + length(payload) + ?), 0) FROM records",
                (RECORD_BYTES,),
            ).fetchone()
        except BaseException:
            database.close()
            raise
        disk.flush(self._path.parent)
        return database


def _check(database: sqlite3.Connection) -> None:
    problem = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise sqlite3.DatabaseError(problem)


def _charge(topic: str, payload: bytes) -> int:
    return len(topic.encode()) + len(payload) + RECORD_BYTES

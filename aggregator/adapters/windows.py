"""The telemetry store: append many windows in one transaction, each counted once; merge and count by filter.

A window is kept as the bytes that came; the columns that questions filter and add up by stand in a table of
their own, which stays small to scan. A window's key is (device, session, seq); a merged record covers
``seq_lo`` to ``seq``, and no two stored records of a session overlap. It counts as the windows it was merged from.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from aggregator.adapters.database import connect, transaction
from aggregator.records import Arrival, Block, DeadLetter, DeviceTotals, Selection, Stored, StoreFigures
from edge_runtime.contract.codec import decode, latency_body, read_latency
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import DeviceId, Digest
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import Event, Window
from edge_runtime.contract.profile import Profile

VERSION: Final = 2
STEPS: Final = {1: "ALTER TABLE windows ADD COLUMN windows INTEGER NOT NULL DEFAULT 1"}
UNJUDGED, JUDGED, REJECTED = 0, 1, 2
MAX_LETTER_BYTES: Final = 16 * 1024
SETTLE_WINDOWS: Final = 1000
MAX_TOPIC_CHARACTERS: Final = 512

SCHEMA: Final = """
CREATE TABLE windows (
  id INTEGER PRIMARY KEY, device TEXT NOT NULL, session TEXT NOT NULL, seq INTEGER NOT NULL, seq_lo INTEGER NOT NULL,
  model TEXT NOT NULL, digest TEXT NOT NULL, layout TEXT NOT NULL, state INTEGER NOT NULL,
  start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL, synced INTEGER NOT NULL, received_ns INTEGER NOT NULL,
  rows INTEGER NOT NULL, failed INTEGER NOT NULL, refused INTEGER NOT NULL, labelled INTEGER NOT NULL,
  correct INTEGER NOT NULL, rss_bytes INTEGER NOT NULL, peak_rss_bytes INTEGER NOT NULL, wire_bytes INTEGER NOT NULL,
  latency TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '',
  windows INTEGER NOT NULL DEFAULT 1, UNIQUE (device, session, seq));
CREATE TABLE payloads (id INTEGER PRIMARY KEY, payload BLOB NOT NULL);
CREATE INDEX windows_by_stream ON windows (digest, device, id);
CREATE INDEX windows_unjudged ON windows (digest) WHERE state=0;
CREATE INDEX windows_rejected ON windows (digest) WHERE state=2;
CREATE INDEX windows_by_receipt ON windows (received_ns);
CREATE TABLE streams (
  digest TEXT NOT NULL, device TEXT NOT NULL, newest INTEGER NOT NULL, PRIMARY KEY (digest, device)) WITHOUT ROWID;
CREATE TABLE events (
  id INTEGER PRIMARY KEY, device TEXT NOT NULL, session TEXT NOT NULL, seq INTEGER NOT NULL, wall_ns INTEGER NOT NULL,
  received_ns INTEGER NOT NULL, name TEXT NOT NULL, detail TEXT NOT NULL, UNIQUE (device, session, seq));
CREATE TABLE dead_letters (
  id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, topic TEXT NOT NULL, reason TEXT NOT NULL,
  payload BLOB NOT NULL, length INTEGER NOT NULL, times INTEGER NOT NULL, first_ns INTEGER NOT NULL,
  last_ns INTEGER NOT NULL);
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID
"""

INSERT_WINDOW: Final = """
INSERT INTO windows (device, session, seq, seq_lo, model, digest, layout, state, start_ns, end_ns, synced,
  received_ns, rows, failed, refused, labelled, correct, rss_bytes, peak_rss_bytes, wire_bytes, latency, windows)
VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"""

TOTALS: Final = """
SELECT device, digest, SUM(windows), SUM(rows), SUM(failed), SUM(refused), SUM(labelled), SUM(correct), SUM(wire_bytes),
  MAX(peak_rss_bytes), MIN(received_ns), MAX(received_ns), MAX(id)"""


class Windows:
    """The store at ``path``; ``read_only`` for another process that only asks. Not thread-safe.

    ``dead_letters`` bounds how many bad messages are kept; the oldest make room.
    """

    def __init__(self, path: Path, *, read_only: bool = False, dead_letters: int = 1000) -> None:
        self._db = connect(path, SCHEMA, VERSION, read_only=read_only, steps=STEPS)
        self._max_letters = dead_letters

    def close(self) -> None:
        """Closes the file; a writer folds the log back into it."""
        self._db.close()

    # ── append ─────────────────────────────────────────────────────────────────────────────────────────

    def append(
        self,
        windows: Sequence[Arrival],
        events: Sequence[Event],
        dead: Sequence[DeadLetter],
        received_ns: int,
    ) -> Stored:
        """Commits a batch; durable on return. Raises `sqlite3.Error` with nothing stored when the disk fails."""
        stored = duplicates = overlapping = 0
        with transaction(self._db):
            for arrival in windows:
                clash = self._clash(arrival.window)
                if clash is None:
                    self._insert(arrival, received_ns)
                    stored += 1
                elif clash:
                    overlapping += 1
                    w = arrival.window
                    topic = f"{w.device}/{w.model}/window"
                    self._bury(DeadLetter(topic, arrival.payload, clash), received_ns)
                else:
                    duplicates += 1
            for event in events:
                duplicates += not self._insert_event(event, received_ns)
            for letter in dead:
                self._bury(letter, received_ns)
            self._trim_letters()
            self._count("duplicates_rejected", duplicates)
            self._count("overlaps_rejected", overlapping)
        return Stored(stored=stored, duplicates=duplicates, overlapping=overlapping)

    def _clash(self, w: Window) -> str | None:
        """None when the window is new, empty when it is stored, else how it overlaps a stored one."""
        row = self._db.execute(
            "SELECT seq, seq_lo FROM windows WHERE device=? AND session=? AND seq>=? ORDER BY seq LIMIT 1",
            (w.device, w.session, w.seq_lo),
        ).fetchone()
        if row is None or row[1] > w.seq:
            return None
        if row == (w.seq, w.seq_lo):
            return ""
        return f"windows {w.seq_lo} to {w.seq} overlap the stored {row[1]} to {row[0]}: counted once already"

    def _insert(self, arrival: Arrival, received_ns: int) -> None:
        w = arrival.window
        values = (
            *(w.device, w.session, w.seq, w.seq_lo, w.model, w.digest, w.profile.layout),
            JUDGED if arrival.judged else UNJUDGED,
            *(w.start_ns, w.end_ns, w.synced, received_ns, w.profile.rows, w.failed),
            sum(n for _, n in w.refused),
            *(w.labelled, w.correct, w.health.rss_bytes, w.health.peak_rss_bytes),
            len(arrival.payload),
            _latency_text(w.latency),
            w.windows,
        )
        newest = self._db.execute(INSERT_WINDOW, values).lastrowid
        self._db.execute("INSERT INTO payloads VALUES (?,?)", (newest, arrival.payload))
        self._db.execute(
            "INSERT INTO streams VALUES (?,?,?) ON CONFLICT DO UPDATE SET newest=excluded.newest",
            (w.digest, w.device, newest),
        )
        self._count("windows", w.windows)
        self._count("rows", w.profile.rows)

    def _insert_event(self, e: Event, received_ns: int) -> bool:
        detail = "\n".join(f"{key}={value}" for key, value in e.detail)
        done = self._db.execute(
            "INSERT OR IGNORE INTO events (device, session, seq, wall_ns, received_ns, name, detail)"
            " VALUES (?,?,?,?,?,?,?)",
            (e.device, e.session, e.seq, e.wall_ns, received_ns, e.name, detail),
        )
        return done.rowcount == 1

    def _bury(self, letter: DeadLetter, received_ns: int) -> None:
        topic = letter.topic[:MAX_TOPIC_CHARACTERS]
        name = hashlib.sha256(topic.encode() + b"\0" + letter.payload).hexdigest()
        self._db.execute(
            "INSERT INTO dead_letters (hash, topic, reason, payload, length, times, first_ns, last_ns)"
            " VALUES (?,?,?,?,?,1,?,?) ON CONFLICT (hash) DO UPDATE SET times=times+1, last_ns=excluded.last_ns",
            (
                *(name, topic, letter.reason[:1024], letter.payload[:MAX_LETTER_BYTES], len(letter.payload)),
                *(received_ns, received_ns),
            ),
        )
        self._count("dead_letters", 1)

    def _trim_letters(self) -> None:
        self._db.execute(
            "DELETE FROM dead_letters WHERE id <= (SELECT id FROM dead_letters ORDER BY id DESC LIMIT 1 OFFSET ?)",
            (self._max_letters,),
        )

    def _count(self, name: str, by: int) -> None:
        if by:
            self._db.execute(
                "INSERT INTO counters VALUES (?,?) ON CONFLICT (name) DO UPDATE SET value=value+excluded.value",
                (name, by),
            )

    def settle(self, digest: Digest, check: Callable[[Profile], object]) -> tuple[int, int]:
        """The artifact became known: judges up to `SETTLE_WINDOWS` windows kept unjudged; (accepted, rejected).

        Call it until both are 0. ``check`` raises `ContractError` on a profile that contradicts the artifact;
        that window stays stored, with the reason, and is left out of every answer.
        """
        accepted = rejected = 0
        with transaction(self._db):
            rows = self._db.execute(
                "SELECT id, payload FROM windows JOIN payloads USING (id) WHERE digest=? AND state=0 LIMIT ?",
                (digest, SETTLE_WINDOWS),
            ).fetchall()
            for number, payload in rows:
                try:
                    check(_window(payload).profile)
                except ContractError as e:
                    self._db.execute(
                        "UPDATE windows SET state=?, reason=? WHERE id=?", (REJECTED, str(e), number)
                    )
                    rejected += 1
                else:
                    self._db.execute("UPDATE windows SET state=? WHERE id=?", (JUDGED, number))
                    accepted += 1
        return accepted, rejected

    def prune(self, before_ns: int) -> int:
        """Drops windows and events received before ``before_ns``; the counters since the store was made stay."""
        with transaction(self._db):
            old = "(SELECT id FROM windows WHERE received_ns<?)"
            self._db.execute(f"DELETE FROM payloads WHERE id IN {old}", (before_ns,))  # noqa: S608
            gone = self._db.execute("DELETE FROM windows WHERE received_ns<?", (before_ns,)).rowcount
            self._db.execute("DELETE FROM events WHERE received_ns<?", (before_ns,))
        return int(gone)

    # ── ask ────────────────────────────────────────────────────────────────────────────────────────────

    def unjudged(self) -> tuple[Digest, ...]:
        """Artifacts with windows that wait for their layout."""
        rows = self._db.execute("SELECT DISTINCT digest FROM windows WHERE state=0 ORDER BY digest")
        return tuple(Digest(row[0]) for row in rows)

    def streams(self) -> tuple[tuple[Digest, DeviceId, int], ...]:
        """Every (artifact, device) that ever sent a window, with the number of its newest."""
        rows = self._db.execute("SELECT digest, device, newest FROM streams ORDER BY digest, device")
        return tuple((Digest(a), DeviceId(d), int(n)) for a, d, n in rows)

    def pending(self, digest: Digest, device: DeviceId, after: int) -> tuple[int, float, int]:
        """(rows, seconds, received_ns of the oldest) of the judged windows numbered above ``after``."""
        row = self._db.execute(
            "SELECT COALESCE(SUM(rows), 0), COALESCE(SUM(MAX(0, end_ns-start_ns)/1e9), 0.0),"
            " COALESCE(MIN(received_ns), 0) FROM windows WHERE digest=? AND device=? AND id>? AND state=?",
            (digest, device, after, JUDGED),
        ).fetchone()
        return int(row[0]), float(row[1]), int(row[2])

    def block(
        self, digest: Digest, device: DeviceId, after: int, *, rows: int, seconds: float
    ) -> Block | None:
        """The newest windows numbered above ``after``, as many as it takes to cover ``rows`` and ``seconds``, merged.

        None when all of them together do not cover that.
        """
        found: list[Window] = []
        first = last = seen = 0
        span = 0.0
        answer = self._db.execute(
            "SELECT id, payload FROM windows JOIN payloads USING (id)"
            " WHERE digest=? AND device=? AND id>? AND state=? ORDER BY id DESC",
            (digest, device, after, JUDGED),
        )
        for number, payload in answer:
            window = _window(payload)
            found.append(window)
            first, last = number, last or number
            seen += window.profile.rows
            span += max(0, window.end_ns - window.start_ns) / 1e9
            if seen >= rows and span >= seconds:
                break
        else:
            return None
        return Block(
            device=device,
            profile=_merged(w.profile for w in found),
            windows=sum(w.windows for w in found),
            rows=seen,
            seconds=span,
            labelled=sum(w.labelled for w in found),
            correct=sum(w.correct for w in found),
            first=first,
            last=last,
        )

    def windows(self, selection: Selection) -> Iterator[Window]:
        """The selected windows themselves, oldest first."""
        where, values = _where(selection)
        query = f"SELECT payload FROM windows JOIN payloads USING (id) WHERE {where} ORDER BY id"  # noqa: S608
        for (payload,) in self._db.execute(query, values):
            yield _window(payload)

    def profiles(self, selection: Selection) -> tuple[Profile, ...]:
        """The merged profile per layout of the selected windows: profiles of different layouts cannot be merged."""
        merged: dict[tuple[str, int], Profile] = {}
        for window in self.windows(selection):
            key = (window.profile.layout, window.profile.sums.size)
            merged[key] = merged[key].merge(window.profile) if key in merged else window.profile
        return tuple(merged[key] for key in sorted(merged))

    def latency(self, selection: Selection) -> LatencyHistogram:
        """All latencies of the selected windows."""
        where, values = _where(selection)
        total = LatencyHistogram()
        for (text,) in self._db.execute(f"SELECT latency FROM windows WHERE {where}", values):  # noqa: S608
            total = total.merge(read_latency(Fields(json.loads(text), "latency")))
        return total

    def totals(self, selection: Selection) -> tuple[DeviceTotals, ...]:
        """The counts of the selected windows, per device and artifact."""
        where, values = _where(selection)
        rows = self._db.execute(
            f"{TOTALS} FROM windows WHERE {where} GROUP BY device, digest", values
        ).fetchall()
        return tuple(
            DeviceTotals(
                device=DeviceId(row[0]),
                digest=Digest(row[1]),
                windows=row[2],
                rows=row[3],
                failed=row[4],
                refused=row[5],
                labelled=row[6],
                correct=row[7],
                wire_bytes=row[8],
                rss_bytes=self._rss(row[12]),
                peak_rss_bytes=row[9],
                first_ns=row[10],
                last_ns=row[11],
            )
            for row in rows
        )

    def wire_bytes(self, selection: Selection, quantile: float = 0.5) -> int:
        """A quantile of the selected windows' size on the wire in bytes; 0 when there are none."""
        where, values = _where(selection)
        n = self._db.execute(f"SELECT COUNT(*) FROM windows WHERE {where}", values).fetchone()[0]  # noqa: S608
        row = self._db.execute(
            f"SELECT wire_bytes FROM windows WHERE {where} ORDER BY wire_bytes LIMIT 1 OFFSET :offset",  # noqa: S608
            {**values, "offset": min(max(n - 1, 0), int(quantile * n))},
        ).fetchone()
        return int(row[0]) if row else 0

    def figures(self) -> StoreFigures:
        """The store's own totals."""
        counters = dict(self._db.execute("SELECT name, value FROM counters"))
        return StoreFigures(
            windows=counters.get("windows", 0),
            rows=counters.get("rows", 0),
            unjudged=self._count_of("windows WHERE state=0"),
            rejected=self._count_of("windows WHERE state=2"),
            duplicates_rejected=counters.get("duplicates_rejected", 0),
            overlaps_rejected=counters.get("overlaps_rejected", 0),
            events=self._count_of("events"),
            dead_letters=self._count_of("dead_letters"),
            dead_letters_ever=counters.get("dead_letters", 0),
        )

    def dead_letters(self, limit: int = 100) -> tuple[dict[str, Any], ...]:
        """The newest dead letters: topic, reason, times, length, last_ns and the kept part of the payload."""
        return self._dicts(
            "SELECT topic, reason, times, length, first_ns, last_ns, payload FROM dead_letters"
            " ORDER BY last_ns DESC, id DESC"
            " LIMIT ?",
            limit,
        )

    def events(self, limit: int = 100) -> tuple[dict[str, Any], ...]:
        """The newest events of all devices."""
        return self._dicts(
            "SELECT device, session, seq, wall_ns, received_ns, name, detail FROM events ORDER BY id DESC LIMIT ?",
            limit,
        )

    def _rss(self, number: int) -> int:
        return int(self._db.execute("SELECT rss_bytes FROM windows WHERE id=?", (number,)).fetchone()[0])

    def _count_of(self, what: str) -> int:
        return int(self._db.execute(f"SELECT COUNT(*) FROM {what}").fetchone()[0])  # noqa: S608

    def _dicts(self, query: str, limit: int) -> tuple[dict[str, Any], ...]:
        answer = self._db.execute(query, (limit,))
        names = [column[0] for column in answer.description]
        return tuple(dict(zip(names, row, strict=True)) for row in answer)


def _window(payload: bytes) -> Window:
    message = decode(payload)
    if not isinstance(message, Window):
        raise ContractError(f"the store holds a {type(message).__name__} where a window belongs")
    return message


def _latency_text(h: LatencyHistogram) -> str:
    return json.dumps(latency_body(h), separators=(",", ":"))


def _merged(profiles: Iterable[Profile]) -> Profile:
    total: Profile | None = None
    for profile in profiles:
        total = profile if total is None else total.merge(profile)
    if total is None:
        raise ContractError("there is no window to merge")
    return total


def _where(s: Selection) -> tuple[str, dict[str, object]]:
    """The condition of a selection with named values; rejected windows never answer."""
    values: dict[str, object] = {"rejected": REJECTED, "since": s.since_ns, "until": s.until_ns}
    parts = ["state<>:rejected", "received_ns>=:since", "received_ns<:until"]
    for name in ("model", "digest", "layout"):
        value = getattr(s, name)
        if value is not None:
            parts.append(f"{name}=:{name}")
            values[name] = value
    if s.devices is not None:
        names = [f"d{i}" for i in range(len(s.devices))]
        parts.append(f"device IN ({', '.join(':' + name for name in names)})")
        values.update(zip(names, s.devices, strict=True))
    where = " AND ".join(parts)
    if s.last:
        where = f"id IN (SELECT id FROM windows WHERE {where} ORDER BY id DESC LIMIT :last)"  # noqa: S608
        values["last"] = s.last
    return where, values
